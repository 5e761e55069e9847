"""Both views through the networks in one forward pass: half as many kernels to start, each on twice the images.

    --views-together    z1, z2 = networks(cat(view 1, view 2)), each batch norm still over one view at a time

Everything but batch norm treats each image by itself, so the update is that of one pass a view, up to the rounding of
sums in another order; only dropout draws other masks. A batch norm takes its part of each view in turn: statistics of
that view alone, and running statistics that move once for view 1 and then for view 2, as they do in two passes.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

VIEWS = 2


def of_each_view(views: Sequence[torch.Tensor], together: bool, *networks: nn.Module) -> tuple[torch.Tensor, ...]:
    """What the networks, one behind the other, make of every view (B, ...); together in one pass if asked so."""
    inputs = [torch.cat(tuple(views))] if together else views
    outputs = []
    for x in inputs:
        for network in networks:
            x = network(x)
        outputs.append(x)
    return outputs[0].chunk(len(views)) if together else tuple(outputs)


def keep_views_apart(method: nn.Module) -> None:
    """Lets the batch norms of the networks that take both views together see one view at a time. In place.

    Parameter names stay. After whatever replaces batch norms, and before anything is compiled.
    """
    for name in method.TOGETHER:
        for module in getattr(method, name).modules():
            if isinstance(module, _BatchNorm):
                module.forward = partial(forward_by_view, module.forward)  # partial: a deep copy runs its own weights


def forward_by_view(forward: Callable, x: torch.Tensor) -> torch.Tensor:
    """`forward`, a batch norm's, of both views in x (2B, ...), one after the other. Evaluating, it is the same."""
    if not forward.__self__.training:
        return forward(x)
    return torch.cat([forward(view) for view in x.chunk(VIEWS)])
