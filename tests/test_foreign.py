"""Several ResNets in somebody else's file, and networks that have the parameters of another one."""

import json
from dataclasses import replace

import pytest
import timm
import torch
import torchvision

from pipeline.errors import UserError
from pipeline.spec import Normalization
from tests.evaluation import write_run
from train.cards import PRESETS
from train.checkpoint import BackboneInfo, export_backbone, load_backbone
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


CIFAR = Normalization((0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616))
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
    write_run(tmp_path, tmp_path)
    with pytest.raises(UserError, match="--key x chooses among several networks"):
        load_backbone(tmp_path, "x")


def test_a_run_begins_with_somebody_elses_vit(tmp_path):
    """By timm's name with and without its origin, and again from a file of ours, whose views are the run's own."""
    path, theirs = tmp_path / "theirs.pth", timm.create_model("test_vit", num_classes=3)
    torch.save({"state_dict": below("module.", theirs.state_dict())}, path)
    for arch in ("test_vit", "timm:test_vit"):
        config = replace(OURS, arch=arch, init_from=path)
        begun, features, _ = initial_network(config)
        assert features == 64 and torch.equal(begun.blocks[1].attn.qkv.weight, theirs.blocks[1].attn.qkv.weight)
        info = BackboneInfo(arch, resolution_px=96, normalization=CIFAR)
        export_backbone(tmp_path, begun, info)
        found = load_backbone(tmp_path / "backbone.safetensors")[1]
        assert (found.resolution_px, found.normalization) == (96, CIFAR)
        initial_network(replace(config, arch="test_vit", init_from=tmp_path / "backbone.safetensors"))
    with pytest.raises(UserError, match="is timm:test_vit with .* this run is resnet18 .* pass --arch timm:test_vit"):
        initial_network(replace(OURS, init_from=tmp_path / "backbone.safetensors"))
    with pytest.raises(UserError, match=r"does not take views of 32 px .* pass --resolution 224"):
        initial_network(replace(OURS, arch="deit_tiny_patch16_224", init_from=path))
    with pytest.raises(UserError, match="holds no timm:test_vit2"):
        initial_network(replace(OURS, arch="test_vit2", init_from=path))


def test_moco_v3s_small_vit_is_not_timms(tmp_path):
    """It has 12 heads of attention where timm's has 6, in parameters of the same names and shapes."""
    weights = {
        n: w.expand(w.shape) for n, w in timm.create_model("vit_small_patch16_224", num_classes=0).state_dict().items()
    }
    for content in (
        {"state_dict": below("module.base_encoder.", weights)},
        {"arch": "vit_small", "state_dict": below("module.", weights)},
    ):
        with pytest.raises(UserError, match="is MoCo v3's ViT-S, whose attention has 12 heads"):
            find_encoder(content, tmp_path / "x.pth", arch="vit_small_patch16_224")
    assert find_encoder({"teacher": below("backbone.", weights)}, tmp_path / "x.pth", arch="vit_small_patch16_224")


def test_what_timms_config_says_of_a_resnet(tmp_path):
    """Its normalization is used; what builds another network with the same parameters is refused."""
    torch.save(ONE, tmp_path / "model.bin")
    told = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.1]}
    write = (tmp_path / "config.json").write_text
    write(json.dumps({"architecture": "resnet18", "pretrained_cfg": told}))
    assert load_backbone(tmp_path / "model.bin")[1].normalization == Normalization((0.5, 0.4, 0.3), (0.2, 0.2, 0.1))
    write(json.dumps({"architecture": "resnet18", "model_args": {"aa_layer": "blurpc"}}))
    with pytest.raises(UserError, match=r"config\.json builds resnet18 with {'aa_layer': 'blurpc'}"):
        load_backbone(tmp_path / "model.bin")
    for wrong in ([1], {"mean": None}, {"mean": [0.5]}):
        write(json.dumps({"architecture": "resnet18", "pretrained_cfg": wrong}))
        with pytest.raises(UserError, match=r"the mean and std in its config\.json cannot be used"):
            load_backbone(tmp_path / "model.bin")


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


def test_dicts_without_end_and_an_architecture_that_timm_lacks(tmp_path):
    """A pickle may hold a dict that holds itself; the name in config.json is not the flag's."""
    content: dict = {"a": 1}
    content |= {"b": content, "c": content}
    with pytest.raises(UserError, match=r"x\.pth nests more than 50 dicts"):
        find_encoder(content, tmp_path / "x.pth")
    (tmp_path / "config.json").write_text('{"architecture": "resnet_x"}')
    with pytest.raises(UserError, match=r"x\.pth: the architecture in its config\.json, 'timm:resnet_x' is neither a"):
        find_encoder({}, tmp_path / "x.pth")
