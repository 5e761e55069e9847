"""Features of a frozen encoder: equal to plain torch on the pixels, and to themselves when read back."""

import hashlib
import json
import os
import shutil
import threading

import numpy as np
import pytest
import safetensors.torch
import torch
from torchvision.transforms import Compose, Normalize, Resize, ToTensor

from eval import extract
from eval import features as features_module
from eval.extract import ExtractConfig
from eval.features import (
    FeatureSet,
    centre_loader_config,
    centre_view,
    extract_features,
    open_encoder,
)
from eval.frozen import stage_encoder
from eval.kept import FEATURES_VERSION, find_features, keep_features, read_features
from eval.subject import open_subject
from pipeline.disk import write_whole
from pipeline.errors import UserError
from pipeline.storage.beton import open_beton
from pipeline.storage.decode_pil import decode_pil
from tests.evaluation import NORMALIZATION, coloured_images, write_run
from tests.mutants import mutants, outcome
from train.content import write_state


@pytest.fixture(scope="module")
def val(data):
    return open_beton(data / "val.beton")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory, data):
    return open_encoder(write_run(tmp_path_factory.mktemp("run"), data))


def normalized_pixels(labels: np.ndarray) -> torch.Tensor:
    """(N, 3, 32, 32) from the arrays that the dataset was made of."""
    pixels = coloured_images(2, labels, 5).transpose(0, 3, 1, 2) / 255
    mean, std = (np.array(x).reshape(1, 3, 1, 1) for x in (NORMALIZATION.mean, NORMALIZATION.std))
    return torch.from_numpy((pixels - mean) / std).float()


def no_extraction(*_):
    raise AssertionError("the encoder ran although its features were kept")


