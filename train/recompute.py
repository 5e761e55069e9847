"""Less memory for activations: they are computed anew in the backward pass instead of being kept.

    --activations blocks   block by block, for any network. Every bit of the update stays.
    --accumulate K         in K parts of the batch, for networks without batch norm. The same update up to the
                           rounding of other shapes; dropout draws other masks.

Both cost one more forward pass of the backbone, about a third more work. With parts, a first pass keeps the images
alone and collects all embeddings; the heads and the loss see the whole global batch, as Barlow Twins' matrix needs
it; the gradients of the embeddings then go back through one part after another, run again.

With batch norm in the backbone parts cannot be exact: the statistics of a layer need the outputs of the layer before
for the whole batch. Statistics of parts would be another method, with another result for every K.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from pipeline.errors import UserError


@contextlib.contextmanager
def kept_statistics(block: nn.Module) -> Iterator[None]:
    """Batch norms inside update copies of their running statistics: their own have seen this batch already."""
    norms = [(module, dict(module._buffers)) for module in block.modules() if isinstance(module, _BatchNorm)]
    for norm, buffers in norms:
        norm._buffers.update({name: buffer.clone() for name, buffer in buffers.items() if buffer is not None})
    try:
        yield
    finally:
        for norm, buffers in norms:
            norm._buffers.update(buffers)


def first_and_second_time(block: nn.Module) -> tuple:
    """The contexts in which a block runs in the forward pass and when it is computed anew."""
    return contextlib.nullcontext(), kept_statistics(block)


def blocks_of(backbone: nn.Module) -> list[nn.Module]:
    """The blocks of every stage, in order; none where a network is not built so.

    A stage is a Sequential right inside the backbone, a block one of its parts that has parts itself: a residual
    block of a ResNet, a transformer block.
    """
    stages = [stage for stage in backbone.children() if isinstance(stage, nn.Sequential)]
    return [block for stage in stages for block in stage if list(block.children())]


def recompute_blocks(backbone: nn.Module) -> None:
    """Lets every block of every stage keep its input alone. In place; parameter names stay.

    Raises UserError for a network without blocks.
    """
    blocks = blocks_of(backbone)
    if not blocks:
        raise UserError(
            f"--activations blocks finds no stages of blocks in this {type(backbone).__name__}; "
            "leave it out, or choose a ResNet or a vision transformer"
        )
    for block in blocks:
        contexts = partial(first_and_second_time, block)
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, context_fn=contexts)


def run_in_parts(backbone: nn.Module, parts: int) -> None:
    """Lets the backbone take a batch in parts of equal size, each run anew when its gradients come back. In place.

    Raises UserError where it has a batch norm.
    """
    norm = next((module for module in backbone.modules() if isinstance(module, _BatchNorm)), None)
    if norm is not None:
        raise UserError(
            f"--accumulate {parts} is exact only without batch norm, and this backbone has {type(norm).__name__}, whose"
            " statistics are those of the whole batch; use more ranks or --activations blocks, which keeps every"
            " bit, or an --arch without it, such as a vision transformer"
        )
    backbone.forward = partial(forward_in_parts, backbone.forward, parts)  # partial: a deep copy runs its own weights


def forward_in_parts(forward: Callable, parts: int, images: torch.Tensor) -> torch.Tensor:
    return torch.cat([checkpoint(forward, part, use_reentrant=False) for part in images.chunk(parts)])
