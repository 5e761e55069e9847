"""The loader that keeps the decoded images: the fast one's batches, bit for bit, and its own refusals."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.errors import UserError
from pipeline.loader import make_loader
from pipeline.loaders import resident as loader_resident
from pipeline.spec import BARLOW_TWINS_VIEWS, CentreCrop, LoaderConfig
from pipeline.storage.beton import open_beton


@pytest.fixture(scope="module")
def config(small_beton) -> LoaderConfig:
    return LoaderConfig(small_beton, BARLOW_TWINS_VIEWS, 64, global_batch=16, seed=5, workers=2, backend="resident")


def batches(config: LoaderConfig, start: int = 0, stop: int | None = 5) -> list:
    loader = make_loader(config)
    try:
        return list(loader.batches(start, stop))
    finally:
        loader.close()


def assert_equal(ours: list, theirs: list) -> None:
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        assert (one.step, one.epoch) == (other.step, other.epoch)
        assert torch.equal(one.sample, other.sample) and torch.equal(one.label, other.label)
        for view, same in zip(one.views, other.views, strict=True):
            assert view.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(view, same)


@pytest.mark.parametrize("start", [0, 4])
def test_the_batches_of_the_fast_loader(config, start, monkeypatch):
    monkeypatch.setattr(loader_resident, "CHUNK_BYTES", 3 << 20)  # many chunks, as a large dataset has
    assert_equal(batches(config, start, 7), batches(replace(config, backend="fast"), start, 7))


def test_ranks_share_the_batch_of_one(config):
    config = replace(config, resolutions=((0, 40), (1, 64)))
    ranks = [batches(replace(config, rank=r, world_size=2), 2, 4) for r in range(2)]
    for whole, *parts in zip(batches(config, 2, 4), *ranks, strict=True):
        assert torch.equal(whole.sample, torch.cat([p.sample for p in parts]))
        assert torch.equal(whole.views[1], torch.cat([p.views[1] for p in parts]))


def test_a_pass_over_some_samples_in_the_order_given(config):
    """Only these are held, each of them once."""
    config = replace(config, shuffle=False, views=CentreCrop(72), global_batch=2, ids=np.array([40, 3, 3, 17, 8]))
    ours = batches(config, 0, None)
    assert torch.cat([batch.sample for batch in ours]).tolist() == config.ids.tolist()
    assert_equal(ours, batches(replace(config, backend="fast"), 0, None))
    loader = make_loader(config)
    beton = open_beton(config.data)
    assert len(loader._pixels) == int((beton.heights * beton.widths)[[3, 8, 17, 40]].sum()) * 3
    loader.close()


@pytest.mark.parametrize("backend", ["resident", "fast"])
def test_the_resolution_may_change_with_the_epoch(config, backend):
    """An epoch's views are those of a run that has its resolution throughout: a start there needs no history."""
    config = replace(config, backend=backend)
    schedule = replace(config, resolution_px=72, resolutions=((0, 40), (1, 56), (3, 72)))
    mixed = batches(schedule, 0, 10)  # three steps an epoch
    assert [batch.views[0].shape[-1] for batch in mixed] == [40] * 3 + [56] * 6 + [72]
    assert_equal(mixed[2:3], batches(replace(config, resolution_px=40), 2, 3))
    assert_equal(mixed[3:5], batches(replace(config, resolution_px=56), 3, 5))
    assert_equal(mixed[8:], batches(schedule, 8, 10))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "dali"])
def test_every_backend_changes_the_resolution(config, backend):
    if backend == "dali":
        pytest.importorskip("nvidia.dali")
    schedule = replace(config, resolution_px=56, resolutions=((0, 40), (1, 56)), workers=1)
    assert_equal(batches(replace(schedule, backend=backend), 2, 4), batches(schedule, 2, 4))


def test_what_does_not_fit_is_refused(config, monkeypatch):
    beton = open_beton(config.data)
    needed = int((beton.heights * beton.widths).sum()) * 3
    monkeypatch.setattr(loader_resident, "free_bytes", lambda device: int(needed / loader_resident.SHARE) - 2)
    with pytest.raises(UserError, match=rf"needs {needed / 1e9:.2f} GB for 48 decoded images.*--loader fast"):
        make_loader(config)
    monkeypatch.setattr(loader_resident, "free_bytes", lambda device: int(needed / loader_resident.SHARE) + 2)
    make_loader(config).close()


def test_free_memory_is_this_machines():
    free = loader_resident.free_bytes(torch.device("cpu"))
    assert 1 << 20 < free < 1 << 50


def test_a_damaged_image_is_named_before_the_first_batch(config, tmp_path):
    for path in config.data.parent.glob("train.*"):
        shutil.copy(path, tmp_path / path.name)
    beton = open_beton(config.data)
    with open(tmp_path / "train.beton", "r+b") as file:
        file.seek(int(beton.offsets[11] + beton.sizes_bytes[11] // 2))
        file.write(bytes(int(beton.sizes_bytes[11] // 2)))
    with pytest.raises(UserError, match=beton.file_names()[11]):
        make_loader(replace(config, data=tmp_path / "train.beton"))