def test_features_are_the_encoders_output_on_the_pixels(encoder, val, tmp_path):
    with torch.no_grad():
        expected = encoder.module(normalized_pixels(val.labels))
    found = FeatureSet(encoder, val, tmp_path).read()
    assert found.shape == (60, 96)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_rows_follow_the_ids(encoder, val, tmp_path):
    everything = FeatureSet(encoder, val, tmp_path).read()
    ids = np.array([7, 3, 50, 4])
    assert torch.allclose(FeatureSet(encoder, val, tmp_path, ids).read(), everything[ids], atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kept_features_equal_fresh_ones_bit_for_bit(encoder, val, tmp_path, monkeypatch, dtype):
    first = FeatureSet(encoder, val, tmp_path, dtype=dtype).read()
    fresh = extract_features(encoder, centre_loader_config(encoder, val.path, None, "fast", 1), dtype)
    monkeypatch.setattr(features_module, "extract_features", no_extraction)
    kept = FeatureSet(encoder, val, tmp_path, dtype=dtype).read()
    assert kept.dtype == first.dtype == dtype
    assert torch.equal(kept, first) and torch.equal(kept, fresh)


# ---- parts: resumed, and shared among ranks ----


@pytest.fixture
def in_parts(monkeypatch) -> list[int]:
    """Parts of one batch of 16; the list gets the images of each extraction."""
    monkeypatch.setattr(features_module, "extract_batch", lambda _: 16)
    monkeypatch.setattr(features_module, "PART_BATCHES", 1)
    sizes, extract = [], extract_features

    def counted(encoder, config, dtype):
        sizes.append(len(config.ids))
        return extract(encoder, config, dtype)

    monkeypatch.setattr(features_module, "extract_features", counted)
    return sizes


def test_parts_do_not_change_a_bit(encoder, val, tmp_path, in_parts):
    found = FeatureSet(encoder, val, tmp_path).read()
    assert in_parts == [16, 16, 16, 12]
    whole = extract_features(encoder, centre_loader_config(encoder, val.path, None, "fast", 1), torch.float32)
    assert torch.equal(found, whole)
    assert len(list(tmp_path.iterdir())) == 1, "no part stays behind"


def test_an_interrupted_extraction_goes_on(encoder, val, tmp_path, in_parts, monkeypatch, capsys):
    expected = FeatureSet(encoder, val, tmp_path / "whole").read()
    in_parts.clear()
    counted = features_module.extract_features

    def interrupted(*args):
        if len(in_parts) == 2:
            raise KeyboardInterrupt
        return counted(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(features_module, "extract_features", interrupted)
        FeatureSet(encoder, val, tmp_path / "kept").read()
    parts = sorted((tmp_path / "kept").iterdir())
    assert len(parts) == 2
    parts[0].write_bytes(parts[0].read_bytes()[:100])
    in_parts.clear()
    assert torch.equal(FeatureSet(encoder, val, tmp_path / "kept").read(), expected)
    assert in_parts == [16, 16, 12], "the damaged part and the missing ones"
    assert "is damaged" in capsys.readouterr().err


def test_ranks_share_the_parts(encoder, val, data, in_parts, monkeypatch, tmp_path):
    run = write_run(tmp_path / "run", data)
    monkeypatch.setenv("WORLD_SIZE", "2")
    made = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        extract.main(ExtractConfig(checkpoint=run, fraction=0.16))  # 30 of train: two parts; 60 of val: four
        made.append(sorted(in_parts))
        in_parts.clear()
    assert made == [[16, 16, 16], [12, 14, 16]]
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(UserError, match="WORLD_SIZE is 'two'; expected a whole number"):
        extract.main(ExtractConfig(checkpoint=run))
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    subject = open_subject(ExtractConfig(checkpoint=run, fraction=0.16))
    subject.val_features(), subject.train_features()
    assert in_parts == [], "every part was there"
    extract.main(ExtractConfig(checkpoint=run, fraction=0.1))
    assert sorted(in_parts) == [4, 16], "alone it keeps the whole"


def test_half_precision_is_the_rounding_of_full(encoder, val, tmp_path):
    full = FeatureSet(encoder, val, tmp_path).read()
    assert torch.equal(FeatureSet(encoder, val, tmp_path, dtype=torch.float16).read(), full.half())


def test_another_checkpoint_never_gets_these_features(encoder, val, data, tmp_path):
    FeatureSet(encoder, val, tmp_path / "kept").read()
    other = open_encoder(write_run(tmp_path / "other", data, seed=1))
    found = FeatureSet(other, val, tmp_path / "kept").read()
    assert torch.equal(found, FeatureSet(other, val, tmp_path / "nothing kept").read())
    assert not torch.allclose(found, FeatureSet(encoder, val, tmp_path / "kept").read())
    assert len(list((tmp_path / "kept").iterdir())) == 2


def test_everything_that_decides_the_numbers_is_in_the_description(encoder, val, data, tmp_path):
    def describe(encoder=encoder, beton=val, ids=None, backend="fast", dtype=torch.float32, squash=False):
        return FeatureSet(encoder, beton, tmp_path, ids, backend, 1, dtype, squash).description

    other_run = open_encoder(write_run(tmp_path, data, seed=1))
    others = [
        describe(encoder=other_run),
        describe(beton=open_beton(data / "train.beton")),
        describe(ids=np.arange(5)),
        describe(ids=np.arange(5)[::-1]),
        describe(backend="torch"),
        describe(dtype=torch.float16),
        describe(encoder=stage_encoder(encoder, "feature5")),
        describe(encoder=stage_encoder(encoder, "feature4")),
        describe(squash=True),
    ]
    assert len({describe(), *others}) == 10
    assert describe() == describe()
    older = json.loads(describe())["loader"]
    assert older == "ffcv" and describe(backend="ffcv") == describe(), "features that older runs kept are found again"


def test_stages_of_squashed_images(data, small_beton, tmp_path):
    """torchvision's two resizes of the decoded pictures, the network's parts one by one, torch's pooling."""
    encoder, beton = open_encoder(write_run(tmp_path / "run", data), resolution_px=64), open_beton(small_beton)
    ids, net = np.array([5, 0, 30, 17]), encoder.module
    squash = Compose([Resize(73), Resize([64, 64]), ToTensor(), Normalize(NORMALIZATION.mean, NORMALIZATION.std)])
    images = torch.stack([squash(decode_pil(beton, int(i))) for i in ids])
    with torch.no_grad():
        x = net.layer3(net.layer2(net.layer1(net.maxpool(net.act1(net.bn1(net.conv1(images)))))))
        expected = torch.nn.functional.adaptive_avg_pool2d(net.layer4(x), 2).flatten(1)
    kept, at_stage = tmp_path / "kept", stage_encoder(encoder, "feature5")
    found = FeatureSet(at_stage, beton, kept, ids, squash=True).read()
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, FeatureSet(at_stage, beton, kept, ids).read(), atol=1e-3), "centre crops"
    assert find_features(kept) is None, "neither is the network's own output on centre crops"
    assert FeatureSet(encoder, beton, kept, ids, squash=True).read().shape == (4, 96)
    assert find_features(kept) is None
    assert torch.equal(find_features(kept, stage="feature5", squash=True), found)
    usual = FeatureSet(encoder, beton, kept, ids).read()
    assert torch.equal(find_features(kept), usual)


def test_a_file_with_another_description_is_refused(tmp_path):
    path = tmp_path / "kept.safetensors"
    keep_features(path, "checkpoint one", torch.rand(3, 2))
    with pytest.raises(UserError, match=r"kept\.safetensors holds features of another checkpoint.*delete it"):
        read_features(path, "checkpoint two")


def test_a_file_without_a_digest_counts_as_damaged(tmp_path, capsys):
    """Such as one from before there were digests."""
    about = {"description": "checkpoint one"}
    safetensors.torch.save_file({"features": torch.rand(3, 2)}, tmp_path / "kept.safetensors", about)
    assert read_features(tmp_path / "kept.safetensors", "checkpoint one") is None
    assert "is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_changed_bit_is_noticed(tmp_path, dtype):
    """What is read is None or what was written, bit for bit; never a file of something else, and no other error."""
    path, about = tmp_path / "kept.safetensors", {"version": FEATURES_VERSION, "dtype": "float32", "loader": "ffcv"}
    description = json.dumps(about)
    features = torch.rand(64, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    keep_features(path, description, features)
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    head = 8 + int.from_bytes(whole[:8], "little")
    places = [*range(0, head, 3), *random.integers(head, len(whole), 100)]
    damaged = [whole[:at] + bytes([whole[at] ^ 1 << random.integers(8)]) + whole[at + 1 :] for at in places]
    damaged += [whole[:-1], *mutants(whole, 0)]
    noticed = 0
    for number, changed in enumerate(damaged):
        path.write_bytes(changed)
        found = outcome(lambda: (read_features(path, description), find_features(tmp_path)))
        assert all(f is None or torch.equal(f, features) for f in found), number
        noticed += found == (None, None)
    assert noticed > 0.95 * len(damaged), "padding and some of JSON's spaces do not count"
    path.write_bytes(whole)
    assert torch.equal(read_features(path, description), features) and torch.equal(find_features(tmp_path), features)


def test_damaged_features_are_extracted_again(encoder, val, tmp_path, capsys):
    """One bit of one value: it was read before, and changed every number that came of it."""
    first = FeatureSet(encoder, val, tmp_path).read()
    (path,) = tmp_path.iterdir()
    whole = bytearray(path.read_bytes())
    whole[-7] ^= 0x40
    path.write_bytes(whole)
    assert torch.equal(FeatureSet(encoder, val, tmp_path).read(), first)
    assert "is damaged" in capsys.readouterr().err


def test_weights_and_digest_are_of_one_file(data, tmp_path):
    """A training replaces its checkpoint all the time, in the way the trainer does."""
    known, states = {}, []
    for seed in (0, 1):
        path = write_run(tmp_path / str(seed), data, seed=seed) / "checkpoint.pt"
        states.append(path.read_bytes())
        known[hashlib.sha256(states[-1]).hexdigest()] = torch.load(path, weights_only=True)["model"]
    run, ended = tmp_path / "run", threading.Event()
    run.mkdir()
    write_whole(run / "checkpoint.pt", states[0])

    def train():
        while not ended.is_set():
            for state in states:
                write_whole(run / "checkpoint.pt", state)

    training = threading.Thread(target=train)
    training.start()
    try:
        opened = [open_encoder(run) for _ in range(30)]
    finally:
        ended.set()
        training.join()
    assert {encoder.info.sha256 for encoder in opened} == known.keys(), "the case decides nothing"
    for encoder in opened:
        weights = known[encoder.info.sha256]
        assert all(torch.equal(w, weights[f"backbone.{name}"]) for name, w in encoder.module.state_dict().items())


def test_a_damaged_file_is_replaced(encoder, val, tmp_path, capsys):
    first = FeatureSet(encoder, val, tmp_path).read()
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:1000])
    assert torch.equal(FeatureSet(encoder, val, tmp_path).read(), first)
    assert "is damaged" in capsys.readouterr().err
    assert torch.equal(read_features(path, safetensors.safe_open(path, "pt").metadata()["description"]), first)


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch, capsys):
    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    keep_features(tmp_path / "kept.safetensors", "checkpoint", torch.rand(3, 2))
    assert list(tmp_path.iterdir()) == []
    assert "features not kept" in capsys.readouterr().err


