"""Backbones by name, and the projector.

A backbone is a module (B, 3, H, W) → (B, D) whose parameters have torchvision's or timm's own names, so its
weights load there. torchvision's ResNets are looked up first, then timm's models; `torchvision:NAME` and `timm:NAME`
say whose network is meant. Both take seconds to import (torchvision brings torch's compiler), so each is imported
where a network is made and not by every --help.

    stem        of torchvision's ResNets: imagenet, 7×7 stride 2 and a max-pool; small, 3×3 stride 1 without one;
                solo-learn, the same padded by 2 instead of 1, as that project trains on CIFAR: a view of 32 px has
                maps of 34, 17, 9 and 5. Its initial weights too are torch's and torchvision's own
"""

import difflib
from typing import Any

import torch
from torch import nn

from pipeline.errors import UserError

# Channels of each stage. The first stage, on the largest maps, costs the most.
NARROW = {"resnet8_narrow": (16, 64, 128), "resnet10_narrow": (32, 64, 128, 256)}


def torchvision_resnets() -> list[str]:
    """resnet18 … wide_resnet101_2, every ResNet torchvision builds."""
    return _torchvision_names(include=["resne*", "wide_resnet*"])


def _torchvision_names(**which) -> list[str]:
    import torchvision

    return torchvision.models.list_models(module=torchvision.models, **which)


def network_names(arch: str) -> list[str]:
    """What a name given without its origin may mean, of "torchvision:…" and "timm:…"; a torchvision ResNet is itself.

    Raises UserError for a name that nobody knows, with the nearest known ones.
    """
    if arch in NARROW or arch.removeprefix("torchvision:") in torchvision_resnets():
        return [arch.removeprefix("torchvision:")]
    import timm

    # googlenet and inception_v3 normalize their input again if their weights are the published ones, and mnasnet has
    # two versions with the same names; a file of weights does not say which.
    left_out = ["googlenet", "inception*", "mnasnet*"]
    known = {"torchvision": _torchvision_names(exclude=left_out), "timm": timm.list_models()}
    qualified = {f"{origin}:{name}" for origin, names in known.items() for name in names}
    if found := [name for name in (arch, *(f"{origin}:{arch}" for origin in known)) if name in qualified]:
        return found
    near = difflib.get_close_matches(
        arch, sorted({*NARROW, *torchvision_resnets(), *known["timm"], *qualified}), n=4, cutoff=0.5
    )
    hint = f"did you mean {', '.join(near)}?" if near else "see torchvision's models and timm.list_models()"
    raise UserError(f"--arch {arch!r} is neither a model of torchvision nor of timm; {hint}")


def make_backbone(arch: str, stem: str = "imagenet") -> tuple[nn.Module, int]:
    """An untrained backbone and its number of features D. Weights come from torch's generator.

    ResNets of torchvision start with the last batch norm of every block at zero (Goyal 2017; Zbontar 2021), with the
    solo-learn stem at one, as there (solo/backbones/resnet/resnet.py).
    Raises UserError for an unknown name, with the nearest known ones, and for a stem that the network does not have.
    """
    if arch in NARROW and stem == "imagenet":  # they have one stem, and the flag its default
        return NarrowResNet(NARROW[arch]), NARROW[arch][-1]
    name = network_names(arch)[-1]  # timm's, where both have it
    if name in torchvision_resnets():
        backbone, features = _without_classifier(name, zero_init_residual=stem != "solo-learn")
        return (backbone if stem == "imagenet" else with_small_stem(backbone, stem)), features
    if stem != "imagenet":
        raise UserError(f"--stem {stem} is made for torchvision's ResNets, not for {arch}; pass --stem imagenet")
    if name.startswith("torchvision:"):
        return _without_classifier(name.removeprefix("torchvision:"))
    import timm

    model: Any = timm.create_model(name.removeprefix("timm:"), num_classes=0)
    return model, getattr(model, "head_hidden_size", model.num_features)


