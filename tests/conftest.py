"""Fixtures the whole suite shares: where real images are, a small dataset made of them, quick child processes."""

import gc
import importlib.util
import multiprocessing
import multiprocessing.forkserver
import os
import sys
import tarfile
from pathlib import Path

import pytest

if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read where Triton defines functions: before anything imports it

# Files whose tests take a minute or more, the longest first.
LONGEST = """test_machine_code test_torchrun test_promised_commands test_learns test_gpu_report test_bench_step
test_detection test_bench_loader test_world_size test_resume test_methods_run test_loader_gpu test_null_cuda
test_readmes test_wheel test_eval_all""".split()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images that tests use: $SHARED_DATA, or shared/data beside the checkout."""
    folder = Path(os.environ.get("SHARED_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real images here: {folder} is missing; set SHARED_DATA to a folder that has them")
    return folder


@pytest.fixture(scope="session")
def imagenet_sample(shared_data) -> list[Path]:
    """500 original ImageNet JPEGs, sorted by path."""
    paths = sorted((shared_data / "imagenet-sample").glob("*/*.JPEG"))
    if not paths:
        pytest.skip(f"no JPEGs under {shared_data / 'imagenet-sample'}")
    return paths


@pytest.fixture(scope="session")
def small_beton(tmp_path_factory, imagenet_sample) -> Path:
    """A .beton file of 48 of the real JPEGs in 6 classes, at their original sizes; file names in id order."""
    from pipeline.convert import ConvertConfig, main

    root = tmp_path_factory.mktemp("small_beton")
    for i, path in enumerate(imagenet_sample[:48]):
        target = root / "images" / f"class_{i % 6}" / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(path)
    main(ConvertConfig(out=root / "train.beton", source=root / "images", max_side=10_000, workers=1))
    return root / "train.beton"


@pytest.fixture
def images(tmp_path) -> Path:
    """The folder of 70 small images of two classes: three chunks of a conversion's work."""
    from tests.conversions import drawn

    for i in range(70):
        drawn(tmp_path / "images" / f"class_{i % 2}" / f"{i:02d}.jpg", i)
    return tmp_path / "images"


@pytest.fixture
def out(tmp_path) -> Path:
    """Where a conversion of them is to go, in a folder of its own."""
    return tmp_path / "out" / "set.beton"


@pytest.fixture
def forked(monkeypatch) -> None:
    """Workers are forked, as in a process of its own, where torch is not loaded: they inherit what a test replaces."""
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr("pipeline.storage.workers.threading.active_count", lambda: 1)


@pytest.fixture(scope="session")
def shared_voc(tmp_path_factory, shared_data) -> Path:
    """The folder of VOCdevkit/VOC2007: 160 trainval and 100 test images with their annotations."""
    archive = shared_data / "voc2007-sample.tar"
    if not archive.is_file():
        pytest.skip(f"no {archive}")
    root = tmp_path_factory.mktemp("voc")
    with tarfile.open(archive) as tar:
        tar.extraction_filter = getattr(tarfile, "data_filter", None)  # new in Python 3.11.4
        tar.extractall(root)
    return root


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A folder with the coloured images of tests/evaluation.py, which no test may change."""
    from tests.evaluation import write_dataset

    return write_dataset(tmp_path_factory.mktemp("coloured"))


@pytest.fixture
def run(data, tmp_path) -> Path:
    """A run folder with an encoder for those images."""
    from tests.evaluation import write_run

    return write_run(tmp_path / "run", data)


@pytest.fixture
def same_arithmetic(monkeypatch) -> None:
    """What a GPU would otherwise decide for itself: TF32, whose 10 bits hide small differences, is off in convolutions
    too, as it is in matrix products, and cuDNN takes kernels that add in the same order every time."""
    import torch

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)


@pytest.fixture(scope="session")
def training_forkserver() -> None:
    """A fork server with the trainer loaded, so that no child imports it anew. Another test's server lacks it."""
    gc.collect()  # a loader that is garbage still has its processes, for whose end the server waits
    multiprocessing.forkserver._forkserver._stop()
    multiprocessing.set_forkserver_preload(["train.pretrain", "timm", "torch.utils.tensorboard"])


def pytest_collection_modifyitems(items):
    """The longest files begin, so that none runs alone at the end. Tests marked gpu or ffcv need it."""
    import torch

    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))

    missing = {
        "gpu": not torch.cuda.is_available() and "needs a CUDA device",
        "ffcv": not importlib.util.find_spec("ffcv") and "needs FFCV, which scripts/setup.sh builds",
    }
    for item in items:
        for name, reason in missing.items():
            if reason and item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reason))
