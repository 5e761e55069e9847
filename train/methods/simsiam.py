"""SimSiam (Chen & He 2021): one view's prediction of the other, with the gradient stopped on that other side.

    loss = −cos(predictor(z1), stop(z2)) / 2 − cos(predictor(z2), stop(z1)) / 2

Without the stop everything collapses to a line or a point, which effective_dimensions and embedding_spread show.
"""

import torch
import torch.nn.functional as F
from torch import nn

from pipeline.spec import ViewSpec
from train.config import PretrainConfig, projector_widths
from train.distributed import mean_over_ranks
from train.methods.contract import collapse_metrics
from train.model import make_projector
from train.together import of_each_view

_VIEW = ViewSpec(area=(0.2, 1.0), saturation=0.4, p_blur=0.5)  # Chen & He 2021, section 3
_CIFAR_VIEW = ViewSpec(saturation=0.4, p_blur=0.5)  # solo-learn's for CIFAR-10


class SimSiam(nn.Module):
    VIEWS = {"imagenet": (_VIEW, _VIEW), "cifar10": (_CIFAR_VIEW, _CIFAR_VIEW)}  # noqa: RUF012 (never changed)
    TOGETHER = ("backbone", "projector", "predictor")

    def __init__(self, backbone: nn.Module, features: int, config: PretrainConfig):
        super().__init__()
        widths, hidden = projector_widths(config.projector), projector_widths(config.predictor)
        self.backbone = backbone
        self.projector = make_projector(features, widths).append(nn.BatchNorm1d(widths[-1], affine=False))
        self.predictor = make_projector(widths[-1], hidden)
        self.predictor[-1] = nn.Linear(self.predictor[-1].in_features, hidden[-1])  # with a bias, as published
        self.config = config

    def forward(self, views: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        z = of_each_view(views, self.config.views_together, self.backbone, self.projector)
        p = of_each_view(z, self.config.views_together, self.predictor)
        with torch.autocast(views[0].device.type, enabled=False):
            z1, z2, p1, p2 = (one if one.dtype == torch.float64 else one.float() for one in (*z, *p))
            if self.config.stop_gradient:
                z1, z2 = z1.detach(), z2.detach()
            loss = -(F.cosine_similarity(p1, z2).mean() + F.cosine_similarity(p2, z1).mean()) / 2
            metrics = {"loss": loss} | collapse_metrics(z1)
        return loss, mean_over_ranks(metrics)

    def parameter_groups(self) -> list[dict]:
        """Plain SGD, weight decay on everything; the predictor's learning rate stays where it starts."""
        common = {"peak_lr": self.config.lr_weights * self.config.global_batch / 256, "adapt": False}
        common["weight_decay"] = self.config.weight_decay
        predictor = list(self.predictor.parameters())
        others = [*self.backbone.parameters(), *self.projector.parameters()]
        return [
            {"name": "weights", "params": others, **common},
            {"name": "predictor", "params": predictor, "constant_lr": True, **common},
        ]

    def after_step(self, step: int, stop_step: int) -> None:
        """Nothing moves beside the optimizer."""
