"""VICReg (Bardes 2022): views agree, every dimension varies, no two dimensions say the same.

    loss = 25 · mean (z1 − z2)² + 25 · variance + 1 · covariance
    variance    half the mean over dimensions of max(0, 1 − √(var + 1e-4)), for each view
    covariance  Σ_{i≠j} cov_ij² / D, for each view

Variance and covariance are those of the global batch, on every rank; the gather passes gradients back, summed over
ranks, and DistributedDataParallel's mean divides them again: the gradient is the global loss's.
"""

import torch
import torch.nn.functional as F

from pipeline.spec import BARLOW_TWINS_VIEWS, ViewSpec
from train.distributed import gather_over_ranks
from train.methods.contract import Method, Metrics, collapse_metrics

INVARIANCE, VARIANCE, COVARIANCE = 25.0, 25.0, 1.0  # Bardes 2022, section 4.2
_CIFAR_VIEW = ViewSpec(area=(0.2, 1.0), p_solarize=0.1)  # solo-learn's for CIFAR-10


def variance_and_covariance(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, D) of the global batch → the two terms of one view, 0-d."""
    centred = z - z.mean(0)
    deviation = (centred.square().sum(0) / (len(z) - 1) + 1e-4).sqrt()
    covariance = centred.T @ centred / (len(z) - 1)
    off_diagonal = covariance.square().sum() - covariance.diagonal().square().sum()
    return F.relu(1 - deviation).mean() / 2, off_diagonal / z.shape[1]


class VICReg(Method):
    """Backbone and projector."""

    VIEWS = {"imagenet": BARLOW_TWINS_VIEWS, "cifar10": (_CIFAR_VIEW, _CIFAR_VIEW)}  # noqa: RUF012 (never changed)

    def loss(self, z1: torch.Tensor, z2: torch.Tensor) -> tuple[torch.Tensor, Metrics]:
        """Of embeddings (B, D) twice; the terms are those of the global batch."""
        z1, z2 = gather_over_ranks(z1), gather_over_ranks(z2)
        invariance = F.mse_loss(z1, z2)
        variance, covariance = (sum(t) for t in zip(*map(variance_and_covariance, (z1, z2)), strict=True))
        loss = INVARIANCE * invariance + VARIANCE * variance + COVARIANCE * covariance
        metrics = {"loss": loss, "invariance": invariance, "variance": variance, "covariance": covariance}
        metrics |= collapse_metrics(z1)
        return loss, {name: value.detach() for name, value in metrics.items()}  # equal on all ranks already
