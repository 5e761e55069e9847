"""SwAV (Caron 2020) without multi-crop: one view predicts which prototypes the other view is assigned to.

    s      cosines of an embedding and the K prototypes
    code   Sinkhorn-Knopp of exp(s / ε) over the global batch: all prototypes get an equal share of it; no gradient
    loss   cross-entropy of softmax(s1 / τ) with code 2, and of softmax(s2 / τ) with code 1; their mean

The published 2×224 recipe is facebookresearch/swav at 06b1b7c: main_swav.py, src/resnet50.py and
scripts/swav_400ep_2x224_pretrain.sh. What is not as there:

    warm-up         from 0, theirs from 1/16 of the peak
    batch norm      over the global batch, theirs over each node's 8 GPUs (512 images); both views together in either
    frozen          the prototypes stay for the first epoch; theirs for 313 iterations of 4096 images, an epoch and one
    projector       no bias before its batch norm, which would take it out again
    weight decay    in the LARS norm ‖g + wd·p‖, in theirs ‖g‖ + wd·‖p‖ (apex LARC)
    normalization   by ImageNet's deviations, of which theirs has .228 for .229
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.spec import ViewSpec
from train.config import PretrainConfig, projector_widths
from train.distributed import mean_over_ranks, sum_over_ranks
from train.methods.contract import Method, Metrics, collapse_metrics, weight_and_bias_groups

EPSILON, ITERATIONS = 0.05, 3  # of Sinkhorn-Knopp: the published script's
FROZEN_EPOCHS = 1
# src/multicropdataset.py: torchvision's crop with its default, bilinear interpolation; area 0.08..1 by the script.
_VIEW = ViewSpec(interpolation="bilinear", brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, p_blur=0.5)
# solo-learn's scripts/pretrain/cifar/augmentations/symmetric.yaml; its crop is bicubic.
_CIFAR_VIEW = replace(_VIEW, interpolation="bicubic")


@torch.no_grad()
def codes(scores: torch.Tensor) -> torch.Tensor:
    """Cosines (V, B, K) of this rank's images with the prototypes → soft assignments (V, B, K), each row of sum 1.

    Of each view on its own, over the images of all ranks. The published code also scales by 1/K, 1/B and the sum of
    all, which the next division takes out again. Cosines are at most 1, so exp stays below e^20: nothing overflows.
    """
    q = (scores / EPSILON).exp()
    for _ in range(ITERATIONS):
        q = q / sum_over_ranks(q.sum(1, keepdim=True))  # every prototype: the same share of the global batch
        q = q / q.sum(2, keepdim=True)  # every image: assigned as a whole
    return q


class SwAV(Method):
    """Backbone, projector and prototypes, which are rows (K, D) of length 1."""

    VIEWS = {"imagenet": (_VIEW, _VIEW), "cifar10": (_CIFAR_VIEW, _CIFAR_VIEW)}  # noqa: RUF012 (never changed)
    TOGETHER = ()  # its batch norms see both views anyway, as published

    def __init__(self, backbone: nn.Module, features: int, config: PretrainConfig):
        super().__init__(backbone, features, config)
        inputs, width = [features, *projector_widths(config.projector)][-2:]
        self.projector[-1] = nn.Linear(inputs, width)  # with a bias, as published
        self.prototypes = nn.Linear(width, config.prototypes, bias=False)
        self.normalize_prototypes()
        if not config.init_from:  # both published networks begin with their residual branches on
            for norm in backbone.modules():
                if isinstance(norm, _BatchNorm) and norm.affine:
                    nn.init.ones_(norm.weight)

    def outputs(self, views: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Both views' embeddings, from one pass: each batch norm takes both views as one batch, as published."""
        features = self.backbone(torch.cat(views))
        self.features = [features.detach()]
        return self.projector(features).chunk(2)

    def loss(self, z1: torch.Tensor, z2: torch.Tensor) -> tuple[torch.Tensor, Metrics]:
        """The swapped prediction of embeddings (B, D) twice (Caron 2020, eq. 1 and 2)."""
        scores = self.prototypes(F.normalize(torch.stack([z1, z2]), dim=2))
        swapped = codes(scores.detach()).flip(0)
        loss = F.cross_entropy((scores / self.config.temperature).flatten(0, 1), swapped.flatten(0, 1))
        found = (scores.argmax(2) == swapped.argmax(2)).float().mean()
        return loss, mean_over_ranks({"loss": loss, "prototype_top1": found} | collapse_metrics(z1))

    def parameter_groups(self) -> list[dict]:
        """The prototypes on their own; on ImageNet LARS adapts and decays 1-d parameters too.

        The published optimizer, apex's LARC, takes every parameter alike; solo-learn's leaves 1-d ones out of both.
        """
        network = [*self.backbone.parameters(), *self.projector.parameters()]
        weights, biases = weight_and_bias_groups(network, self.config)
        if self.config.views == "imagenet":
            biases |= {"weight_decay": self.config.weight_decay, "adapt": True}
        prototypes = {"name": "prototypes", "params": [self.prototypes.weight], "frozen_epochs": FROZEN_EPOCHS}
        return [weights, biases, weights | prototypes]

    @torch.no_grad()
    def normalize_prototypes(self) -> None:
        """Scales every prototype to length 1, in place."""
        self.prototypes.weight.copy_(F.normalize(self.prototypes.weight))

    def after_step(self, step: int, stop_step: int) -> None:
        """Prototypes of length 1 for the next step; frozen ones are so, and keep every bit."""
        if step >= FROZEN_EPOCHS * (stop_step // self.config.epochs):
            self.normalize_prototypes()
