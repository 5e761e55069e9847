"""Others' checkpoints in the layouts that their projects write, made of networks with known features.

Each layout has the key pattern of the project's own code: which parts stand where, and what stands beside them.
"""

import argparse
import itertools
import json
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import nn

from pipeline.errors import UserError
from pipeline.spec import Normalization
from train.checkpoint import load_backbone
from train.foreign import find_encoder
from train.model import make_backbone, own_side_px

Weights = dict[str, torch.Tensor]


def drawn(network: nn.Module, seed: int) -> nn.Module:
    """The network with weights of a seed, and statistics of batch norm that are not those of a new one."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in network.state_dict().items():
        if weight.is_floating_point() and name.endswith(("running_var", "norm.weight", "bn1.weight")):
            weight.uniform_(0.5, 1.5, generator=generator)
        elif weight.is_floating_point():
            weight.normal_(0, 0.05, generator=generator)
    return network.eval()


@pytest.fixture(scope="module")
def resnets() -> tuple[nn.Module, nn.Module]:
    """The trained network and the average of it, with fc."""
    return drawn(torchvision.models.resnet18(), 1), drawn(torchvision.models.resnet18(), 2)


@pytest.fixture(scope="module")
def vits() -> tuple[nn.Module, nn.Module]:
    """timm's smallest ViT, without a classifier."""
    return drawn(timm.create_model("test_vit", num_classes=0), 1), drawn(
        timm.create_model("test_vit", num_classes=0), 2
    )


def below(prefix: str, weights: Weights) -> Weights:
    return {prefix + name: w for name, w in weights.items()}


def trunk(weights: Weights) -> Weights:
    return {name: w for name, w in weights.items() if not name.startswith("fc.")}


def mlp(prefix: str, widths: tuple[int, ...] = (512, 16, 8)) -> Weights:
    """A projector: Linear and batch norm by their numbers in a Sequential."""
    made = nn.Sequential()
    for inputs, outputs in itertools.pairwise(widths):
        made.extend([nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU()])
    return below(prefix, made.state_dict())


def dino_head(prefix: str) -> Weights:
    shapes = {"mlp.0.weight": (8, 4), "mlp.0.bias": (8,), "last_layer.weight_g": (9, 1), "last_layer.weight_v": (9, 8)}
    return {prefix + name: torch.ones(shape) for name, shape in shapes.items()}


def in_sequence(weights: Weights) -> Weights:
    """nn.Sequential(*list(resnet.children())[:-1])"""
    numbers = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}
    return {f"{numbers[n.split('.')[0]]}.{n.split('.', 1)[1]}": w for n, w in trunk(weights).items()}


def vissl(trained: Weights) -> dict:
    model = {"trunk": below("_feature_blocks.", trunk(trained)), "heads": mlp("0.clf.")}
    base = {"model": model, "optim": {"lr": [0.1]}, "meter": {}}
    return {"phase_idx": 3, "iteration": 7, "loss": {}, "classy_state_dict": {"base_model": base, "meters": {}}}


