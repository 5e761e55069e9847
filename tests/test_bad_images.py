"""Images that cannot be decoded or have changed: the same stand-ins on every backend and at any world size."""

import json
import os
import socket
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing
import torchvision.transforms.functional as F
from PIL import Image

from pipeline.choices.draws import draw_views
from pipeline.choices.order import shuffled_batches
from pipeline.choices.rng import words_array
from pipeline.convert import ConvertConfig
from pipeline.convert import convert as convert_source
from pipeline.convert import main as convert
from pipeline.errors import UserError
from pipeline.loader import make_loader
from pipeline.loaders.bad_images import BadImages
from pipeline.spec import BARLOW_TWINS_VIEWS, LoaderConfig
from pipeline.storage.beton import open_beton
from pipeline.storage.decode import NOT_A_JPEG, OK, STATUS_TEXT, UNDECODABLE, decode_status
from pipeline.storage.decode_pil import decode_pil
from pipeline.storage.digests import Digests
from pipeline.storage.shards import pack_shards
from pipeline.storage.sources.source import Source
from pipeline.views.reference import apply_view_pil
from tests.support import assert_same_batch
from train import runlog
from train.config import PretrainConfig
from train.distributed import Ranks, start_ranks, stop_ranks
from train.flags import resolved
from train.pretrain import train
from train.run_data import loader_config

IMAGES, CHANGED, BAD = 14, 6, (2, 3, 5, 6, 7, 11)  # the changed one can be decoded
SIDE = 32
STEPS = 12  # three epochs of four steps of three


