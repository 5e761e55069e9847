"""The DALI loader's CPU graph against the fast loader and the reference: one stream, whatever decodes."""

import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed: bash scripts/setup.sh --dali")

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read where kernels are defined: before they are imported

from pipeline.convert import ConvertConfig
from pipeline.convert import convert as convert_source
from pipeline.convert import main as convert
from pipeline.errors import UserError
from pipeline.loader import make_loader
from pipeline.loaders.dali import make_graph
from pipeline.spec import BARLOW_TWINS_VIEWS, SUPERVISED_VIEW, CentreCrop, LoaderConfig, Squash
from pipeline.storage.beton import MODE_JPEG, jpeg_bytes, open_beton
from pipeline.storage.decode import OK, decode_rgb, free_handle, make_handle
from pipeline.storage.shards import pack_shards
from pipeline.storage.sources.open import Source
from tests.support import assert_same_batch

RESOLUTION = 64


@pytest.fixture(scope="module")
def config(small_beton) -> LoaderConfig:
    return LoaderConfig(small_beton, BARLOW_TWINS_VIEWS, RESOLUTION, global_batch=16, seed=5, workers=2, backend="dali")


def _all(config: LoaderConfig, start: int = 0, stop: int | None = 4) -> list:
    loader = make_loader(config)
    try:
        return list(loader.batches(start, stop))
    finally:
        loader.close()


@pytest.mark.slow
def test_decoded_pixels_are_those_of_the_fast_loader(imagenet_sample, tmp_path):
    """All 500 real JPEGs, greyscale and CMYK ones among them, as the converter stores them at any size."""
    for path in imagenet_sample:
        target = tmp_path / "images" / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(path)
    convert(ConvertConfig(tmp_path / "train.beton", tmp_path / "images", max_side=10_000))
    beton, handle, seen = open_beton(tmp_path / "train.beton"), make_handle(), 0
    batches = np.array_split(np.arange(len(beton)), 10)
    graph = make_graph(([jpeg_bytes(beton, sample) for sample in ids] for ids in batches), 50, 2, None)
    for ids in batches:
        (images,) = graph.run()
        for sample, image in zip(ids, images, strict=True):
            height, width, jpeg = int(beton.heights[sample]), int(beton.widths[sample]), jpeg_bytes(beton, sample)
            out = np.empty((height, width, 3), np.uint8)
            assert decode_rgb(handle, jpeg, 0, len(jpeg), MODE_JPEG, height, width, out.reshape(-1)) == OK
            assert np.array_equal(np.array(image), out), beton.file_names()[sample]
            seen += 1
    free_handle(handle)
    assert seen == 500


@pytest.mark.parametrize(
    "views",
    [BARLOW_TWINS_VIEWS, (SUPERVISED_VIEW,), CentreCrop(72), Squash(72)],
    ids=["two", "one", "centre", "squash"],
)
def test_the_batches_of_the_fast_loader(config, views):
    config = replace(config, views=views, shuffle=not isinstance(views, CentreCrop))
    ours, theirs = _all(config), _all(replace(config, backend="fast"))
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        assert_same_batch(one, other)


@pytest.mark.slow
def test_the_batches_of_the_reference(config):
    for one, other in zip(_all(config, 2, 4), _all(replace(config, backend="torch", workers=1), 2, 4), strict=True):
        assert_same_batch(one, other)


def test_a_run_that_changes_its_loader_goes_on_with_the_same_batches(config):
    """Three steps with one, the rest with the other, across the end of an epoch: both ways."""
    for first, second in (("fast", "dali"), ("dali", "fast")):
        mixed = _all(replace(config, backend=first), 0, 2) + _all(replace(config, backend=second), 2, 5)
        for one, other in zip(mixed, _all(replace(config, backend="fast"), 0, 5), strict=True):
            assert_same_batch(one, other)


def test_ranks_share_the_batch_of_one(config):
    ranks = [_all(replace(config, rank=r, world_size=2, workers=1), 0, 2) for r in range(2)]
    for whole, parts in zip(_all(config, 0, 2), zip(*ranks, strict=True), strict=True):
        assert torch.equal(whole.sample, torch.cat([p.sample for p in parts]))
        for v in range(2):
            assert torch.equal(whole.views[v], torch.cat([p.views[v] for p in parts]))


def test_a_short_last_batch_and_a_rank_without_any_of_it(config):
    ids = np.array([40, 3, 3, 17, 8])
    config = replace(config, shuffle=False, views=CentreCrop(72), global_batch=4, ids=ids, world_size=2)
    ranks = [_all(replace(config, rank=r), 0, None) for r in range(2)]
    assert [b.sample.tolist() for b in ranks[0]] == [[40, 3], [8]]
    assert [b.sample.tolist() for b in ranks[1]] == [[3, 17], []]
    assert ranks[1][1].views[0].shape == (0, 3, RESOLUTION, RESOLUTION)


