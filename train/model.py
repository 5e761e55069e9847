"""Backbones by name, the projector, and batch norm over all ranks.

A backbone is a module (B, 3, H, W) → (B, D) whose parameters have torchvision's or timm's own names, so its
weights load there. torchvision's ResNets are looked up first, then timm's models.
"""

import difflib

import timm
import torch
import torchvision
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.command import UserError
from train.distributed import sum_over_ranks, world_size


def torchvision_resnets() -> list[str]:
    """resnet18 … wide_resnet101_2, every ResNet torchvision builds."""
    return torchvision.models.list_models(module=torchvision.models, include=["resne*", "wide_resnet*"])


def make_backbone(arch: str, stem: str = "imagenet") -> tuple[nn.Module, int]:
    """An untrained backbone and its number of features D. Weights come from torch's generator.

    ResNets of torchvision start with the last batch norm of every block at zero (Goyal 2017; Zbontar 2021).
    Raises UserError for an unknown name, with the nearest known ones, and for a stem the network has not.
    """
    if arch in torchvision_resnets():
        backbone = torchvision.models.get_model(arch, weights=None, zero_init_residual=True)
        features = backbone.fc.in_features
        backbone.fc = nn.Identity()
        return (with_small_stem(backbone) if stem == "small" else backbone), features
    if arch not in timm.list_models():
        known = sorted({*torchvision_resnets(), *timm.list_models()})
        near = difflib.get_close_matches(arch, known, n=4, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else "see torchvision's ResNets and timm.list_models()"
        raise UserError(f"--arch {arch!r} is neither a ResNet of torchvision nor a model of timm; {hint}")
    if stem != "imagenet":
        raise UserError(f"--stem {stem} is made for torchvision's ResNets, not for {arch}; leave it out")
    backbone = timm.create_model(arch, num_classes=0)
    return backbone, getattr(backbone, "head_hidden_size", backbone.num_features)


def with_small_stem(resnet: nn.Module) -> nn.Module:
    """For images of about 32 px: the 7×7 stride-2 convolution becomes 3×3 stride 1, the max-pool goes."""
    resnet.conv1 = nn.Conv2d(3, resnet.conv1.out_channels, 3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(resnet.conv1.weight, mode="fan_out", nonlinearity="relu")
    resnet.maxpool = nn.Identity()
    return resnet


def make_projector(features: int, widths: list[int]) -> nn.Sequential:
    """Linear, BN, ReLU for every width but the last, which is a bare Linear; no biases. (B, D_in) → (B, D_out)."""
    layers: list[nn.Module] = []
    for width in widths[:-1]:
        layers += [nn.Linear(features, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(inplace=True)]
        features = width
    return nn.Sequential(*layers, nn.Linear(features, widths[-1], bias=False))


class CrossRankBatchNorm(_BatchNorm):
    """BatchNorm1d/2d whose statistics are those of the global batch, on any device.

    nn.SyncBatchNorm's equal where that refuses to run (CPU tensors). Every rank must hold as many images as
    the others, as the loaders' full batches do. Input (B, C) or (B, C, H, W); statistics are float32 or finer.
    """

    def _check_input_dim(self, x):
        if x.dim() not in (2, 4):
            raise ValueError(f"expected (B, C) or (B, C, H, W), found {tuple(x.shape)}")

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        self._check_input_dim(x)
        dims = (0, 2, 3)[: x.dim() - 1]
        wide = x if x.dtype == torch.float64 else x.float()
        mean = sum_over_ranks(wide.mean(dims, keepdim=True)) / world_size()
        centred = wide - mean
        variance = sum_over_ranks(centred.square().mean(dims, keepdim=True)) / world_size()
        if self.track_running_stats:
            self._update_running(mean.detach(), variance.detach(), x.numel() // x.shape[1] * world_size())
        out = centred * torch.rsqrt(variance + self.eps)
        if self.affine:
            shape = (1, -1, 1, 1)[: x.dim()]
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(x.dtype)

    @torch.no_grad()
    def _update_running(self, mean, variance, count):
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean.flatten(), self.momentum)
        self.running_var.lerp_(variance.flatten() * (count / (count - 1)), self.momentum)


def _to_cross_rank(norm: _BatchNorm) -> CrossRankBatchNorm:
    new = CrossRankBatchNorm(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    new._parameters, new._buffers = norm._parameters, norm._buffers
    return new


def with_global_batch_norm(module: nn.Module, device: torch.device) -> nn.Module:
    """Every batch norm inside made to see the global batch. Parameter names stay. At world size 1: unchanged.

    On a GPU SyncBatchNorm, on the CPU ours; there a network with its own kind of batch norm is a UserError.
    """
    if world_size() == 1:
        return module
    if device.type == "cuda":
        return convert_sync_batchnorm(module)
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) in (nn.BatchNorm1d, nn.BatchNorm2d):
                setattr(parent, name, _to_cross_rank(child))
            elif isinstance(child, _BatchNorm) and not isinstance(child, CrossRankBatchNorm):
                raise UserError(
                    f"this network's {type(child).__name__} has no form that sees all ranks on a CPU; "
                    "run one process, use a GPU, or choose a ResNet of torchvision"
                )
    return module
