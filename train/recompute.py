"""Activation checkpointing: a block's activations are computed anew in the backward pass instead of being kept.

This trades one more forward pass of the backbone for most of its memory, and the update keeps every bit. Summing
gradients over parts of a batch, the usual way to a larger one, is not offered: it cannot be exact here. Barlow
Twins' matrix needs the embeddings of the whole global batch, which a first pass without gradients could collect
part by part; but every batch norm's statistics are those of its whole batch as well, and the ones of a layer need
the finished outputs of the layer before, for all parts. With statistics of parts it would be another method, with
another result for every number of parts. More ranks, or this, leave the method as it is.
"""

import contextlib
from collections.abc import Iterator
from functools import partial

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from pipeline.command import UserError


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


def recompute_blocks(backbone: nn.Module) -> None:
    """Lets every block of every stage keep its input alone. In place; parameter names stay.

    A stage is a Sequential right inside the backbone, a block one of its parts that has parts itself: a residual
    block of a ResNet, a transformer block. Raises UserError for a network that is not built so.
    """
    stages = [stage for stage in backbone.children() if isinstance(stage, nn.Sequential)]
    blocks = [block for stage in stages for block in stage if list(block.children())]
    if not blocks:
        raise UserError(
            f"--checkpoint-activations finds no stages of blocks in this {type(backbone).__name__}; "
            "leave it out, or choose a ResNet or a vision transformer"
        )
    for block in blocks:
        contexts = partial(first_and_second_time, block)
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, context_fn=contexts)
