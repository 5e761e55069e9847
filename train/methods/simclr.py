"""SimCLR (Chen 2020): a view finds its twin among all other views of the global batch.

    loss = mean over views i of  −log( exp(s_i,twin / τ) / Σ_{k≠i} exp(s_ik / τ) )      NT-Xent; s = cosine

Every rank compares its own 2B views with all 2 · global batch ones. The gather passes gradients back, so the mean
of the ranks' losses is the loss of the global batch, and so is its gradient.
"""

import torch
import torch.nn.functional as F
from torch import nn

from pipeline.spec import ViewSpec
from train.config import PretrainConfig, projector_widths
from train.distributed import gather_over_ranks, mean_over_ranks, rank
from train.methods.contract import Method, Metrics, collapse_metrics
from train.model import make_projector

_VIEW = ViewSpec(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, p_blur=0.5)  # Chen 2020, appendix A


def nt_xent(z1: torch.Tensor, z2: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, D) twice, of length 1 → the mean loss of this rank's 2B views, and the share that find their twin first."""
    images = len(z1)
    everyone = torch.cat([gather_over_ranks(z1), gather_over_ranks(z2)])
    own = rank() * images + torch.arange(images, device=z1.device)  # this rank's images among all of a view
    first, second = own, own + len(everyone) // 2
    similarity = torch.cat([z1, z2]) @ everyone.T / temperature
    itself = torch.zeros_like(similarity, dtype=torch.bool).scatter_(1, torch.cat([first, second])[:, None], True)
    similarity = similarity.masked_fill(itself, float("-inf"))
    twin = torch.cat([second, first])
    return F.cross_entropy(similarity, twin), (similarity.argmax(1) == twin).float().mean()


class SimCLR(Method):
    """Backbone and projector."""

    VIEWS = {"imagenet": (_VIEW, _VIEW), "cifar10": (_VIEW, _VIEW)}  # noqa: RUF012 (never changed)
    TOGETHER = ()  # its batch norms see both views anyway, as published

    def __init__(self, backbone: nn.Module, features: int, config: PretrainConfig):
        super().__init__(backbone, features, config)
        widths = projector_widths(config.projector)
        if config.projector_norm == "all":
            # A factor and no shift, as published (google-research/simclr model_util.py, lines 135 and 161).
            self.projector.append(nn.BatchNorm1d(widths[-1]))
            self.projector[-1].bias.requires_grad_(False)
        elif config.projector_norm == "none":  # solo-learn's (solo/methods/simclr.py, line 48): with biases instead
            self.projector = make_projector(features, widths, norm=False, bias=True)

    def outputs(self, views: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Both views' embeddings, from one pass: each batch norm takes both views as one batch, as published."""
        features = self.backbone(torch.cat(views))
        self.features = [features.detach()]
        return self.projector(features).chunk(2)

    def loss(self, z1: torch.Tensor, z2: torch.Tensor) -> tuple[torch.Tensor, Metrics]:
        """NT-Xent of embeddings (B, D) twice."""
        z1, z2 = F.normalize(z1), F.normalize(z2)
        loss, found = nt_xent(z1, z2, self.config.temperature)
        return loss, mean_over_ranks({"loss": loss, "twin_top1": found} | collapse_metrics(z1))