@pytest.fixture(scope="module")
def data(tmp_path_factory, imagenet_sample) -> Path:
    """Small pictures; five are cut off inside the file, one has a changed bit that no decoder looks at."""
    folder = tmp_path_factory.mktemp("bad_images")
    for i, path in enumerate(imagenet_sample[:IMAGES]):
        target = folder / "images" / f"class_{i % 2}" / f"{i:02d}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        image = Image.open(path).convert("RGB")
        image.resize((40 + 2 * i, 64 - 2 * i), Image.Resampling.BICUBIC).save(target, quality=90)
    convert(ConvertConfig(folder / "train.beton", folder / "images", workers=1))
    beton = open_beton(folder / "train.beton")
    file = np.memmap(beton.path, np.uint8, "r+")
    for sample in {*BAD} - {CHANGED}:
        start, size = int(beton.offsets[sample]), int(beton.sizes_bytes[sample])
        file[start + size // 2 : start + size] = 0
    file[beton.offsets[CHANGED] + 15] ^= 1  # JFIF's pixel density
    file.flush()
    assert {s for s in range(IMAGES) if decode_status(beton, s) != OK} == {*BAD} - {CHANGED}
    return beton.path


@pytest.fixture(scope="module")
def config(data) -> LoaderConfig:
    return LoaderConfig(data, BARLOW_TWINS_VIEWS, SIDE, global_batch=3, seed=4, workers=1, on_bad_image="substitute")


def batches(config: LoaderConfig, stop: int = STEPS) -> list:
    loader = make_loader(config)
    try:
        return list(loader.batches(0, stop))
    finally:
        loader.close()


@pytest.fixture(scope="module")
def ours(config) -> list:
    return batches(config)


def expected_stand_in(seed: int, epoch: int, sample: int) -> tuple[int, int]:
    """Written from the module's docstring: the first draw that can be decoded, and how many draws that took."""
    for attempt in range(1000):
        word = int(words_array(seed, 4, epoch, np.array([sample]), 0, attempt)[0, 0])
        if (chosen := int(word / 2**32 * IMAGES)) not in BAD:
            return chosen, attempt + 1
    raise AssertionError


def test_each_bad_image_has_its_stand_in(config, ours, data):
    """Sample, label, count, and the very pixels that the stand-in has with its own draws."""
    beton, tries = open_beton(data), []
    for batch, (step, epoch, wanted) in zip(
        ours, shuffled_batches(config.seed, np.arange(IMAGES), 3, 0, 1, 0, STEPS), strict=True
    ):
        assert (batch.step, batch.epoch) == (step, epoch)
        assert batch.substituted == len(set(wanted) & set(BAD))
        for b, sample in enumerate(wanted.tolist()):
            if sample in BAD:
                sample, count = expected_stand_in(config.seed, epoch, sample)
                tries.append(count)
            assert (int(batch.sample[b]), int(batch.label[b])) == (sample, beton.labels[sample])
            one = np.array([sample])
            params = draw_views(config.seed, epoch, one, beton.heights[one], beton.widths[one], config.views, SIDE)
            view = F.to_tensor(apply_view_pil(decode_pil(beton, sample), params, 0, 1, "bicubic", SIDE))
            view = F.normalize(view, config.normalization.mean, config.normalization.std)
            assert torch.equal(batch.views[1][b], view)
    assert len(tries) > 5 and max(tries) > 1


BACKENDS = ["fast", "resident", "torch", "dali", pytest.param("ffcv", marks=pytest.mark.ffcv)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_changed_image_is_named_or_taken_as_it_is(config, data, backend):
    """JPEGs that decode as well as before; without the check they are what they are."""
    if backend == "dali":
        pytest.importorskip("nvidia.dali")
    sound = np.array([s for s in range(IMAGES) if s not in BAD or s == CHANGED])
    config = replace(config, backend=backend, ids=sound, on_bad_image="stop")
    name = open_beton(data).file_names()[CHANGED]
    with pytest.raises(UserError, match=rf"{name}\) cannot be used: its bytes are no longer those of the conversion"):
        batches(config)
    assert CHANGED in torch.cat([batch.sample for batch in batches(replace(config, check_bytes=False))])


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b not in ("torch", "dali")])
def test_every_flipped_bit_of_raw_pixels_is_noticed(tmp_path, backend):
    """No decoder could."""
    rng = np.random.default_rng(0)
    pixels, names = rng.integers(0, 256, (5, 32, 32, 3), np.uint8), [f"image {i}" for i in range(5)]
    source = Source("cifar-10", "train", ["a", "b"], names, np.arange(5) % 2, tmp_path, pixels=pixels)
    convert_source(source, tmp_path / "train.beton", ConvertConfig(tmp_path / "train.beton"))
    beton, file = open_beton(tmp_path / "train.beton"), np.memmap(tmp_path / "train.beton", np.uint8, "r+")
    config = LoaderConfig(beton.path, BARLOW_TWINS_VIEWS, SIDE, 5, workers=1, backend=backend)
    batches(config, 1)
    for _ in range(20 if backend in ("fast", "resident") else 1):
        sample, bit = int(rng.integers(0, 5)), 1 << int(rng.integers(0, 8))
        at = int(beton.offsets[sample] + rng.integers(0, 32 * 32 * 3))
        file[at] ^= bit
        with pytest.raises(UserError, match=rf"{names[sample]}\) cannot be used: its bytes"):
            batches(config, 1)
        file[at] ^= bit


def test_bytes_are_hashed_at_their_first_use_only(config, monkeypatch):
    asked, match = [], Digests.match
    monkeypatch.setattr(Digests, "match", lambda self, sample: asked.append(sample) or match(self, sample))
    batches(replace(config, ids=np.array([0, 1, 4, 8])), 5)
    assert sorted(asked) == [0, 1, 4, 8]


def test_the_list_of_digests_has_to_be_there(config, tmp_path):
    for name in ("train.beton", "train.manifest.json"):
        (tmp_path / name).symlink_to(config.data.parent / name)
    with pytest.raises(
        UserError, match=r"train\.files\.tsv is missing; .* copy it too, or convert again; .*--no-check-bytes"
    ):
        make_loader(replace(config, data=tmp_path / "train.beton"))
    make_loader(replace(config, data=tmp_path / "train.beton", check_bytes=False)).close()


@pytest.mark.slow
@pytest.mark.parametrize("change", [{"views_on": "gpu"}, {"backend": "torch"}, {"backend": "dali"}, {"workers": 3}])
def test_every_backend_has_the_same_batches(config, ours, change):
    if change.get("backend") == "dali":
        pytest.importorskip("nvidia.dali")
    stop = 1 if "views_on" in change else STEPS  # Triton's interpreter is slow
    assert ours[0].substituted
    for one, other in zip(batches(replace(config, **change), stop), ours[:stop], strict=True):
        assert_same_batch(one, other)


