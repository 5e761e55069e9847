"""The fast loader against the PIL/torchvision reference, and its own promises."""

import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.errors import UserError
from pipeline.loader import make_loader
from pipeline.spec import BARLOW_TWINS_VIEWS, SUPERVISED_VIEW, CentreCrop, LoaderConfig, Normalization, Squash
from pipeline.storage.beton import open_beton
from tests.support import assert_same_batch

RESOLUTION = 64
IDENTITY = Normalization((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))  # pixels come out as v / 255


@pytest.fixture(scope="module")
def config(small_beton) -> LoaderConfig:
    return LoaderConfig(small_beton, BARLOW_TWINS_VIEWS, RESOLUTION, global_batch=16, seed=5, workers=2)


def _all(config: LoaderConfig, start: int = 0, stop: int | None = 7) -> list:
    loader = make_loader(config)
    batches = list(loader.batches(start, stop))
    loader.close()
    return batches


def test_shapes_and_layout(config):
    batch = _all(config, 0, 1)[0]
    assert len(batch.views) == 2
    for view in batch.views:
        assert view.shape == (16, 3, RESOLUTION, RESOLUTION)
        assert view.dtype == torch.float32
        assert view.is_contiguous(memory_format=torch.channels_last)
    assert not torch.equal(*batch.views)
    assert torch.equal(batch.label, torch.from_numpy(open_beton(config.data).labels)[batch.sample])


@pytest.mark.slow
@pytest.mark.parametrize(
    "views",
    [BARLOW_TWINS_VIEWS, (SUPERVISED_VIEW,), CentreCrop(72), Squash(72)],
    ids=["two", "one", "centre", "squash"],
)
def test_the_same_batches_as_the_reference(config, views):
    """Same samples, order, labels, and the very same pixels: decoder and kernels are Pillow's, bit for bit."""
    config = replace(config, views=views, shuffle=not isinstance(views, CentreCrop), workers=1)
    fast, reference = _all(config, 0, 4), _all(replace(config, backend="torch"), 0, 4)
    assert len(fast) == len(reference) > 0
    for one, other in zip(fast, reference, strict=True):
        assert_same_batch(one, other)


def test_normalization_is_torchvisions(config):
    import torchvision.transforms.functional as F

    plain, normalized = _all(replace(config, normalization=IDENTITY), 0, 1)[0], _all(config, 0, 1)[0]
    c = config.normalization
    for view, got in zip(plain.views, normalized.views, strict=True):
        pixels = (view * 255).round() / 255
        assert torch.allclose(F.normalize(pixels, c.mean, c.std), got, atol=1e-6)


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(config, workers):
    for one, other in zip(_all(config), _all(replace(config, workers=workers)), strict=True):
        assert_same_batch(one, other)


def test_a_start_anywhere_gives_the_same_batches(config):
    whole = _all(config)
    for start in (1, 3, 5):
        for one, other in zip(whole[start:], _all(config, start), strict=True):
            assert_same_batch(one, other)


def test_ranks_share_the_batch_of_one(config):
    ranks = [_all(replace(config, rank=r, world_size=2), 0, 4) for r in range(2)]
    for whole, parts in zip(_all(config, 0, 4), zip(*ranks, strict=True), strict=True):
        assert torch.equal(whole.sample, torch.cat([p.sample for p in parts]))
        for v in range(2):
            assert torch.equal(whole.views[v], torch.cat([p.views[v] for p in parts]))


def test_views_change_with_epoch_and_seed_only_for_the_same_sample(config):
    def views_of(sample, batches):
        return {b.epoch: b.views[0][int((b.sample == sample).nonzero()[0])] for b in batches if sample in b.sample}

    three = views_of(7, _all(config, 0, 6))
    assert set(three) == {0, 1}
    assert not torch.equal(three[0], three[1])
    other_batch = views_of(7, _all(replace(config, global_batch=8), 0, 6))
    assert torch.equal(three[0], other_batch[0])
    assert not torch.equal(three[0], views_of(7, _all(replace(config, seed=6), 0, 3))[0])


def test_one_pass_in_order_with_a_short_last_batch(config):
    ids = np.array([40, 3, 3, 17, 8])
    batches = _all(replace(config, shuffle=False, views=CentreCrop(72), global_batch=2, ids=ids), 0, None)
    assert torch.cat([b.sample for b in batches]).tolist() == ids.tolist()
    assert [len(b.sample) for b in batches] == [2, 2, 1]


def test_stopping_early_leaves_a_usable_loader(config):
    loader = make_loader(config)
    for batch in loader.batches(0, 50):
        if batch.step == 2:
            break
    again = next(loader.batches(0, 1))
    assert_same_batch(again, _all(config, 0, 1)[0])
    loader.close()


def test_a_damaged_image_is_named(config, tmp_path):
    for path in config.data.parent.glob("train.*"):
        shutil.copy(path, tmp_path / path.name)
    beton = open_beton(config.data)
    sample = 11
    with open(tmp_path / "train.beton", "r+b") as file:
        file.seek(int(beton.offsets[sample] + beton.sizes_bytes[sample] // 2))
        file.write(bytes(int(beton.sizes_bytes[sample] // 2)))
    loader = make_loader(replace(config, data=tmp_path / "train.beton"))
    with pytest.raises(UserError, match=beton.file_names()[sample]):
        list(loader.batches(0, 3))
    loader.close()


def test_user_errors(config, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="missing"):
        make_loader(replace(config, data=tmp_path / "none.beton"))
    with pytest.raises(UserError, match="larger than the dataset"):
        make_loader(replace(config, global_batch=64))
    with pytest.raises(UserError, match="not divisible"):
        make_loader(replace(config, world_size=3))
    with pytest.raises(UserError, match="choose fast, ffcv, resident, torch or dali"):
        make_loader(replace(config, backend="pil"))
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(UserError, match="setup.sh --dali"):
        make_loader(replace(config, backend="dali"))
