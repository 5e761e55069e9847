"""Barlow Twins with parts taken out or put in: the ablations of Zbontar 2021, section 4, tables 5 and 6.

    --loss invariance      Σ_i (C_ii − 1)² alone         --loss redundancy   lambd · Σ_{i≠j} C_ij² alone
    --loss cross-entropy   −log Σ_i exp(C_ii/τ) + lambd · log Σ_{i≠j} exp(max(C_ij, 0)/τ)
    --embedding-norm       what C is made of: see `embed`
    --projector-norm none  no batch norm in the projector's hidden layers
    --predictor, --stop-gradient   one on the first view's side, the other on the second's

C goes through autograd here, so a step holds several D×D matrices; the update is the same at any world size all
the same. The unchanged method has its own, leaner file, barlow_twins.py.
"""

import torch
import torch.nn.functional as F
from torch import nn

from train.config import PretrainConfig, projector_widths
from train.distributed import mean_over_ranks, sum_over_ranks, world_size
from train.methods.barlow_twins import CORNER, BarlowTwins
from train.methods.contract import Metrics, collapse_metrics
from train.model import make_projector


def is_ablated(config: PretrainConfig) -> bool:
    """Whether a configuration asks for any of these ablations."""
    changed = config.loss != "barlow-twins" or config.embedding_norm != "batch" or config.projector_norm != "batch"
    return changed or bool(config.predictor) or config.stop_gradient


def ablated_loss(c: torch.Tensor, config: PretrainConfig) -> torch.Tensor:
    """C (D, D) → the loss, 0-d, before --loss-scale."""
    diagonal, itself = c.diagonal(), torch.eye(len(c), dtype=torch.bool, device=c.device)
    # Masks and no c[others]: how many entries a boolean index takes is a number that the GPU must be asked for.
    if config.loss == "cross-entropy":
        attract = torch.logsumexp(diagonal / config.temperature, 0)
        others = (c.clamp(min=0) / config.temperature).masked_fill(itself, float("-inf"))
        return config.lambd * torch.logsumexp(others, (0, 1)) - attract
    invariance, redundancy = (diagonal - 1).square().sum(), c.masked_fill(itself, 0).square().sum()
    weights = {"barlow-twins": (1, config.lambd), "invariance": (1, 0), "redundancy": (0, config.lambd)}[config.loss]
    return weights[0] * invariance + weights[1] * redundancy


class AblatedBarlowTwins(BarlowTwins):
    """Barlow Twins with what the flags above take out or put in."""

    def __init__(self, backbone: nn.Module, features: int, config: PretrainConfig):
        super().__init__(backbone, features, config)
        widths = projector_widths(config.projector)
        if config.projector_norm == "none":
            self.projector = make_projector(features, widths, norm=False)
        if config.predictor:
            self.predictor = make_projector(widths[-1], projector_widths(config.predictor))

    def normalized(self, z: torch.Tensor) -> torch.Tensor:
        """Embeddings (B, D) as C takes them, by --embedding-norm; means are those of the global batch."""
        if self.config.embedding_norm == "none":
            return z - sum_over_ranks(z.mean(0)) / world_size()
        z = self.normalize(z)
        return F.normalize(z, dim=1) if self.config.embedding_norm == "feature" else z

    def outputs(self, views: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """The embeddings: with --predictor the first view's prediction, with --stop-gradient the second's detached."""
        z1, z2 = super().outputs(views)
        return self.predictor(z1) if self.config.predictor else z1, z2.detach() if self.config.stop_gradient else z2

    def loss(self, z1: torch.Tensor, z2: torch.Tensor) -> tuple[torch.Tensor, Metrics]:
        """Of embeddings (B, D) twice, through C as the configuration makes it."""
        collapse = mean_over_ranks(collapse_metrics(z1))
        z1, z2 = self.normalized(z1), self.normalized(z2)
        self.corner = [z[:, :CORNER].detach().clone() for z in (z1, z2)]
        images = 1 if self.config.embedding_norm == "feature" else len(z1) * world_size()
        c = sum_over_ranks(z1.T @ z2) / images
        loss = ablated_loss(c, self.config) * self.config.loss_scale
        return loss, {"loss": loss.detach()} | matrix_metrics(c.detach()) | collapse


def matrix_metrics(c: torch.Tensor) -> dict[str, torch.Tensor]:
    """Barlow Twins' own metrics of C (D, D)."""
    diagonal, size = c.diagonal(), len(c)
    off_diagonal = c.square().sum() - diagonal.square().sum()
    return {
        "on_diagonal": (diagonal - 1).square().sum(),
        "off_diagonal": off_diagonal,
        "diagonal_mean": diagonal.mean(),
        "off_diagonal_rms": (off_diagonal / max(size * (size - 1), 1)).sqrt(),
    }
