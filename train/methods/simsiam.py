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
from train.methods.contract import Method, Metrics, collapse_metrics
from train.model import make_projector

# Chen & He 2021, section 3. Bilinear is torchvision's default, which the published code leaves (main_simsiam.py, 230).
_VIEW = ViewSpec(area=(0.2, 1.0), interpolation="bilinear", saturation=0.4, p_blur=0.5)
_CIFAR_VIEW = ViewSpec(saturation=0.4, p_blur=0.5)  # solo-learn's for CIFAR-10, bicubic as all of its


class SimSiam(Method):
    """Backbone, projector and predictor."""

    VIEWS = {"imagenet": (_VIEW, _VIEW), "cifar10": (_CIFAR_VIEW, _CIFAR_VIEW)}  # noqa: RUF012 (never changed)
    TOGETHER = ("backbone", "projector", "predictor")

    def __init__(self, backbone: nn.Module, features: int, config: PretrainConfig):
        super().__init__(backbone, features, config)
        widths = [projector_widths(config.projector)[-1], *projector_widths(config.predictor)]
        self.projector.append(nn.BatchNorm1d(widths[0], affine=False))
        self.predictor = make_projector(widths[0], widths[1:])
        self.predictor[-1] = nn.Linear(widths[-2], widths[-1])  # with a bias, as published

    def outputs(self, views: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Both views' embeddings, then both views' predictions."""
        z = super().outputs(views)
        return *z, *self.of_each_view(z, self.predictor)

    def loss(
        self, z1: torch.Tensor, z2: torch.Tensor, p1: torch.Tensor, p2: torch.Tensor
    ) -> tuple[torch.Tensor, Metrics]:
        """Of embeddings and predictions, (B, D) each."""
        if self.config.stop_gradient:
            z1, z2 = z1.detach(), z2.detach()
        loss = -(F.cosine_similarity(p1, z2).mean() + F.cosine_similarity(p2, z1).mean()) / 2
        return loss, mean_over_ranks({"loss": loss} | collapse_metrics(z1))

    def parameter_groups(self) -> list[dict]:
        """Plain SGD, weight decay on everything; the predictor's learning rate stays where it starts."""
        assert self.config.lr_weights is not None, "flags.resolved fills it in"
        peak_lr = self.config.lr_weights * self.config.global_batch / 256
        common = {"peak_lr": peak_lr, "weight_decay": self.config.weight_decay, "adapt": False}
        predictor = list(self.predictor.parameters())
        others = [*self.backbone.parameters(), *self.projector.parameters()]
        return [
            {"name": "weights", "params": others, **common},
            {"name": "predictor", "params": predictor, "constant_lr": True, **common},
        ]