QUEUE = {"queue": torch.ones(8, 16), "queue_ptr": torch.zeros(1)}
RESNET: dict[str, tuple[str, Callable[[Weights, Weights], dict]]] = {  # place, then the file
    "Barlow Twins resnet50.pth": ("", lambda one, two: trunk(one)),
    "Barlow Twins checkpoint.pth": (
        "model.module.backbone",
        lambda one, two: {
            "epoch": 3,
            "model": below("module.backbone.", trunk(one)) | mlp("module.projector.") | mlp("module.bn.", (8, 8)),
            "optimizer": {"state": {}},
        },
    ),
    "MoCo v1": (
        "state_dict.module.encoder_q",
        lambda one, two: {
            "arch": "resnet18",
            "state_dict": below("module.encoder_q.", one) | below("module.encoder_k.", two) | below("module.", QUEUE),
        },
    ),
    "MoCo v2": (
        "state_dict.module.encoder_q",
        lambda one, two: {
            "state_dict": below("module.encoder_q.", trunk(one) | mlp("fc."))
            | below("module.encoder_k.", trunk(two) | mlp("fc."))
            | below("module.", QUEUE),
        },
    ),
    "MoCo v3": (
        "state_dict.module.base_encoder",
        lambda one, two: {
            "state_dict": below("module.base_encoder.", trunk(one) | mlp("fc."))
            | below("module.momentum_encoder.", trunk(two) | mlp("fc."))
            | mlp("module.predictor."),
        },
    ),
    "SimCLR, backbone": (
        "state_dict.backbone",
        lambda one, two: {"arch": "resnet18", "state_dict": below("backbone.", trunk(one) | mlp("fc."))},
    ),
    "SimCLR, encoder": ("encoder", lambda one, two: below("encoder.", trunk(one)) | mlp("projector.")),
    "BYOL": (
        "net",  # under two names, which is one network
        lambda one, two: (
            below("net.", one)
            | below("online_encoder.net.", one)
            | mlp("online_encoder.projector.")
            | mlp("online_predictor.")
            | below("target_encoder.net.", two)
            | mlp("target_encoder.projector.")
        ),
    ),
    "SimSiam": (
        "state_dict.module.encoder",
        lambda one, two: {
            "state_dict": below("module.encoder.", trunk(one) | mlp("fc.")) | mlp("module.predictor.", (8, 4, 8))
        },
    ),
    "SwAV": (
        "module",
        lambda one, two: (
            below("module.", trunk(one))
            | mlp("module.projection_head.")
            | {"module.prototypes.weight": torch.ones(9, 8)}
        ),
    ),
    "SwAV checkpoint": (
        "state_dict.module",
        lambda one, two: {
            "epoch": 1,
            "state_dict": below("module.", trunk(one))
            | mlp("module.projection_head.")
            | {"module.prototypes.prototypes0.weight": torch.ones(9, 8)},
        },
    ),
    "DINO": (
        "student.module.backbone",
        lambda one, two: {
            "student": below("module.backbone.", trunk(one)) | dino_head("module.head."),
            "teacher": below("module.backbone.", trunk(two)) | dino_head("module.head."),
            "dino_loss": {"center": torch.zeros(1, 9)},
        },
    ),
    "VICReg resnet50.pth": ("", lambda one, two: trunk(one)),
    "VICReg model.pth": (
        "model.module.backbone",
        lambda one, two: {"model": below("module.backbone.", trunk(one)) | mlp("module.projector."), "optimizer": {}},
    ),
    "VISSL": ("classy_state_dict.base_model.model.trunk._feature_blocks", lambda one, two: vissl(one)),
    "MMSelfSup": (
        "state_dict.backbone",
        lambda one, two: {
            "meta": {"epoch": 3, "seed": None},
            "state_dict": below("backbone.", trunk(one))
            | mlp("neck.fc0.")
            | mlp("head.predictor.fc0.")
            | below("target_net.module.0.", trunk(two))
            | mlp("target_net.module.1.fc0.")
            | {"target_net.steps": torch.tensor(5)},
        },
    ),
    "MMSelfSup, extracted": ("state_dict", lambda one, two: {"state_dict": trunk(one), "author": "MMSelfSup"}),
    "solo-learn": (
        "state_dict.backbone",
        lambda one, two: {
            "pytorch-lightning_version": "1.6.4",
            "state_dict": below("backbone.", trunk(one))
            | below("momentum_backbone.", trunk(two))
            | {"classifier.weight": torch.ones(5, 512), "classifier.bias": torch.ones(5)}
            | mlp("projector.")
            | mlp("momentum_projector.")
            | mlp("predictor."),
        },
    ),
    "lightly": (
        "state_dict.backbone",
        lambda one, two: {
            "pytorch-lightning_version": "2.6.6",
            "state_dict": below("backbone.", in_sequence(one))
            | below("backbone_momentum.", in_sequence(two))
            | mlp("projection_head.layers.")
            | mlp("projection_head_momentum.layers."),
            "hyper_parameters": {},
        },
    ),
    "lightly, bare": ("", lambda one, two: in_sequence(one)),
}


