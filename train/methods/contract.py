"""What a method is: one file beside this one, one nn.Module made of a backbone and the configuration.

The loop in pretrain.py calls what stands here and nothing else, and --compile compiles each child module.
Heads, loss and any further state are the method's own affair; `state_dict` holds everything a resumed run needs
beyond step and optimizer.
"""

from typing import Protocol

import torch
from torch import nn

from pipeline.spec import ViewSpec


class Method(Protocol):
    """
    VIEWS     the value of --views → the view table, one ViewSpec a view
    backbone  the network that evaluations keep; all else is dropped after pretraining
    """

    VIEWS: dict[str, tuple[ViewSpec, ...]]
    backbone: nn.Module

    def forward(self, views: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """V tensors (B, C, H, W) of this rank → the loss and its metrics.

        The loss is 0-d float32; its mean over ranks is what is minimized. The metrics are 0-d and detached,
        "loss" among them, and equal on all ranks.
        """

    def parameter_groups(self) -> list[dict]:
        """The optimizer's groups: params, name, peak_lr, weight_decay, adapt (train/lars.py)."""

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> object: ...
