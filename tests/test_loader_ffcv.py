"""FFCV's own Loader with our decoder: the fast loader's batches, bit for bit; damaged images, early ends, errors."""

import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import convert
from pipeline.convert import ConvertConfig
from pipeline.errors import UserError
from pipeline.loader import make_loader
from pipeline.spec import BARLOW_TWINS_VIEWS, SUPERVISED_VIEW, Blocks, CentreCrop, LoaderConfig, Squash
from pipeline.storage.beton import MODE_RAW, open_beton
from pipeline.storage.sources.open import Source

REPO = Path(__file__).resolve().parents[1]
LIMIT_S = 300  # of a test in which FFCV would hang; compiling is part of it


@pytest.fixture(scope="module")
def config(small_beton) -> LoaderConfig:
    return LoaderConfig(small_beton, BARLOW_TWINS_VIEWS, 64, global_batch=16, seed=5, workers=2, backend="ffcv")


def batches(config: LoaderConfig, start: int = 0, stop: int | None = 4) -> list:
    loader = make_loader(config)
    try:
        return list(loader.batches(start, stop))
    finally:
        loader.close()


def assert_as_fast(config: LoaderConfig, start: int = 0, stop: int | None = 4) -> list:
    """The batches, after a comparison with the fast loader's."""
    ours, fast = batches(config, start, stop), batches(replace(config, backend="fast"), start, stop)
    assert len(ours) == len(fast) > 0
    for one, other in zip(ours, fast, strict=True):
        assert (one.step, one.epoch, one.substituted) == (other.step, other.epoch, other.substituted)
        assert torch.equal(one.sample, other.sample) and torch.equal(one.label, other.label)
        for view, same in zip(one.views, other.views, strict=True):
            assert view.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(view, same)
    return ours