def test_shards_have_them_too(config, ours, tmp_path):
    pytest.importorskip("nvidia.dali")
    for path in config.data.parent.glob("train.*"):
        (tmp_path / path.name).symlink_to(path)
    shards = pack_shards(open_beton(tmp_path / "train.beton"), 5)
    for one, other in zip(batches(replace(config, data=shards, backend="dali"), 4), ours[:4], strict=True):
        assert_same_batch(one, other)


def test_ranks_and_a_later_start_change_nothing(config, ours):
    ranks = [batches(replace(config, rank=r, world_size=3)) for r in range(3)]
    for whole, parts in zip(ours, zip(*ranks, strict=True), strict=True):
        assert torch.equal(whole.sample, torch.cat([part.sample for part in parts]))
        assert torch.equal(whole.views[0], torch.cat([part.views[0] for part in parts]))
        assert whole.substituted == sum(part.substituted for part in parts)
    loader = make_loader(config)
    for one, other in zip(loader.batches(5, STEPS), ours[5:], strict=True):
        assert_same_batch(one, other)
    for one, other in zip(loader.batches(0, STEPS), ours, strict=True):  # now that it knows the bad ones
        assert_same_batch(one, other)
    loader.close()


def test_stand_ins_come_from_the_samples_in_use(config):
    ids = np.array([0, 2, 4, 7, 9, 11])
    for batch in batches(replace(config, ids=ids)):
        assert set(batch.sample.tolist()) <= {0, 4, 9}


def test_a_file_of_bad_images_ends_the_run(config):
    with pytest.raises(UserError, match="100 images .* in a row cannot be used"):
        batches(replace(config, ids=np.array(BAD)))


@pytest.mark.parametrize("status", [NOT_A_JPEG, UNDECODABLE])
def test_short_memory_makes_no_image_bad(config, data, status):
    """libjpeg-turbo answers so, too, where it gets no memory: a sound image is then not replaced in silence."""
    bad = BadImages(config, open_beton(data), np.arange(IMAGES))
    sound = next(s for s in range(IMAGES) if s not in BAD)
    with pytest.raises(UserError, match="memory was short"):
        bad.note(sound, STATUS_TEXT[status])
    bad.note(BAD[0], STATUS_TEXT[status])
    assert bad.found == {BAD[0]}


def test_each_is_told_once(config, capsys):
    batches(config)
    told = capsys.readouterr().err.splitlines()
    assert sorted(int(line.split()[2]) for line in told) == list(BAD)
    assert all("class_" in line and "stand in" in line for line in told)


def run(folder: Path, data: Path, ranks: Ranks) -> None:
    config = PretrainConfig(
        data=data, run=str(folder), arch="test_resnet", projector="16-16", resolution=SIDE, global_batch=4, epochs=3,
        warmup_epochs=0, amp="off", workers=1, log_every=2, on_bad_image="substitute",
    )  # fmt: skip
    config = resolved(config)
    loader = make_loader(loader_config(config, ranks))
    assert train(config, ranks, loader) == 0
    loader.close()


def run_rank(rank: int, world_size: int, port: int, folder: Path, data: Path) -> None:
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    runlog.RUNS = folder
    ranks = start_ranks()
    run(folder / "w2", data, ranks)
    stop_ranks()


@pytest.mark.slow
def test_the_count_over_ranks_is_in_the_metrics(data, tmp_path, monkeypatch, training_forkserver):
    monkeypatch.setattr(runlog, "RUNS", tmp_path)
    run(tmp_path / "w1", data, Ranks(0, 1, torch.device("cpu"), None))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        arguments = (2, free.getsockname()[1], tmp_path, data)
    torch.multiprocessing.start_processes(run_rank, arguments, nprocs=2, start_method="forkserver")
    counts = [0] * 5  # nine steps, a line every two
    for step, _, wanted in shuffled_batches(0, np.arange(IMAGES), 4, 0, 1, 0, 9):
        counts[step // 2] += len(set(wanted) & set(BAD))
    assert min(counts) > 0
    for name in ("w1", "w2"):
        lines = [json.loads(text) for text in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        assert [line["substituted_images"] for line in lines] == counts
