"""Backbones by name, and the projector.

A backbone is a module (B, 3, H, W) → (B, D) whose parameters have torchvision's or timm's own names, so its
weights load there. torchvision's ResNets are looked up first, then timm's models. Both take seconds to import
(torchvision brings torch's compiler), so each is imported where a network is made and not by every --help.
"""

import difflib
from typing import Any

from torch import nn

from pipeline.errors import UserError


def torchvision_resnets() -> list[str]:
    """resnet18 … wide_resnet101_2, every ResNet torchvision builds."""
    import torchvision

    return torchvision.models.list_models(module=torchvision.models, include=["resne*", "wide_resnet*"])


def resnet10_narrow() -> nn.Module:
    """For small images on a CPU: four basic blocks of 32, 64, 128, 256 channels behind a 3×3 stride-2 stem."""
    import timm
    from timm.models.resnet import BasicBlock

    backbone: Any = timm.create_model("resnet18", num_classes=0, layers=(1, 1, 1, 1), channels=(32, 64, 128, 256))
    backbone.conv1 = nn.Conv2d(3, 32, 3, stride=2, padding=1, bias=False)
    nn.init.kaiming_normal_(backbone.conv1.weight, mode="fan_out", nonlinearity="relu")
    backbone.bn1, backbone.maxpool = nn.BatchNorm2d(32), nn.Identity()
    block: Any = BasicBlock(32, 32)
    nn.init.zeros_(block.bn2.weight)
    backbone.layer1 = nn.Sequential(block)
    return backbone


def make_backbone(arch: str, stem: str = "imagenet") -> tuple[nn.Module, int]:
    """An untrained backbone and its number of features D. Weights come from torch's generator.

    ResNets of torchvision start with the last batch norm of every block at zero (Goyal 2017; Zbontar 2021).
    Raises UserError for an unknown name, with the nearest known ones, and for a stem that the network does not have.
    """
    if arch == "resnet10_narrow":
        return resnet10_narrow(), 256
    if arch in torchvision_resnets():
        import torchvision

        backbone = torchvision.models.get_model(arch, weights=None, zero_init_residual=True)
        features = backbone.fc.in_features
        backbone.fc = nn.Identity()
        return (with_small_stem(backbone) if stem == "small" else backbone), features
    import timm

    if arch not in timm.list_models():
        known = sorted({*torchvision_resnets(), *timm.list_models()})
        near = difflib.get_close_matches(arch, known, n=4, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else "see torchvision's ResNets and timm.list_models()"
        raise UserError(f"--arch {arch!r} is neither a ResNet of torchvision nor a model of timm; {hint}")
    if stem != "imagenet":
        raise UserError(f"--stem {stem} is made for torchvision's ResNets, not for {arch}; leave it out")
    model: Any = timm.create_model(arch, num_classes=0)
    return model, getattr(model, "head_hidden_size", model.num_features)


def with_small_stem(resnet: nn.Module) -> nn.Module:
    """For images of about 32 px: the 7×7 stride-2 convolution becomes 3×3 stride 1, the max-pool goes."""
    stem = nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    resnet.conv1, resnet.maxpool = stem, nn.Identity()
    return resnet


class Layers(nn.Sequential):
    """nn.Sequential that --compile compiles: torch 2.11's compile() passes over a module without its own forward."""

    def forward(self, x):
        for layer in self:
            x = layer(x)
        return x


def make_projector(features: int, widths: list[int], norm: bool = True) -> Layers:
    """Linear, BN, ReLU for every width but the last, which is a bare Linear; no biases. (B, D_in) → (B, D_out).

    Without `norm` there is no BN.
    """
    layers: list[nn.Module] = []
    for width in widths[:-1]:
        layers += [nn.Linear(features, width, bias=False), *([nn.BatchNorm1d(width)] if norm else [])]
        layers += [nn.ReLU(inplace=True)]
        features = width
    return Layers(*layers, nn.Linear(features, widths[-1], bias=False))
