"""The fast and the resident loader where the GPU makes the views: the batches of the CPU, nothing lost in a failure.

Without a CUDA device the kernels run in Triton's interpreter, on small pictures.
"""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read where kernels are defined: before they are imported

from pipeline.convert import ConvertConfig
from pipeline.convert import main as convert
from pipeline.errors import UserError
from pipeline.loader import make_loader
from pipeline.spec import BARLOW_TWINS_VIEWS, CentreCrop, LoaderConfig, Squash
from pipeline.storage.beton import open_beton

pytestmark = pytest.mark.slow  # the interpreter
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def config(tmp_path_factory, imagenet_sample) -> LoaderConfig:
    """Twelve real pictures, shrunk for the interpreter: the steps of an epoch have a rest that is dropped."""
    folder = tmp_path_factory.mktemp("loader_gpu")
    for i, path in enumerate(imagenet_sample[:12]):
        target = folder / "images" / f"class_{i % 3}" / f"{i}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        image = Image.open(path).convert("RGB")
        image.resize((40 + 3 * i, 64 - 2 * i), Image.Resampling.BICUBIC).save(target, quality=90)
    convert(ConvertConfig(folder / "train.beton", folder / "images", workers=1))
    return LoaderConfig(folder / "train.beton", BARLOW_TWINS_VIEWS, 32, global_batch=5, seed=3, workers=2)


def batches(config: LoaderConfig, stop: int | None = 3) -> list:
    loader = make_loader(config)
    try:
        return list(loader.batches(0, stop))
    finally:
        loader.close()


@pytest.mark.parametrize(
    ("views", "backend"),
    [(BARLOW_TWINS_VIEWS, "fast"), (CentreCrop(36), "fast"), (BARLOW_TWINS_VIEWS, "resident")],
    ids=["two", "centre", "resident"],
)
def test_the_batches_of_the_cpu(config, views, backend):
    config = replace(config, views=views, shuffle=not isinstance(views, CentreCrop))
    stop = 3 if config.shuffle else None
    ours = batches(replace(config, device=DEVICE, views_on="gpu", backend=backend), stop)
    theirs = batches(replace(config, views_on="cpu"), stop)
    assert len(ours) == len(theirs) == 3
    for one, other in zip(ours, theirs, strict=True):
        assert (one.step, one.epoch) == (other.step, other.epoch)
        assert torch.equal(one.sample.cpu(), other.sample) and torch.equal(one.label.cpu(), other.label)
        for view, same in zip(one.views, other.views, strict=True):
            assert view.device.type == DEVICE and view.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(view.cpu(), same)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["fast", "resident"])
def test_who_makes_the_views_does_not_show(config, backend):
    """Views from the CPU, normalized on the GPU, are those of its own kernels."""
    config = replace(config, device="cuda", backend=backend)
    for one, other in zip(*(batches(replace(config, views_on=on)) for on in ("cpu", "gpu")), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.views, other.views, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["fast", "resident"])
def test_squashed_views_reach_the_gpu_from_the_cpu(config, backend):
    config = replace(config, views=Squash(36), shuffle=False)
    ours, theirs = batches(replace(config, device="cuda", backend=backend), None), batches(config, None)
    for one, other in zip(ours, theirs, strict=True):
        assert one.views[0].is_cuda and torch.equal(one.views[0].cpu(), other.views[0])


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["fast", "resident"])
def test_batches_keep_their_values_while_others_are_made(config, backend):
    """A batch in use is not overwritten by the next ones, which another stream makes."""
    loader = make_loader(replace(config, device="cuda", backend=backend))
    kept = [(batch, [view.clone() for view in batch.views]) for batch in loader.batches(0, 20)]
    torch.cuda.synchronize()
    for batch, copies in kept:
        assert all(torch.equal(view, copy) for view, copy in zip(batch.views, copies, strict=True))
    loader.close()


def test_a_damaged_image_is_named(config, tmp_path):
    for path in config.data.parent.glob("train.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    beton = open_beton(config.data)
    with open(tmp_path / "train.beton", "r+b") as file:
        file.seek(int(beton.offsets[4] + beton.sizes_bytes[4] // 2))
        file.write(bytes(int(beton.sizes_bytes[4] // 2)))
    with pytest.raises(UserError, match=beton.file_names()[4]):
        batches(replace(config, data=tmp_path / "train.beton", device=DEVICE, views_on="gpu", shuffle=False), None)


def test_stopping_early_and_closing(config):
    loader = make_loader(replace(config, device=DEVICE, views_on="gpu"))
    stream = loader.batches(0, 50)
    first = next(stream)
    stream.close()
    again = next(loader.batches(0, 1))
    assert np.array_equal(first.sample.cpu(), again.sample.cpu()) and torch.equal(first.views[0], again.views[0])
    loader.close()