@pytest.fixture(scope="module")
def damaged(config, tmp_path_factory) -> LoaderConfig:
    """Two images of it are cut off inside the file."""
    folder = tmp_path_factory.mktemp("damaged")
    for path in config.data.parent.glob("train.*"):
        shutil.copy(path, folder / path.name)
    beton = open_beton(folder / "train.beton")
    file = np.memmap(beton.path, np.uint8, "r+")
    for sample in (11, 30):
        middle = int(beton.offsets[sample] + beton.sizes_bytes[sample] // 2)
        file[middle : middle + int(beton.sizes_bytes[sample] // 2)] = 0
    file.flush()
    return replace(config, data=beton.path)


@pytest.fixture
def in_time() -> Iterator[None]:
    """Fails the test where FFCV hangs."""

    def fail(*_) -> None:
        raise TimeoutError(f"not done after {LIMIT_S} s")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(LIMIT_S)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.ffcv
@pytest.mark.slow
def test_two_views_across_epochs_from_any_step(config):
    whole = assert_as_fast(config, 0, 7)
    assert [batch.epoch for batch in whole] == [0, 0, 0, 1, 1, 1, 2]
    for one, other in zip(assert_as_fast(config, 4, 7), whole[4:], strict=True):
        assert torch.equal(one.views[0], other.views[0])


@pytest.mark.ffcv
@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"workers": 1},
        {"views": (SUPERVISED_VIEW,)},
        {"blocks": Blocks(3, 5)},
        {"resolution_px": 72, "resolutions": ((0, 40), (1, 56))},
        {"view_type": torch.bfloat16},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_batches_of_the_fast_loader(config, change):
    assert_as_fast(replace(config, **change), 1, 5)


@pytest.mark.ffcv
@pytest.mark.slow
def test_ranks_share_a_pass_in_the_order_given(config):
    """Centre crops, some samples twice, a short last batch of which the second rank gets nothing."""
    config = replace(config, shuffle=False, views=CentreCrop(72), global_batch=4, ids=np.array([40, 3, 3, 17, 8]))
    assert_as_fast(config, 0, None)
    for rank, sizes in enumerate(([2, 1], [2, 0])):
        ours = assert_as_fast(replace(config, rank=rank, world_size=2), 0, None)
        assert [len(batch.sample) for batch in ours] == sizes


@pytest.mark.ffcv
@pytest.mark.slow
def test_squashed_views(config):
    assert_as_fast(replace(config, shuffle=False, views=Squash(72), ids=np.array([40, 3, 17])), 0, None)


@pytest.mark.ffcv
@pytest.mark.slow
def test_greyscale_jpegs_and_raw_pixels(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), np.uint8)
    for i, image in enumerate(pixels):
        folder = tmp_path / "images" / f"class_{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[: 20 + i, :, 0] if i % 3 else image).save(folder / f"{i}.jpg", quality=90)
    convert.main(ConvertConfig(tmp_path / "grey.beton", tmp_path / "images", workers=1))
    names = [str(i) for i in range(9)]
    source = Source("cifar-10", "train", ["a", "b"], names, np.arange(9) % 2, tmp_path, pixels=pixels)
    convert.convert(source, tmp_path / "raw.beton", ConvertConfig(tmp_path / "raw.beton"))
    assert (open_beton(tmp_path / "raw.beton").modes == MODE_RAW).all()
    for name in ("grey", "raw"):
        config = LoaderConfig(tmp_path / f"{name}.beton", BARLOW_TWINS_VIEWS, 32, global_batch=4, backend="ffcv")
        assert_as_fast(config)


@pytest.mark.ffcv
@pytest.mark.slow
def test_ffcv_reads_the_mapping_whose_loss_is_named(config):
    """tests/test_mapped.py: a file that is cut short while it is in use."""
    with make_loader(config) as loader:
        next(loader.batches(0, 4))
        assert loader._ffcv.memory_manager.context.state[0] is loader.dataset.data


@pytest.mark.ffcv
@pytest.mark.slow
def test_a_damaged_image_ends_the_run_or_is_substituted(damaged, in_time, capsys):
    name = re.escape(open_beton(damaged.data).file_names()[11])
    with pytest.raises(UserError, match=f"{name}.*cannot be used: the JPEG is damaged"):
        batches(replace(damaged, ids=np.arange(20)), 0, 3)
    ours = assert_as_fast(replace(damaged, on_bad_image="substitute"), 0, 9)
    assert [sum(batch.substituted for batch in ours[e : e + 3]) for e in (0, 3, 6)] == [2, 2, 2]
    assert capsys.readouterr().err.count("others stand in") == 4  # each image once by each of the two loaders


@pytest.mark.ffcv
@pytest.mark.slow
def test_an_early_end_leaves_no_thread_and_a_usable_loader(config, in_time):
    loader, threads = make_loader(config), torch.get_num_threads()
    before = threading.active_count()
    first = next(loader.batches(0, 30))
    for batch in loader.batches(0, 50):
        if batch.step == 4:
            break
    passes = loader.batches(0, 9), loader.batches(0, 9)
    assert torch.equal(next(passes[0]).views[1], first.views[1])
    passes[0].close()
    assert torch.equal(next(passes[1]).views[1], first.views[1])
    later = loader.batches(3, 9)
    next(later)
    with pytest.raises(UserError, match="another pass was begun"):
        next(passes[1])
    later.close()
    loader.close()
    assert threading.active_count() == before
    assert torch.get_num_threads() == threads


@pytest.mark.ffcv
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_error_in_ffcvs_thread_ends_the_pass(config, in_time, monkeypatch):
    from ffcv.loader.epoch_iterator import EpochIterator

    make = EpochIterator.run_pipeline

    def third_fails(self, number, *arguments):
        if number == 2:
            raise MemoryError("of the test")
        return make(self, number, *arguments)

    monkeypatch.setattr(EpochIterator, "run_pipeline", third_fails)
    loader = make_loader(config)
    pass_ = loader.batches(0, 3)
    assert [next(pass_).step for _ in range(2)] == [0, 1]
    with pytest.raises(RuntimeError, match="FFCV's loading thread has ended"):
        next(pass_)


@pytest.mark.ffcv
@pytest.mark.slow
def test_two_loaders_at_the_same_time(config):
    one, other = make_loader(config), make_loader(replace(config, seed=6))
    pairs = list(zip(one.batches(0, 6), other.batches(0, 6), strict=True))
    assert [a.step for a, _ in pairs] == [b.step for _, b in pairs] == list(range(6))
    assert torch.equal(pairs[5][0].views[0], batches(config, 5, 6)[0].views[0])


@pytest.mark.ffcv
@pytest.mark.slow
def test_the_readmes_pipeline(config, in_time):
    """The code block runs as it stands, on a small file, for its first two epochs."""
    section = (REPO / "pipeline" / "README.md").read_text().split("## In FFCV's own Loader")[1]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    for old, new in (("data/imagenet/train.beton", str(config.data)), ("range(300)", "range(2)"), ("256", "16")):
        assert old in code
        code = code.replace(old, new)
    made = {}
    exec(code, made)
    assert made["views"].shape == (16, 2, 224, 224, 3) and made["views"].dtype == torch.uint8
    assert made["label"].shape == (16,)
    assert not made["decoder"].status.any()


@pytest.mark.ffcv
@pytest.mark.slow
def test_an_import_leaves_pytorch_its_threads():
    code = "import torch; torch.set_num_threads(3); import pipeline.loaders.ffcv; print(torch.get_num_threads())"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["3"]


@pytest.mark.ffcv
def test_views_of_a_gpu_are_refused(config):
    with pytest.raises(UserError, match="--views-on gpu.*--loader fast"):
        make_loader(replace(config, views_on="gpu"))


def test_without_ffcv(config, monkeypatch):
    for name in ("ffcv", "ffcv_operation"):
        monkeypatch.delitem(sys.modules, f"pipeline.loaders.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "ffcv.fields.rgb_image", None)
    with pytest.raises(UserError, match=r"needs FFCV.*scripts/setup\.sh.*--loader fast"):
        make_loader(config)
