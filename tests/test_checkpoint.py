"""Checkpoints whole or absent, refused where they do not belong, and read back as backbones."""

import hashlib
import os
import random
import subprocess
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import torchvision

from pipeline.errors import UserError
from train.cards import PRESETS
from train.checkpoint import (
    BACKBONE,
    CHECKPOINT,
    BackboneInfo,
    export_backbone,
    load_backbone,
    newest_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from train.config import NORMALIZATIONS, as_plain
from train.content import (
    DamagedFile,
    content_sha256,
    parsed_tensor_file,
    read_once,
    read_state,
    tensor_file,
    write_state,
)
from train.flags import resolved
from train.methods.barlow_twins import BarlowTwins
from train.methods.choose import view_table
from train.model import make_backbone
from train.resuming import refuse_other_recipe, refuse_other_views
from train.update import initial_network, start_heads_

INFO = BackboneInfo("resnet18", "small", 512, 32, NORMALIZATIONS["cifar10"], "/somewhere/cifar10", 3, 40, 5)


def state_of(backbone: torch.nn.Module) -> dict:
    model = {f"backbone.{name}": w for name, w in backbone.state_dict().items()} | {"projector.0.weight": torch.ones(2)}
    return {
        "config": as_plain(PRESETS["cifar10"]),
        "backbone": asdict(INFO),
        "step": 40,
        "images": 100,
        "model": model,
        "optimizer": {},
        "scaler": {},
    }


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def backbone() -> torch.nn.Module:
    torch.manual_seed(1)
    return make_backbone("resnet18", "small")[0].eval()


@pytest.fixture
def picture() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_round_trip_without_arbitrary_pickles(tmp_path, backbone):
    save_checkpoint(tmp_path, state_of(backbone))
    assert [p.name for p in tmp_path.iterdir()] == [CHECKPOINT]
    again = read_checkpoint(tmp_path / CHECKPOINT)
    assert again["step"] == 40 and again["config"] == as_plain(PRESETS["cifar10"])
    for name, tensor in state_of(backbone)["model"].items():
        assert torch.equal(again["model"][name], tensor)


def test_a_run_folder_gives_its_backbone(tmp_path, backbone, picture):
    save_checkpoint(tmp_path, state_of(backbone))
    loaded, info = load_backbone(tmp_path)
    assert torch.equal(loaded(picture), backbone(picture))
    assert not loaded.training
    assert info == replace(INFO, sha256=sha256_of(tmp_path / CHECKPOINT))


def test_export_loads_here_and_in_torchvision(tmp_path, picture):
    torch.manual_seed(2)
    backbone = make_backbone("resnet18")[0].to(memory_format=torch.channels_last).eval()
    export_backbone(tmp_path, backbone, replace(INFO, stem="imagenet"))
    loaded, info = load_backbone(tmp_path / BACKBONE)
    assert torch.equal(loaded(picture), backbone(picture)) and info.stem == "imagenet"
    assert info.normalization == NORMALIZATIONS["cifar10"]
    theirs = torchvision.models.resnet18()
    result = theirs.load_state_dict(safetensors.torch.load_file(tmp_path / BACKBONE), strict=False)
    assert result.missing_keys == ["fc.weight", "fc.bias"] and not result.unexpected_keys
    timms = timm.create_model("resnet18", num_classes=0, checkpoint_path=str(tmp_path / BACKBONE)).eval()
    assert torch.allclose(timms(picture), backbone(picture), atol=1e-6)


# ---- beginning with somebody else's weights ----

NARROW = replace(PRESETS["cifar10"], arch="resnet18", stem="imagenet", projector="16-16")


def published_checkpoint(path: Path) -> BarlowTwins:
    """A file laid out as Barlow Twins' full checkpoint.pth, and the network that is in it."""
    torch.manual_seed(7)
    theirs = BarlowTwins(*make_backbone("resnet18"), NARROW)
    model = {f"module.{name}": weight for name, weight in theirs.state_dict().items()}
    model |= {"module.bn.running_mean": torch.zeros(16), "module.bn.running_var": torch.ones(16)}
    torch.save({"epoch": 1000, "model": model, "optimizer": {"state": {}, "param_groups": []}}, path)
    return theirs


def test_a_run_begins_with_a_published_checkpoint(tmp_path):
    path = tmp_path / "checkpoint.pth"
    theirs = published_checkpoint(path)
    config = replace(NARROW, init_from=path)
    backbone, features, heads = initial_network(config)
    wider = replace(config, projector="24-24")
    without_heads = BarlowTwins(*initial_network(wider)[:2], wider)
    path.unlink()  # all of it is from one read
    ours = BarlowTwins(backbone, features, config)
    assert start_heads_(ours, heads)
    assert all(torch.equal(weight, theirs.state_dict()[name]) for name, weight in ours.state_dict().items())

    before = without_heads.projector[0].weight.clone()
    assert not start_heads_(without_heads, heads), "another width: the backbone alone"
    assert torch.equal(without_heads.projector[0].weight, before)
    assert torch.equal(without_heads.backbone.layer4[1].conv2.weight, theirs.backbone.layer4[1].conv2.weight)

    export_backbone(tmp_path, theirs.backbone, replace(INFO, stem="imagenet"))
    backbone, _, heads = initial_network(replace(config, init_from=tmp_path / BACKBONE))
    assert torch.equal(backbone.conv1.weight, theirs.backbone.conv1.weight)
    assert not start_heads_(ours, heads)


def test_a_run_does_not_begin_with_another_architecture(tmp_path):
    published_checkpoint(tmp_path / "checkpoint.pth")
    with pytest.raises(UserError, match="is resnet18 with the imagenet stem, this run is resnet18 with the small stem"):
        initial_network(replace(NARROW, stem="small", init_from=tmp_path / "checkpoint.pth"))


@pytest.mark.parametrize("layout", ["resnet50.pth", "full checkpoint", "other prefix", "without counters"])
def test_published_layouts(tmp_path, layout):
    weights = torchvision.models.resnet50().state_dict()
    backbone = {n: w for n, w in weights.items() if not n.startswith("fc.")}
    file = {
        "resnet50.pth": backbone,
        "full checkpoint": {
            "epoch": 1000,
            "model": {f"module.backbone.{n}": w for n, w in backbone.items()}
            | {"module.projector.0.weight": torch.ones(1)},
            "optimizer": {"state": {}},
        },
        "other prefix": {f"module.pre.{n}": w for n, w in weights.items()},
        "without counters": {n: w for n, w in backbone.items() if not n.endswith("num_batches_tracked")},
    }[layout]
    torch.save(file, tmp_path / "published.pth")
    loaded, info = load_backbone(tmp_path / "published.pth")
    assert (info.arch, info.stem, info.features) == ("resnet50", "imagenet", 2048)
    assert torch.equal(loaded.layer3[4].conv2.weight, weights["layer3.4.conv2.weight"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not a checkpoint", "cannot be read"),
        (b"", "cannot be read"),
        ({"weights": torch.ones(3)}, "holds no ResNet"),
        ({"conv1.weight": torch.ones(64, 3, 7, 7)}, "holds no ResNet"),
        ([1, 2], "holds no ResNet"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    path = tmp_path / "x.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(UserError, match=message):
        load_backbone(path)


def test_missing_truncated_and_future_checkpoints_are_refused(tmp_path, backbone):
    with pytest.raises(UserError, match="there is no checkpoint"):
        load_backbone(tmp_path / "nowhere")
    with pytest.raises(UserError, match="there is no checkpoint"):
        load_backbone(tmp_path)
    save_checkpoint(tmp_path, state_of(backbone))
    path = tmp_path / CHECKPOINT
    whole = path.read_bytes()
    for keep in (10, len(whole) // 2, len(whole) - 10):
        path.write_bytes(whole[:keep])
        with pytest.raises(UserError, match="damaged or incomplete"):
            read_checkpoint(path)
    save_checkpoint(tmp_path, state_of(backbone) | {"version": 99})
    with pytest.raises(UserError, match="version 99"):
        load_backbone(tmp_path)


def test_another_recipe_is_refused_and_every_difference_named():
    config = as_plain(resolved(PRESETS["cifar10"]))
    state = {"config": config | {"arch": "resnet50", "epochs": 7, "run": "x", "workers": 9}, "images": 100}
    with pytest.raises(UserError, match=r"arch resnet50 there, resnet18 here, epochs 7 there, 1000 here\)"):
        refuse_other_recipe(state, config, 100, Path("c.pt"))
    with pytest.raises(UserError) as untrained:
        refuse_other_recipe({"config": config | {"epochs": 0}, "images": 100}, config, 100, Path("c.pt"))
    assert "epochs 0 there" in str(untrained.value) and "train longer" not in str(untrained.value)
    with pytest.raises(UserError, match="images 100 there, 50 here"):
        refuse_other_recipe({"config": config, "images": 100}, config, 50, Path("c.pt"))
    refuse_other_recipe({"config": config | {"loader": "torch"}, "images": 100}, config, 100, Path("c.pt"))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_checkpoint_without_a_view_table_is_refused_where_its_views_were_others(preset):
    """Of all cards only SimSiam's for ImageNet had others, bicubic ones, before checkpoints had the table."""
    config = resolved(PRESETS[preset])
    older = {"config": as_plain(config)}
    if preset != "imagenet-simsiam":
        return refuse_other_views(older, view_table(config), Path("c.pt"))
    with pytest.raises(
        UserError, match=r"views than --method simsiam .* \(interpolation bicubic there, bilinear here\);"
    ):
        refuse_other_views(older, view_table(config), Path("c.pt"))
    refuse_other_views(older | {"views": [asdict(v) for v in view_table(config)]}, view_table(config), Path("c.pt"))


def test_a_full_disk_leaves_the_checkpoint_before_untouched(tmp_path, backbone):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("no right to mount a small disk here")
    try:
        save_checkpoint(disk, state_of(backbone))
        whole = (disk / CHECKPOINT).read_bytes()
        with pytest.raises(UserError, match="No space left on device; the one before it is untouched"):
            save_checkpoint(disk, state_of(backbone))
        assert (disk / CHECKPOINT).read_bytes() == whole
        assert [p.name for p in disk.iterdir()] == [CHECKPOINT]
    finally:
        subprocess.run(["umount", disk], check=True)


# ---- damage ----


def changed(whole: bytes, kind: str, moments: random.Random) -> bytes:
    """The same file with one bit flipped, or a run of bytes overwritten, left out, doubled, or swapped with another."""
    data, at = bytearray(whole), moments.randrange(len(whole))
    length = moments.randrange(1, 200)
    if kind == "bit":
        data[at] ^= 1 << moments.randrange(8)
    elif kind == "overwritten":
        data[at : at + length] = moments.choice([b"\0", b"\xff", moments.randbytes(1)]) * len(data[at : at + length])
    elif kind == "moved":
        part = bytes(data[at : at + length])
        del data[at : at + length]
        to = moments.randrange(len(data))
        data[to:to] = part
    else:
        data[at : at + length] = b"" if kind == "left out" else data[at : at + length] * 2
    return bytes(data)


def small_state() -> dict:
    torch.manual_seed(3)
    weights = {
        "model": {"backbone.w": torch.randn(40, 9), "n": torch.tensor(7)},
        "optimizer": {"state": {0: [1.5, None]}},
    }
    config = {"run": "r", "without": [], "amp": True}
    return {"step": 40, "images": 100, "config": config, "backbone": asdict(INFO)} | weights


def checkpoint_file(folder: Path) -> Path:
    save_checkpoint(folder, small_state())
    return folder / CHECKPOINT


def older_checkpoint_file(folder: Path) -> Path:
    """As it was written before there was a digest: only the zip's checksums tell."""
    torch.save({"format": "barlow-at-speed checkpoint", "version": 1, **small_state()}, folder / CHECKPOINT)
    return folder / CHECKPOINT


def foreign_file(folder: Path) -> Path:
    torch.save({"state_dict": small_state()["model"], "epoch": 3}, folder / "theirs.pth")
    return folder / "theirs.pth"


def export_file(folder: Path) -> Path:
    (folder / BACKBONE).write_bytes(tensor_file(small_state()["model"], {"backbone": "about"}))
    return folder / BACKBONE


@pytest.mark.parametrize(
    ("write", "read"),
    [
        (checkpoint_file, read_checkpoint),
        (older_checkpoint_file, read_checkpoint),
        (foreign_file, lambda path: read_state(path)[0]),
        (export_file, lambda path: parsed_tensor_file(read_once(path), path)),
    ],
)
def test_damage_is_refused_or_changed_nothing(tmp_path, write, read):
    path, moments = write(tmp_path), random.Random(0)
    whole, expected = path.read_bytes(), bits(read(path))
    refused = {}
    for trial in range(240):
        kind = ("bit", "bit", "overwritten", "left out", "doubled", "moved")[trial % 6]
        path.write_bytes(changed(whole, kind, moments))
        try:
            assert bits(read(path)) == expected, (kind, trial)
        except UserError as error:
            assert str(path) in str(error)
            refused[kind] = refused.get(kind, 0) + 1
    assert min(refused.values()) > 5 and len(refused) == 5


def bits(value):
    """Nested plain values, tensors as type, shape and bytes."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.shape, value.contiguous().numpy().tobytes()
    if isinstance(value, dict):
        return {name: bits(item) for name, item in value.items()}
    return [bits(item) for item in value] if isinstance(value, list | tuple) else value


def test_a_part_marked_as_a_folder_is_damage(tmp_path):
    """PyTorch reads nothing of it and hands out memory as it finds it; the zip's checksums do not cover the mark."""
    torch.save({"w": torch.ones(50)}, tmp_path / "theirs.pth")
    whole = bytearray((tmp_path / "theirs.pth").read_bytes())
    entries = [at for at in range(len(whole)) if whole[at : at + 4] == b"PK\1\2"]
    (marked,) = (at for at in entries if whole[at + 46 :].split(b"PK")[0].find(b"/data/0") > 0)
    whole[marked + 38] ^= 0x10
    (tmp_path / "theirs.pth").write_bytes(whole)
    with pytest.raises(DamagedFile, match="its part .*/data/0 is damaged"):
        read_state(tmp_path / "theirs.pth")


def test_the_digest_is_of_all_that_is_there(tmp_path):
    """Written out by hand once; then whatever is different has another."""
    by_hand = hashlib.sha256(b"dict 2\n'a'\nlist 2\n1\n'x'\n'b'\ntensor torch.int16 [2, 1]\n\x01\x00\x02\x01")
    assert content_sha256({"b": torch.tensor([[1], [258]], dtype=torch.int16), "a": (1, "x")}) == by_hand.hexdigest()
    floats = torch.tensor([1.0, 2.0])
    others = [None, 0, 1, 1.0, True, "1", b"1", [], [1], [[1]], {}, {1: 1}, {"1": 1}, "list 0\n", floats, -floats]
    others += [
        floats.double(),
        floats[:, None],
        floats.view(torch.int32),
        floats[:0],
        [floats[0], floats[1]],
        {"a": floats},
    ]
    assert len({content_sha256(value) for value in others}) == len(others)
    assert content_sha256(torch.arange(6).view(2, 3).T) == content_sha256(torch.tensor([[0, 3], [1, 4], [2, 5]]))
    state = {"weights": floats.bfloat16(), "nan": float("nan"), "nested": {0: [floats, None]}}
    write_state(tmp_path / "state.pt", state)
    assert bits(read_state(tmp_path / "state.pt")[0]["nested"]) == bits(state["nested"])


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 12")])
def test_short_memory_is_no_damage(tmp_path, monkeypatch, error):
    """Else a sound checkpoint would be passed over, and the run would continue from an older one."""
    checkpoint_file(tmp_path)
    (tmp_path / CHECKPOINT).rename(tmp_path / "checkpoint-00000001.pt")
    checkpoint_file(tmp_path)

    def load(*_, **__):
        raise error

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(UserError, match="memory is too short to read .*checkpoint.pt") as raised:
        newest_checkpoint(tmp_path)
    assert not isinstance(raised.value, DamagedFile)


def test_a_file_that_another_program_writes_to_is_not_read(tmp_path, monkeypatch):
    import train.content

    path, looks = checkpoint_file(tmp_path), []
    whole = path.read_bytes()

    def fstat(fd):
        found = real(fd)
        if not looks:  # after the first look the other program writes over it, as many bytes
            path.write_bytes(whole[::-1])
            os.utime(path, ns=(0, 1))
        looks.append(fd)
        return found

    real = os.fstat
    monkeypatch.setattr(train.content.os, "fstat", fstat)
    with pytest.raises(UserError, match="while another program writes to it"):
        read_state(path)


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "none"])
def test_what_a_training_replaces_meanwhile_is_read_whole(tmp_path, monkeypatch, links):
    """Every backbone has the sha256 that the file with its weights had; none is missing at the moment of a rename."""
    if not links:
        monkeypatch.setattr("pipeline.disk.os.link", lambda *_: (_ for _ in ()).throw(PermissionError))
    info = asdict(replace(INFO, arch="test_resnet", stem="imagenet"))
    weights = {f"backbone.{name}": w for name, w in make_backbone("test_resnet")[0].state_dict().items()}
    first, written, over = next(iter(weights)), {}, threading.Event()

    def train() -> None:
        step = 0
        while not over.is_set():
            step += 1
            weights[first] = torch.full_like(weights[first], step)
            state = {"config": {}, "backbone": info | {"step": step}, "step": step, "images": 1, "model": weights}
            save_checkpoint(tmp_path, state, before=step - 1 or None, keep=2)
            written[step] = sha256_of(tmp_path / CHECKPOINT)

    writer = threading.Thread(target=train)
    writer.start()
    try:
        while not written and writer.is_alive():
            time.sleep(0.01)
        found = [load_backbone(tmp_path) for _ in range(15)]
    finally:
        over.set()
        writer.join()
    assert len({info.step for _, info in found}) > 5, "the file was replaced between loads"
    for backbone, info in found:
        assert backbone.state_dict()[first.removeprefix("backbone.")].unique().tolist() == [info.step]
        assert info.sha256 == written[info.step]


def test_a_damaged_newest_checkpoint_of_a_run_is_passed_over(tmp_path, backbone, capsys):
    save_checkpoint(tmp_path, state_of(backbone) | {"step": 30})
    whole = (tmp_path / CHECKPOINT).read_bytes()
    save_checkpoint(tmp_path, state_of(backbone), before=30, keep=2)
    newest = bytearray((tmp_path / CHECKPOINT).read_bytes())
    newest[len(newest) // 2] ^= 1  # in the middle of some weight
    (tmp_path / CHECKPOINT).write_bytes(newest)
    _, info = load_backbone(tmp_path)
    assert info.sha256 == hashlib.sha256(whole).hexdigest()
    assert "checkpoint.pt is damaged or missing; taken is checkpoint-00000030.pt of step 30" in capsys.readouterr().err
    with pytest.raises(UserError, match="is damaged: its content is not the one"):
        load_backbone(tmp_path / CHECKPOINT)