@torch.no_grad()
def same_features(found: nn.Module, source: nn.Module, side_px: int) -> bool:
    images = torch.randn(2, 3, side_px, side_px, generator=torch.Generator().manual_seed(7))
    features = found(images)
    return features.std() > 0 and torch.equal(features, source(images))


@pytest.mark.parametrize("layout", RESNET)
def test_resnets_in_their_layouts(tmp_path, resnets, layout):
    name, write = RESNET[layout]
    torch.save(write(*(network.state_dict() for network in resnets)), tmp_path / "theirs.pth")
    found, info = load_backbone(tmp_path / "theirs.pth")
    assert (info.key, info.arch, info.stem, info.features) == (name, "resnet18", "imagenet", 512)
    source = make_backbone("resnet18")[0].eval()
    source.load_state_dict(trunk(resnets[0].state_dict()))
    assert same_features(found, source, 64)


VIT: dict[str, tuple[str, Callable[[Weights, Weights], dict]]] = {
    "MoCo v3": (
        "state_dict.module.base_encoder",
        lambda one, two: {
            "arch": "vit_small",
            "state_dict": below("module.base_encoder.", one | mlp("head.", (64, 16, 16, 8)))
            | below("module.momentum_encoder.", two | mlp("head.", (64, 16, 16, 8)))
            | mlp("module.predictor."),
        },
    ),
    "DINO": (
        "student.module.backbone",
        lambda one, two: {
            "student": below("module.backbone.", one) | dino_head("module.head."),
            "teacher": below("backbone.", two) | dino_head("head."),
            "epoch": 100,
        },
    ),
    "DINO, bare": ("", lambda one, two: one),
    "MAE": ("model", lambda one, two: {"model": one}),
    "MAE with decoder": (
        "model",
        lambda one, two: {
            "model": one
            | {"mask_token": torch.ones(1, 1, 8), "decoder_pos_embed": torch.ones(1, 101, 8)}
            | mlp("decoder_embed.", (64, 8))
            | below("decoder_blocks.0.", {"norm1.weight": torch.ones(8), "attn.qkv.weight": torch.ones(24, 8)})
            | mlp("decoder_norm.", (8, 8))
            | mlp("decoder_pred.", (8, 8)),
        },
    ),
    "solo-learn": (
        "state_dict.backbone",
        lambda one, two: {
            "state_dict": below("backbone.", one)
            | below("momentum_backbone.", two)
            | {"classifier.weight": torch.ones(5, 64), "classifier.bias": torch.ones(5)}
            | mlp("projector.")
        },
    ),
}


@pytest.mark.parametrize("arch", ["test_vit", "timm:test_vit"])
@pytest.mark.parametrize("layout", VIT)
def test_vits_in_their_layouts(tmp_path, vits, layout, arch, capsys):
    name, write = VIT[layout]
    torch.save(write(*(network.state_dict() for network in vits)), tmp_path / "theirs.pth")
    found, info = load_backbone(tmp_path / "theirs.pth", arch=arch)
    assert (info.key, info.arch, info.features) == (name, "timm:test_vit", 64)
    assert info.resolution_px == 160, "the network is built for these"
    assert info.normalization == Normalization() and "put their config.json beside" in capsys.readouterr().err
    assert same_features(found, vits[0], 160)
    if layout == "DINO":
        teacher, _ = load_backbone(tmp_path / "theirs.pth", "teacher", arch)
        assert same_features(teacher, vits[1], 160)


