"""Batch norm over groups of a batch's images, as processes that do not synchronize it leave it.

    a batch ──▶ groups of neighbours ──▶ each normalized by its own mean and variance ──▶ the batch again
                the first one's statistics become the running ones

Barlow Twins' evaluate.py (lines 37, 96 and 147) fine-tunes with plain batch norm on 8 GPUs of 32 images each.
DistributedDataParallel averages the gradients, and before each step overwrites every process' running statistics with
those of rank 0, which alone is validated (line 181). So one process with eight groups makes the same update; a test
compares it with processes.
"""

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def groups_of(batch: int, most: int) -> int:
    """How many groups of at most `most` images a batch makes, of sizes that differ by one at the most."""
    return -(-batch // most)


def _forward(norm: _BatchNorm, most: int, x: torch.Tensor) -> torch.Tensor:
    """The norm's own forward pass, of each group when it trains."""
    forward = type(norm).forward
    if not norm.training:
        return forward(norm, x)
    first, *others = x.tensor_split(groups_of(len(x), most))
    made, tracked = [forward(norm, first)], norm.track_running_stats
    norm.track_running_stats = False
    made += [forward(norm, part) for part in others]
    norm.track_running_stats = tracked
    return torch.cat(made)


@contextlib.contextmanager
def norm_groups(network: nn.Module, most: int) -> Iterator[None]:
    """While it is entered, every batch norm inside trains on groups of at most `most` images; 0: on the whole batch.

    Images that are neighbours in the batch share a group. Names, weights and evaluation stay what they are.
    """
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)] if most else []
    for norm in norms:
        vars(norm)["forward"] = functools.partial(_forward, norm, most)
    try:
        yield
    finally:
        for norm in norms:
            del vars(norm)["forward"]
