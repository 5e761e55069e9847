"""Batch norm over all ranks: every statistic is the global batch's, so a network is the same at any world size.

nn.SyncBatchNorm does this on GPUs and refuses CPU tensors; `CrossRankBatchNorm` does it on any device.
"""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.command import UserError
from train.distributed import sum_over_ranks, world_size


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
        from timm.layers import convert_sync_batchnorm  # knows timm's own batch norms beside torch's

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