def test_raw_pixels_are_the_normalized_pixels(val, data, tmp_path):
    pixels = open_encoder(write_run(tmp_path / "run", data), pixels=True)
    found = FeatureSet(pixels, val, tmp_path / "kept").read()
    assert (pixels.kind, pixels.info.arch, found.shape) == ("raw pixels", "pixels", (60, 3072))
    assert torch.allclose(found, normalized_pixels(val.labels).flatten(1), atol=1e-5)
    assert not (tmp_path / "kept").exists()


def test_the_kind_of_an_encoder(data, tmp_path):
    assert open_encoder(write_run(tmp_path / "a", data, step=3)).kind == "trained"
    assert open_encoder(write_run(tmp_path / "b", data, step=0)).kind == "untrained"


def test_random_weights_are_a_control_of_their_own(data, val, tmp_path):
    """The same architecture, another number for every seed, and never a trained network's kept features."""
    run = write_run(tmp_path / "run", data)
    encoders = [open_encoder(run), *(open_encoder(run, random_seed=seed) for seed in (3, 3, 4))]
    assert [encoder.kind for encoder in encoders] == ["trained", "untrained", "untrained", "untrained"]
    first, second, again, other = (FeatureSet(encoder, val, tmp_path / "kept").read() for encoder in encoders)
    assert torch.equal(second, again)
    assert not torch.allclose(second, other) and not torch.allclose(second, first)
    assert open_encoder(run, resolution_px=16).info.resolution_px == 16


