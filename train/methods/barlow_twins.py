"""Barlow Twins (Zbontar 2021): the cross-correlation matrix of two views' embeddings, pulled to the identity.

    C = BN(z1)ᵀ BN(z2) / global batch                          (D, D), summed over ranks
    loss = scale · (Σ_i (C_ii − 1)² + lambd · Σ_{i≠j} C_ij²)   eq. 1

The embeddings go into one and the same C on every rank, so the loss is equal on all of them, and one update
is the same at any world size for the same global batch.
"""

import torch
import torch.distributed as dist
from torch import nn

from pipeline.spec import BARLOW_TWINS_VIEWS, CIFAR_VIEWS
from train.config import PretrainConfig, projector_widths
from train.distributed import mean_over_ranks, world_size
from train.methods.contract import Method, Metrics, collapse_metrics

ROWS = 2048  # rows of C that are reduced over ranks while the next ones are computed
CORNER = 64  # dimensions of C that are shown as a picture


def cross_correlation(z1: torch.Tensor, z2: torch.Tensor) -> torch.Tensor:
    """z1ᵀ z2 / global batch over all ranks: (B, D) twice → (D, D), not seen by autograd."""
    c = z1.new_empty(z1.shape[1], z2.shape[1])
    pending = []
    for first in range(0, len(c), ROWS):
        rows = slice(first, first + ROWS)
        torch.addmm(c[rows], z1[:, rows].T, z2, beta=0, alpha=1 / (len(z1) * world_size()), out=c[rows])
        if world_size() > 1:
            pending.append(dist.all_reduce(c[rows], async_op=True))
    for work in pending:
        work.wait()
    return c


class BarlowTwinsLoss(torch.autograd.Function):
    """(z1, z2, lambd) → loss, its two terms and the mean of C's diagonal; z1, z2 (B, D), normalized.

    Written out by hand, because then one D×D matrix is all it ever holds: C becomes the gradient in place.
    With G = dL/dC: dL/dz1 = z2 Gᵀ / N and dL/dz2 = z1 G / N, N the global batch. The mean over ranks that
    DistributedDataParallel takes divides by the world size once more, so here stands B instead of N.
    """

    @staticmethod
    def forward(ctx, z1, z2, lambd):
        c = cross_correlation(z1, z2)
        diagonal = c.diagonal().clone()
        on_diagonal = (diagonal - 1).square().sum()
        c.diagonal().zero_()
        off_diagonal = torch.linalg.vector_norm(c, dim=1).square().sum()  # in one go the CPU's is 1 % short at D = 8192
        loss = on_diagonal + lambd * off_diagonal
        c.mul_(2 * lambd)
        c.diagonal().copy_(2 * (diagonal - 1))
        ctx.save_for_backward(z1, z2, c)
        diagonal_mean = diagonal.mean()
        ctx.mark_non_differentiable(on_diagonal, off_diagonal, diagonal_mean)
        return loss, on_diagonal, off_diagonal, diagonal_mean

    @staticmethod
    def backward(ctx, grad, *_):
        z1, z2, g = ctx.saved_tensors
        scale = grad / len(z1)
        with torch.autocast(z1.device.type, enabled=False):
            return (z2 @ g.T).mul_(scale), (z1 @ g).mul_(scale), None


class BarlowTwins(Method):
    """Backbone, projector, and a batch norm without weights for the embeddings."""

    VIEWS = {"imagenet": BARLOW_TWINS_VIEWS, "cifar10": CIFAR_VIEWS}  # noqa: RUF012 (never changed)

    def __init__(self, backbone: nn.Module, features: int, config: PretrainConfig):
        super().__init__(backbone, features, config)
        embedding_width = projector_widths(config.projector)[-1]
        self.normalize = nn.BatchNorm1d(embedding_width, affine=False, track_running_stats=False)

    def loss(self, z1: torch.Tensor, z2: torch.Tensor) -> tuple[torch.Tensor, Metrics]:
        """Eq. 1 of embeddings (B, D) twice."""
        collapse = mean_over_ranks(collapse_metrics(z1))
        z1, z2 = self.normalize(z1), self.normalize(z2)
        self.corner = [z[:, :CORNER].detach().clone() for z in (z1, z2)]
        loss, on_diagonal, off_diagonal, diagonal_mean = BarlowTwinsLoss.apply(z1, z2, self.config.lambd)
        loss = loss * self.config.loss_scale
        pairs = z1.shape[1] * (z1.shape[1] - 1)
        return loss, {
            "loss": loss.detach(),
            "on_diagonal": on_diagonal,
            "off_diagonal": off_diagonal,
            "diagonal_mean": diagonal_mean,
            "off_diagonal_rms": (off_diagonal / max(pairs, 1)).sqrt(),
        } | collapse

    def pictures(self) -> dict[str, torch.Tensor]:
        """The first dimensions' part of C over this rank's images of the last step."""
        z1, z2 = self.corner
        return {"cross_correlation": z1.T @ z2 / len(z1)}