def test_stopping_early_leaves_a_usable_loader(config):
    loader = make_loader(config)
    stream = loader.batches(0, 50)
    first = next(stream)
    stream.close()
    for _ in range(2):
        assert_same_batch(next(loader.batches(0, 1)), first)
    abandoned = loader.batches(0, 50)
    next(abandoned)
    loader.close()
    abandoned.close()  # as the trainer does it: the loader first


@pytest.mark.slow
def test_the_graph_before_the_gpus_kernels(config, tmp_path, imagenet_sample):
    """The path that a GPU takes after the decoder, in Triton's interpreter, on small pictures."""
    for i, path in enumerate(imagenet_sample[:4]):
        target = tmp_path / "images" / f"class_{i % 2}" / f"{i}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).convert("RGB").resize((40 + 3 * i, 64 - 2 * i)).save(target, quality=90)
    convert(ConvertConfig(tmp_path / "train.beton", tmp_path / "images", workers=1))
    config = replace(config, data=tmp_path / "train.beton", resolution_px=32, global_batch=2)
    for one, other in zip(*(_all(replace(config, views_on=on), 0, 2) for on in ("gpu", "cpu")), strict=True):
        assert_same_batch(one, other)


def _damaged_copy(config, folder, sample, change):
    for path in config.data.parent.glob("train.*"):
        shutil.copy(path, folder / path.name)
    beton = open_beton(config.data)
    with open(folder / "train.beton", "r+b") as file:
        file.seek(int(beton.offsets[sample]))
        data = bytearray(file.read(int(beton.sizes_bytes[sample])))
        change(data)
        file.seek(int(beton.offsets[sample]))
        file.write(data)
    return beton.file_names()[sample]


def _cut(data):
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)


def _one_bit(data):
    data[len(data) // 2] ^= 4


@pytest.mark.parametrize("change", [_cut, _one_bit])
def test_changed_bytes_are_named(config, tmp_path, change):
    name = _damaged_copy(config, tmp_path, 11, change)
    with pytest.raises(UserError, match=f"{name}.*bytes are no longer those of the conversion"):
        _all(replace(config, data=tmp_path / "train.beton"), 0, 3)


def test_what_the_decoder_refuses_is_named(config, monkeypatch):
    """Bytes that were stored broken: the loader is handed half of one image."""
    from pipeline.loaders import dali as loader_dali
    from pipeline.storage import decode

    def half_of_11(stored, sample):
        whole = jpeg_bytes(stored, sample)
        return whole[: len(whole) // 2] if sample == 11 else whole

    monkeypatch.setattr(decode, "jpeg_bytes", half_of_11)
    monkeypatch.setattr(loader_dali, "jpeg_bytes", half_of_11)
    with pytest.raises(UserError, match=f"{open_beton(config.data).file_names()[11]}.*damaged or cut off"):
        _all(config, 0, 3)


def test_another_size_than_the_table_says_is_named(config):
    loader = make_loader(config)
    loader.sizes[0][11] -= 1
    with pytest.raises(UserError, match=f"{loader.dataset.file_names()[11]}.*another size"):
        list(loader.batches(0, 3))
    loader.close()


def test_shards_give_the_batches_of_their_beton(config, tmp_path):
    for path in config.data.parent.glob("train.*"):
        (tmp_path / path.name).symlink_to(path)
    shards = pack_shards(open_beton(tmp_path / "train.beton"), 10)
    for one, other in zip(_all(replace(config, data=shards)), _all(config), strict=True):
        assert_same_batch(one, other)
    with pytest.raises(UserError, match="--loader dali"):
        make_loader(replace(config, data=shards, backend="fast"))


def test_user_errors(config, tmp_path):
    with pytest.raises(UserError, match="missing"):
        make_loader(replace(config, data=tmp_path / "none.beton"))
    with pytest.raises(UserError, match="larger than the dataset"):
        make_loader(replace(config, global_batch=64))
    with pytest.raises(UserError, match="not divisible"):
        make_loader(replace(config, world_size=3))
    names, pixels = ["0", "1", "2", "3"], np.zeros((4, 8, 8, 3), np.uint8)
    source = Source("cifar-10", "train", ["a", "b"], names, np.arange(4) % 2, tmp_path, pixels=pixels)
    convert_source(source, tmp_path / "raw.beton", ConvertConfig(tmp_path / "raw.beton"))
    with pytest.raises(UserError, match="raw pixels"):
        make_loader(replace(config, data=tmp_path / "raw.beton", global_batch=2))