@pytest.mark.parametrize(("resolution_px", "resize_px"), [(224, 256), (128, 146), (64, 73), (63, 63), (32, 32)])
def test_centre_view(resolution_px, resize_px):
    assert centre_view(resolution_px).resize_px == resize_px


def test_features_that_are_not_finite_are_refused(data, val, tmp_path):
    encoder = open_encoder(write_run(tmp_path, data))
    next(encoder.module.parameters()).data.fill_(torch.nan)
    with pytest.raises(UserError, match="not all finite numbers"):
        FeatureSet(encoder, val, tmp_path / "kept").read()
    assert not (tmp_path / "kept").exists()


def test_a_corrupt_image_is_named(encoder, small_beton, tmp_path):
    for path in small_beton.parent.glob("train.*"):
        shutil.copy(path, tmp_path / path.name)
    sound = open_beton(tmp_path / "train.beton")
    with open(tmp_path / "train.beton", "r+b") as file:
        file.seek(int(sound.offsets[5] + sound.sizes_bytes[5] // 2))
        file.write(bytes(2000))
    with pytest.raises(UserError, match=f"image 5 of .*{sound.file_names()[5]}"):
        FeatureSet(encoder, sound, tmp_path / "kept").read()
    assert not (tmp_path / "kept").exists()


def test_a_missing_checkpoint_names_the_command(tmp_path):
    with pytest.raises(UserError, match=r"no checkpoint at .*latest; make one with `torchrun train/pretrain\.py`"):
        open_encoder(tmp_path / "latest")


def test_a_checkpoint_of_another_architecture_is_refused(data, tmp_path):
    """The weights of one network under the name of another."""
    run = write_run(tmp_path, data)
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    state["backbone"]["arch"] = "test_vit"
    del state["content_sha256"]
    write_state(run / "checkpoint.pt", state)
    with pytest.raises(UserError, match="does not fit the architecture it names, test_vit"):
        open_encoder(run)