def test_solo_learns_cifar_stem_is_padded_by_two(tmp_path):
    """torchvision's ResNet with its first convolution replaced as solo-learn does it: the parameters do not tell."""
    source: nn.Module = torchvision.models.resnet18()
    source.fc, source.maxpool = nn.Identity(), nn.Identity()
    source.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=2, bias=False)
    weights = drawn(source, 1).state_dict()
    beside = {"classifier.weight": torch.ones(5, 512)}
    for others, equal in ((beside | mlp("projector."), True), (beside | dino_head("head."), True), ({}, False)):
        torch.save({"state_dict": below("backbone.", weights) | others}, tmp_path / "theirs.ckpt")
        found, info = load_backbone(tmp_path / "theirs.ckpt")
        assert info.stem == ("solo-learn" if equal else "small")
        assert same_features(found, source, 32) == equal


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["shufflenet_v2_x0_5", "mobilenet_v3_small", "regnet_x_400mf", "densenet121", "vit_b_16"]
)
def test_torchvisions_other_classifiers(tmp_path, name):
    """The oracle is torchvision's own network: its last layer makes its logits of our features."""
    network: nn.Module = drawn(torchvision.models.get_model(name), 1)
    path = tmp_path / "theirs.pth"
    place = find_encoder(below("module.", network.state_dict()), path, arch=f"torchvision:{name}")
    backbone, features = make_backbone(place.arch)
    backbone.load_state_dict(place.weights)
    images = torch.randn(2, 3, 224, 224)
    last = [layer for layer in network.modules() if isinstance(layer, nn.Linear)][-1]
    found = backbone.eval()(images)
    assert found.shape == (2, features) and torch.equal(last(found), network(images))
    assert (place.name, place.arch) == ("module", f"torchvision:{name}")
    assert own_side_px(backbone) == (224 if name == "vit_b_16" else None)


@torch.no_grad()
@pytest.mark.parametrize("name", ["test_convnext", "test_efficientnet", "test_resnet"])
def test_timms_file_with_its_config_needs_no_arch(tmp_path, name):
    network = drawn(timm.create_model(name, num_classes=7), 1)
    safetensors.torch.save_file(network.state_dict(), tmp_path / "model.safetensors")
    about = {
        "architecture": name,
        "num_classes": 7,
        "pretrained_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.1]},
    }
    (tmp_path / "config.json").write_text(json.dumps(about))
    found, info = load_backbone(tmp_path / "model.safetensors")
    assert info.arch == f"timm:{name}"
    assert info.normalization == Normalization((0.5, 0.4, 0.3), (0.2, 0.2, 0.1))
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(network.get_classifier()(found(images)), network(images))  # type: ignore[operator]
    (tmp_path / "config.json").write_text(json.dumps(about | {"model_args": {"act_layer": "relu"}}))
    with pytest.raises(UserError, match=r"config.json builds test_.* with {'act_layer': 'relu'}, which this program"):
        load_backbone(tmp_path / "model.safetensors")


@torch.no_grad()
@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "resnet18"])
def test_what_timm_itself_saves_for_the_hub(tmp_path, name):
    network = drawn(timm.create_model(name, num_classes=7), 1)
    timm.models.save_for_hf(network, tmp_path)
    found, info = load_backbone(tmp_path / "pytorch_model.bin")
    images = torch.randn(2, 3, info.resolution_px, info.resolution_px)
    assert torch.equal(network.get_classifier()(found(images)), network(images))  # type: ignore[operator]


def test_an_anti_aliased_network_by_its_name(tmp_path):
    network = drawn(timm.create_model("resnetblur18", num_classes=0), 1)
    torch.save(network.state_dict(), tmp_path / "resnetblur18.pth")
    found, info = load_backbone(tmp_path / "resnetblur18.pth", arch="timm:resnetblur18")
    assert info.arch == "timm:resnetblur18" and same_features(found, network, 64)
    with pytest.raises(UserError, match="is resnetblur18 by its name.* pass --arch timm:resnetblur18"):
        load_backbone(tmp_path / "resnetblur18.pth", arch="resnet18")


def test_a_bare_name_that_fits_both_or_neither(tmp_path):
    path = tmp_path / "theirs.pth"
    both = {n: w for n, w in torchvision.models.densenet121().state_dict().items() if not n.startswith("classifier")}
    torch.save(both, path)
    with pytest.raises(UserError, match="say which: --arch timm:densenet121 or --arch torchvision:densenet121"):
        load_backbone(path, arch="densenet121")
    assert load_backbone(path, arch="timm:densenet121")[1].arch == "timm:densenet121"
    theirs = torchvision.models.efficientnet_b0().state_dict()
    assert find_encoder(theirs, path, arch="efficientnet_b0").arch == "torchvision:efficientnet_b0"
    of_timm = timm.create_model("efficientnet_b0").state_dict()
    assert find_encoder(of_timm, path, arch="efficientnet_b0").arch == "timm:efficientnet_b0"
    lacking = {f"module.{n}": w for n, w in of_timm.items() if not n.startswith("bn2.bias")}
    with pytest.raises(
        UserError, match=r"no efficientnet_b0, by .* \(below module .* no bn2\.bias\); found: module\.conv_s"
    ):
        find_encoder(lacking, path, arch="efficientnet_b0")
    with pytest.raises(UserError, match=r"neither a model of torchvision nor of timm; did you mean .*vit_b_16"):
        load_backbone(path, arch="torchvision:vit_b_17")
    with pytest.raises(UserError, match=r"with cls_token of \(3,\), not \(1, 1, 64\)"):
        find_encoder({n: torch.ones(3) for n in timm.create_model("test_vit").state_dict()}, path, arch="test_vit")


