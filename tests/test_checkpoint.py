"""Checkpoints whole or absent, refused where they do not belong, and read back as backbones."""

import subprocess
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import torchvision

from pipeline.command import UserError
from train.cards import PRESETS, resolved
from train.checkpoint import (
    BACKBONE,
    CHECKPOINT,
    BackboneInfo,
    export_backbone,
    file_sha256,
    load_backbone,
    read_checkpoint,
    refuse_other_recipe,
    save_checkpoint,
)
from train.config import NORMALIZATIONS, as_plain
from train.initial import initial_backbone, start_heads_
from train.methods.barlow_twins import BarlowTwins
from train.model import make_backbone

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
    assert info == replace(INFO, sha256=file_sha256(tmp_path / CHECKPOINT))


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
    theirs = published_checkpoint(tmp_path / "checkpoint.pth")
    config = replace(NARROW, init_from=tmp_path / "checkpoint.pth")
    ours = BarlowTwins(*initial_backbone(config), config)
    assert start_heads_(ours, config.init_from)
    assert all(torch.equal(weight, theirs.state_dict()[name]) for name, weight in ours.state_dict().items())

    wider = replace(config, projector="24-24")
    ours = BarlowTwins(*initial_backbone(wider), wider)
    before = ours.projector[0].weight.clone()
    assert not start_heads_(ours, config.init_from), "another width: the backbone alone"
    assert torch.equal(ours.projector[0].weight, before)
    assert torch.equal(ours.backbone.layer4[1].conv2.weight, theirs.backbone.layer4[1].conv2.weight)

    export_backbone(tmp_path, theirs.backbone, replace(INFO, stem="imagenet"))
    alone = replace(config, init_from=tmp_path / BACKBONE)
    assert torch.equal(initial_backbone(alone)[0].conv1.weight, theirs.backbone.conv1.weight)
    assert not start_heads_(ours, alone.init_from)


def test_a_run_does_not_begin_with_another_architecture(tmp_path):
    published_checkpoint(tmp_path / "checkpoint.pth")
    with pytest.raises(UserError, match="is resnet18 with the imagenet stem, this run is resnet18 with the small stem"):
        initial_backbone(replace(NARROW, stem="small", init_from=tmp_path / "checkpoint.pth"))


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
    with pytest.raises(UserError, match="images 100 there, 50 here"):
        refuse_other_recipe({"config": config, "images": 100}, config, 50, Path("c.pt"))
    refuse_other_recipe({"config": config | {"loader": "torch"}, "images": 100}, config, 100, Path("c.pt"))


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
