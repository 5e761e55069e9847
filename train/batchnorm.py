"""Batch norm over all ranks: every statistic is the global batch's, so a network is the same at any world size.

    forward    mean and variance of this rank's images ── one message ──▶ those of the global batch
    backward   Σ dy and Σ dy · x̂ of this rank's images ── one message ──▶ those of the global batch

nn.SyncBatchNorm does the same on GPUs, but it asks the GPU for numbers three times a layer, ends the graph that
torch.compile makes there, and refuses CPU tensors. Here the message alone is an operation that the compiler does not
look into; what is computed before and after it becomes part of the kernels around it.
"""

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import library, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.errors import UserError
from train.distributed import world_size

Network = TypeVar("Network", bound=nn.Module)


@library.custom_op("barlow_twins::from_all_ranks", mutates_args=())
def from_all_ranks(x: torch.Tensor) -> torch.Tensor:
    """Every rank's x, any shape, in the order of the ranks: (world_size, ...). Not seen by autograd."""
    every = x.new_empty(world_size(), *x.shape)
    if world_size() == 1:
        return every.copy_(x[None])
    dist.all_gather_into_tensor(every.flatten(0, 1), x.contiguous())
    return every


@from_all_ranks.register_fake
def _(x):
    return x.new_empty(world_size(), *x.shape)


def _dims_and_shape(x: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Over which dimensions of (B, C) or (B, C, H, W) a channel's statistics go, and how (C,) lies beside x."""
    return ((0,), (1, -1)) if x.dim() == 2 else ((0, 2, 3), (1, -1, 1, 1))


def _to(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x.to(dtype), which is left out where x has that type already.

    Compiled by torch 2.11, an autograd function returns its intermediate results too, as outputs without gradients. If
    one of them is the same tensor as the real output, which a conversion to its own type gives, all gradients are 0.
    """
    return x if x.dtype == dtype else x.to(dtype)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return _to(x, torch.float64 if x.dtype == torch.float64 else torch.float32)


class _GlobalBatchNorm(torch.autograd.Function):
    """(x, weight (C,) or None, bias (C,) or None, eps) → output; mean, variance (C,) and count () of the global batch.

    `count` is of values a channel; ranks may hold different shares. Written out by hand, because then x is all that
    is kept of the activations, in its own type. The gradients of weight and bias are this rank's, as every
    parameter's: DistributedDataParallel averages them.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        dims, shape = _dims_and_shape(x)
        wide = _wide(x)
        own_variance, own_mean = torch.var_mean(wide, dims, correction=0)
        own_count = own_mean.new_full((1,), x.numel() // x.shape[1])
        every = from_all_ranks(torch.cat([own_mean, own_variance, own_count]))
        means, variances, counts = every.split([x.shape[1], x.shape[1], 1], 1)
        count = counts.sum()
        # From the ranks' means and not from Σ x²: that cancels where the mean is large.
        mean = (means * (counts / count)).sum(0)
        variance = ((variances + (means - mean).square()) * (counts / count)).sum(0)
        inverse = torch.rsqrt(variance + eps)
        out = (wide - mean.view(shape)) * inverse.view(shape)
        if weight is not None:
            out = out * weight.view(shape) + bias.view(shape)
        ctx.save_for_backward(x, weight, mean, inverse, count)
        ctx.mark_non_differentiable(mean, variance, count)
        return _to(out, x.dtype), mean, variance, count

    @staticmethod
    def backward(ctx, grad, *_):
        x, weight, mean, inverse, count = ctx.saved_tensors
        dims, shape = _dims_and_shape(x)
        grad = _wide(grad)
        normalized = (_wide(x) - mean.view(shape)) * inverse.view(shape)
        own = torch.stack([grad.sum(dims), (grad * normalized).sum(dims)])
        along_one, along_normalized = (from_all_ranks(own).sum(0) / count).unbind()
        rest = grad - along_one.view(shape) - normalized * along_normalized.view(shape)
        scale = inverse if weight is None else inverse * weight
        of_bias, of_weight = own.unbind() if weight is not None else (None, None)
        return _to(rest * scale.view(shape), x.dtype), of_weight, of_bias, None


class CrossRankBatchNorm(_BatchNorm):
    """BatchNorm1d/2d whose statistics are those of the global batch, on any device.

    Input (B, C) or (B, C, H, W); statistics are float32 or finer, the output has the input's type and memory format.
    """

    def _check_input_dim(self, x):
        if x.dim() not in (2, 4):
            raise ValueError(f"expected (B, C) or (B, C, H, W), found {tuple(x.shape)}")

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        self._check_input_dim(x)
        out, mean, variance, count = _GlobalBatchNorm.apply(x, self.weight, self.bias, self.eps)
        if self.track_running_stats:
            self._update_running(mean, variance * (count / (count - 1)))
        return out

    @torch.no_grad()
    def _update_running(self, mean, unbiased_variance):
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(unbiased_variance, self.momentum)


class CrossRankBatchNormAct(CrossRankBatchNorm):
    """timm's BatchNormAct2d: with the dropout and the activation behind it."""

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


def _to_cross_rank(norm: _BatchNorm) -> CrossRankBatchNorm:
    """Raises UserError for a kind of batch norm that is neither torch's nor timm's for (B, C) or (B, C, H, W)."""
    kind: type[CrossRankBatchNorm] | None = None
    if type(norm) in (nn.BatchNorm1d, nn.BatchNorm2d):
        kind = CrossRankBatchNorm
    elif type(norm).__module__.startswith("timm."):  # seconds to import, where no network brought it
        from timm.layers import BatchNormAct2d

        kind = CrossRankBatchNormAct if type(norm) is BatchNormAct2d else None
    if kind is None or norm.momentum is None:
        what = type(norm).__name__ + ("" if kind is None else ", which averages all batches alike (momentum None),")
        raise UserError(
            f"this network's {what} has no form here that sees all ranks; "
            "run one process, or choose a ResNet of torchvision"
        )
    new = kind(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    new._parameters, new._buffers, new._modules = norm._parameters, norm._buffers, norm._modules
    return new.train(norm.training)


def with_global_batch_norm(module: Network) -> Network:
    """Every batch norm inside made to see the global batch. Parameter names stay. At world size 1: unchanged."""
    if world_size() == 1:
        return module
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, _BatchNorm) and not isinstance(child, CrossRankBatchNorm):
                setattr(parent, name, _to_cross_rank(child))
    return module