def test_only_known_heads_may_stand_beside_a_trunk(tmp_path, resnets, vits):
    content = trunk(resnets[0].state_dict()) | mlp("projection_head.") | {"adapter.weight": torch.ones(3)}
    with pytest.raises(UserError, match=r"below m stands another network, with adapter\.weight"):
        find_encoder({"m": content}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"below m stands another network, with blocks\.0\.adapter"):
        find_encoder(
            {"m": vits[0].state_dict() | {"blocks.0.adapter": torch.ones(3)}}, tmp_path / "x.pth", arch="test_vit"
        )


def test_a_refusal_says_what_the_file_holds(tmp_path, vits):
    content = {"state_dict": below("module.encoder.", vits[0].state_dict()), "epoch": 3}
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(
        UserError, match=r"no ResNet known to torchvision; found: state_dict\.module\.encoder; .* --arch"
    ):
        load_backbone(tmp_path / "x.pth")
    with pytest.raises(UserError, match="found: no tensors by name"):
        find_encoder({"epoch": 3}, tmp_path / "x.pth")


def test_a_file_of_another_kind_than_its_name(tmp_path, resnets):
    (tmp_path / "page.pth").write_bytes(b"<html>404</html>")
    (tmp_path / "empty.pth").touch()
    safetensors.torch.save_file(resnets[0].state_dict(), tmp_path / "x.pth")
    torch.save(resnets[0].state_dict(), tmp_path / "x.safetensors")
    for name, says in (
        ("page.pth", "it is not what torch.save writes"),
        ("empty.pth", "it is not what torch.save writes"),
        ("x.pth", "by its content; give it a name that ends in .safetensors"),
        ("x.safetensors", "what torch.save writes; give it a name that ends in .pth"),
    ):
        with pytest.raises(UserError, match=says):
            load_backbone(tmp_path / name)


@pytest.mark.parametrize("name", ["state_dict", "student", "classy_state_dict", "model"])
def test_a_file_with_classes_is_not_called_damaged(tmp_path, resnets, name):
    """What the message says to do leads to a file that is taken: DINO's and VISSL's weights have names of their own."""
    weights = resnets[0].state_dict()
    inside = {"base_model": {"model": {"trunk": weights}}} if name == "classy_state_dict" else weights
    torch.save({name: inside, "args": argparse.Namespace(lr=0.1)}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"holds an object of argparse\.Namespace besides its weights") as raised:
        load_backbone(tmp_path / "x.pth")
    assert "damaged" not in str(raised.value)
    call = str(raised.value).partition("torch.save(")[2].partition("; the weights")[0]
    exec(
        f"torch.save({call}".replace('"x.pth"', repr(str(tmp_path / "x.pth"))).replace(
            '"weights', f'"{tmp_path}/weights'
        )
    )
    assert load_backbone(tmp_path / "weights.pth")[1].arch == "resnet18"


def test_a_pickle_of_jax_is_not_called_a_file_of_torch(tmp_path):
    """As DeepMind's BYOL, which torch.load does not read at all."""
    (tmp_path / "res50x1.pkl").write_bytes(pickle.dumps({"experiment_state": np.ones(3)}))
    with pytest.raises(UserError, match=r"a pickle that torch\.load does not take, .* convert its weights to a state"):
        load_backbone(tmp_path / "res50x1.pkl")
