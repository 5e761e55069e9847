"""BYOL (Grill 2020): one view's prediction of the other, as a slowly following target network sees it.

loss = 2 − 2 cos(predictor(z1), t2) + 2 − 2 cos(predictor(z2), t1)      t: the target's, without gradient
target ← τ · target + (1 − τ) · online,  τ = 1 − (1 − τ₀) (cos(π k / K) + 1) / 2 at step k of K
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn

from pipeline.spec import BARLOW_TWINS_VIEWS, CIFAR_VIEWS
from train.config import PretrainConfig, projector_widths
from train.distributed import mean_over_ranks
from train.methods.contract import Method, Metrics, collapse_metrics
from train.model import Layers, make_projector


def momentum_at(step: int, stop_step: int, start: float) -> float:
    """τ after update number `step` (from 0) of `stop_step`: from `start` to 1 along half a cosine."""
    return 1 - (1 - start) * (math.cos(math.pi * step / stop_step) + 1) / 2


class BYOL(Method):
    """Backbone, projector and predictor, and the target that follows the first two."""

    # Barlow Twins took its two views from here.
    VIEWS = {"imagenet": BARLOW_TWINS_VIEWS, "cifar10": CIFAR_VIEWS}  # noqa: RUF012 (never changed)
    TOGETHER = ("backbone", "projector", "predictor", "target")

    def __init__(self, backbone: nn.Module, features: int, config: PretrainConfig):
        super().__init__(backbone, features, config)
        embedding_width = projector_widths(config.projector)[-1]
        self.predictor = make_projector(embedding_width, projector_widths(config.predictor))
        # Neither DistributedDataParallel nor the optimizer sees it; a checkpoint does.
        self.target = copy.deepcopy(Layers(backbone, self.projector)).requires_grad_(False)

    def outputs(self, views: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Both views' predictions, then both views' targets."""
        predictions = self.of_each_view(views, self.backbone, self.projector, self.predictor)
        with torch.no_grad():
            return *predictions, *self.of_each_view(views, self.target)

    def loss(
        self, p1: torch.Tensor, p2: torch.Tensor, t1: torch.Tensor, t2: torch.Tensor
    ) -> tuple[torch.Tensor, Metrics]:
        """Of predictions and targets, (B, D) each."""
        loss = (4 - 2 * F.cosine_similarity(p1, t2) - 2 * F.cosine_similarity(p2, t1)).mean()
        return loss, mean_over_ranks({"loss": loss} | collapse_metrics(t1))

    @torch.no_grad()
    def after_step(self, step: int, stop_step: int) -> None:
        """The target follows. Its batch norms keep statistics of their own, which nothing reads."""
        target: list[torch.Tensor] = [*self.target.parameters()]
        online: list[torch.Tensor] = [*self.backbone.parameters(), *self.projector.parameters()]
        torch._foreach_lerp_(target, online, 1 - momentum_at(step, stop_step, self.config.ema))
