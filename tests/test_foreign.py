"""Several ResNets in somebody else's file, and networks that have the parameters of another one."""

from dataclasses import replace

import pytest
import timm
import torch
import torchvision

from pipeline.errors import UserError
from train.cards import PRESETS
from train.checkpoint import load_backbone, save_checkpoint
from train.foreign import find_encoder
from train.update import initial_network


def resnet18_of(value: float, **others) -> dict:
    """The state dict of a ResNet-18 whose weights are all one number, in a few bytes."""
    with torch.device("meta"):
        shapes = {name: w.shape for name, w in torchvision.models.resnet18().state_dict().items()}
    counters = {name: torch.tensor(0) for name in shapes if name.endswith("num_batches_tracked")}
    return {name: torch.tensor(value).expand(shape) for name, shape in shapes.items()} | counters | others


def below(prefix: str, weights: dict) -> dict:
    return {prefix + name: w for name, w in weights.items()}


OURS = replace(PRESETS["cifar10"], arch="resnet18", stem="imagenet", projector="16-16")
ONE, TWO = resnet18_of(1.0), resnet18_of(2.0)
SEVERAL = {
    "MoCo": {"arch": "resnet18", "state_dict": below("module.encoder_k.", TWO) | below("module.encoder_q.", ONE)},
    "BYOL": below("target_net.0.", TWO) | below("online_net.0.", ONE) | {"steps": 3},
    "timm with EMA": {"state_dict_ema": TWO, "state_dict": ONE},
    "DINO": {"teacher": below("backbone.", TWO), "student": below("module.backbone.", ONE), "epoch": 1},
    "camel case": {"model": below("momentumEncoder.", TWO) | below("baseEncoder.", ONE)},
    "nested": {"ema": {"model": {"trunk": TWO}}, "classy": {"model": {"trunk": ONE}, "lr": [0.1]}},
}


@pytest.mark.parametrize("layout", SEVERAL)
def test_of_several_networks_the_trained_one_is_taken(tmp_path, capsys, layout):
    path = tmp_path / "theirs.pth"
    torch.save(SEVERAL[layout], path)
    trained, info = load_backbone(path)
    assert trained.layer4[1].conv2.weight.unique().tolist() == [1.0]
    said = capsys.readouterr().err
    assert f"taken is {info.key}, and --key takes another" in said
    (other,) = (name for name in said.partition(" at ")[2].partition(";")[0].split(", ") if name != info.key)
    for key in (other, *({"MoCo": ["encoder_k"], "DINO": ["teacher"]}.get(layout, []))):
        average = find_encoder(SEVERAL[layout], path, key)
        assert average.name == other and average.weights["layer4.1.conv2.weight"].unique().tolist() == [2.0]


def test_where_the_rule_does_not_decide_the_file_is_refused(tmp_path):
    path = tmp_path / "theirs.pth"
    torch.save({"left": ONE, "right": TWO}, path)
    with pytest.raises(UserError, match=r"several ResNets \(left, right\), .* choose one with --key"):
        load_backbone(path)
    assert load_backbone(path, "right")[1].key == "right"
    begun, *_ = initial_network(replace(OURS, init_from=path, key="right"))
    assert begun.layer4[1].conv2.weight.unique().tolist() == [2.0]
    with pytest.raises(UserError, match="--key middle names none: .* at left, right; choose one of these"):
        load_backbone(path, "middle")
    torch.save({"model": ONE, "backbone": resnet18_of(1.0)}, path)
    assert load_backbone(path)[1].key == "model", "equal weights are one network"
    torch.save({"teacher": ONE}, path)
    assert load_backbone(path)[1].key == "teacher", "the only one is no question"
    save_checkpoint(tmp_path, {"step": 0})
    with pytest.raises(UserError, match="--key x chooses among several networks"):
        load_backbone(tmp_path, "x")


def test_a_network_that_only_looks_like_a_resnet_is_refused(tmp_path):
    """timm's anti-aliased networks have a ResNet's parameters, and squeeze-and-excitation has more."""
    blurred = {n: torch.tensor(0.0).expand(w.shape) for n, w in timm.create_model("resnetblur18").state_dict().items()}
    with_counters = {n: torch.tensor(0) if n.endswith("num_batches_tracked") else w for n, w in blurred.items()}
    files = {
        "resnetblur18-84f4748f.pth": with_counters,
        "model_best.pth.tar": {"arch": "resnetblur18", "state_dict": with_counters},
    }
    for name, content in files.items():
        torch.save(content, tmp_path / name)
        with pytest.raises(UserError, match="is resnetblur18 by its name or content"):
            load_backbone(tmp_path / name)
    torch.save(with_counters, tmp_path / "pytorch_model.bin")
    assert load_backbone(tmp_path / "pytorch_model.bin")[1].arch == "resnet18", "nothing tells"
    (tmp_path / "config.json").write_text('{"architecture": "resnetblur18"}')
    with pytest.raises(UserError, match="is resnetblur18 by its name or content"):
        load_backbone(tmp_path / "pytorch_model.bin")
    torch.save({"m": resnet18_of(1.0, **{"layer1.0.se.fc1.weight": torch.ones(2)})}, tmp_path / "se.pth")
    with pytest.raises(UserError, match=r"below m stands another network, with layer1\.0\.se\.fc1\.weight"):
        load_backbone(tmp_path / "se.pth")
