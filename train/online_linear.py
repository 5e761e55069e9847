"""A linear layer trained beside the encoder, on features that it cannot change: the online linear accuracy.

    training        ── step ────────────────────── step ────────────────────── step ──
                         └─ features, labels ─ layer    └─ features, labels ─ layer

As solo-learn trains its online classifier, whose accuracy its tables give (solo/methods/base.py, lines 324, 433, 521;
solo/args/pretrain.py, line 157): cross-entropy over the augmented views, learning rate 0.1 × global batch / 256 on the
run's schedule, momentum 0.9, no weight decay; LARS with its constants where the method has LARS, otherwise plain SGD.
For MoCo v2+ alone theirs has 0.3 instead of 0.1.

The layer has weights, gradients and an optimizer of its own, and draws no random number of the run, so backbone,
projector and their optimizer have the bits of a run without it. It steps after the update, outside a recorded graph, on
what the backbone left (`Method.features`), and reads nothing back. online_knn.py measures it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from train.config import PretrainConfig
from train.distributed import mean_over_ranks
from train.lars import LARS

PEAK_LR, ETA = 0.1, 0.02  # × global batch / 256; of LARS, clipped (solo-learn's scripts/pretrain/cifar/*.yaml)


class OnlineLinear:
    """`layer` (B, D) → (B, K) and its momentum, the same on all ranks. `adapt`: whether LARS adapts its weight."""

    def __init__(self, features: int, classes: int, config: PretrainConfig, *, adapt: bool, device: torch.device):
        self.layer = nn.utils.skip_init(nn.Linear, features, classes)
        generator = torch.Generator().manual_seed(config.seed)  # the run's own generator stays where it is
        for parameter in self.layer.parameters():
            nn.init.uniform_(parameter, -(features**-0.5), features**-0.5, generator=generator)  # as torch's default
        self.layer.to(device)
        groups = [{"params": [self.layer.weight], "adapt": adapt}, {"params": [self.layer.bias], "adapt": False}]
        self.optimizer = LARS(groups, eta=ETA, clip=True)
        self.peak_lr = PEAK_LR * config.global_batch / 256

    def step(self, features: list[torch.Tensor], labels: torch.Tensor, lr_share: float) -> None:
        """One update with what the backbone left of this rank's views, (B, D) or (2B, D) each, and the labels (B,).

        `lr_share` is the step's learning rate as a share of its peak. The gradient is that of the global batch.
        """
        parameters = list(self.layer.parameters())
        rows = torch.cat(features).to(parameters[0].dtype)
        loss = F.cross_entropy(self.layer(rows), labels.repeat(len(rows) // len(labels)))
        gradients = torch.autograd.grad(loss, parameters)
        flat = mean_over_ranks({"gradient": torch.cat([g.flatten() for g in gradients])})["gradient"]
        for parameter, gradient in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = gradient.view_as(parameter)
        for group in self.optimizer.param_groups:
            group["lr"] = self.peak_lr * lr_share
        self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {"layer": self.layer.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where that checkpoint was written."""
        self.layer.load_state_dict(state["layer"])
        self.optimizer.load_state_dict(state["optimizer"])