def _without_classifier(name: str, **flags) -> tuple[nn.Module, int]:
    """A classifier of torchvision whose last layer is the identity, and that layer's number of inputs."""
    import torchvision

    network: Any = torchvision.models.get_model(name, weights=None, **flags)
    layers = [(at, layer) for at, layer in network.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    at, last = layers[-1]
    network.set_submodule(at, nn.Identity())
    return network, last.in_features if isinstance(last, nn.Linear) else last.in_channels


def own_side_px(backbone: nn.Module) -> int | None:
    """The side of the images that a network is built for, as a ViT is by its positions; None where it has none."""
    about: Any = getattr(backbone, "pretrained_cfg", {})  # of timm's models
    side: Any = about["input_size"][-1] if about.get("fixed_input_size") else getattr(backbone, "image_size", None)
    return side


@torch.no_grad()
def require_side(network: nn.Module, arch: str, side_px: int) -> None:
    """Raises UserError where a network does not take views of this side, as most ViTs take those of one side only."""
    own = own_side_px(network)
    try:
        if ":" in arch or own not in (None, side_px):
            network.eval()(torch.zeros(1, 3, side_px, side_px))
    except (ValueError, RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(
            f"{arch} does not take views of {side_px} px ({reason}); pass --resolution {own or 224}"
        ) from error


def with_small_stem(resnet: nn.Module, stem: str = "small") -> nn.Module:
    """For images of about 32 px: the 7×7 stride-2 convolution becomes 3×3 stride 1, the max-pool goes."""
    conv1 = nn.Conv2d(3, 64, 3, stride=1, padding=2 if stem == "solo-learn" else 1, bias=False)
    if stem == "small":  # solo-learn leaves torch's own weights (solo/methods/base.py, line 200)
        nn.init.kaiming_normal_(conv1.weight, mode="fan_out", nonlinearity="relu")
    resnet.conv1, resnet.maxpool = conv1, nn.Identity()
    return resnet


class NarrowBlock(nn.Module):
    """He 2016's basic block of two 3×3 convolutions, the second batch norm at zero: (B, in, H, W) → (B, out, …)."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        nn.init.zeros_(self.bn2.weight)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride > 1:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


class NarrowResNet(nn.Module):
    """NARROW's, for small images on a CPU: a 3×3 stride-2 stem and a basic block of each width.

    Parameters have torchvision's names. Without torchvision and timm, whose import takes longer than its first steps.
    """

    def __init__(self, widths: tuple[int, ...]):
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, stride=2, padding=1, bias=False)
        self.bn1, self.relu = nn.BatchNorm2d(widths[0]), nn.ReLU(inplace=True)
        for i, (inputs, outputs) in enumerate(zip((widths[0], *widths), widths, strict=False), 1):
            self.add_module(f"layer{i}", nn.Sequential(NarrowBlock(inputs, outputs, stride=1 if i == 1 else 2)))
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        for name, stage in self.named_children():
            if name.startswith("layer"):
                x = stage(x)
        return x.mean((2, 3))


class Layers(nn.Sequential):
    """nn.Sequential that --compile compiles: torch 2.11's compile() passes over a module without its own forward."""

    def forward(self, x):
        for layer in self:
            x = layer(x)
        return x


def make_projector(features: int, widths: list[int], *, norm: bool = True, bias: bool = False) -> Layers:
    """Linear, BN, ReLU for every width but the last, which is a bare Linear. (B, D_in) → (B, D_out).

    Without `norm` there is no BN; with `bias` the linear layers have one.
    """
    layers: list[nn.Module] = []
    for width in widths[:-1]:
        layers += [nn.Linear(features, width, bias=bias), *([nn.BatchNorm1d(width)] if norm else [])]
        layers += [nn.ReLU(inplace=True)]
        features = width
    return Layers(*layers, nn.Linear(features, widths[-1], bias=bias))
