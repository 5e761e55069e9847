"""MoCo v2 (He 2020, Chen 2020b): a query finds its key among the keys of earlier batches, which wait in a queue.

    loss = −log( exp(q·k / τ) / (exp(q·k / τ) + Σ_queue exp(q·k' / τ)) )    q of view 1, k of view 2, of length 1
    key encoder ← m · key encoder + (1 − m) · query encoder
    queue ← this step's keys of all ranks, in the order of the global batch, in place of the oldest

The published step (facebookresearch/moco, moco/builder.py, `forward`) moves the key encoder, makes the keys, compares
and then fills the queue. Here the queue is filled and the key encoder moved after the update: the same sequence, since
both encoders begin equal. So a step that --on-nan skip leaves out changes nothing, and no copy of the queue is needed
for the backward pass.

Batch norm. Published is a norm per GPU (32 images), with the images shuffled between the GPUs for the key encoder: else
an image's query and key share one GPU's statistics, which the queue's keys do not have, and the network finds the key
by them. Here every norm sees the global batch (train/batchnorm.py) and nothing is shuffled, as in solo-learn: the
update is the same at any world size, no rank has statistics of its own, and those of a whole batch differ less from the
next one's. They still differ, so by the authors' word the shuffle hides more than a norm over all GPUs does
(facebookresearch/moco, issue 46). Without it solo-learn got 92.94 on CIFAR-10 and, in 100 epochs with both views as
queries, 66.84 on ImageNet.
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from pipeline.spec import ViewSpec
from train.config import PretrainConfig, projector_widths
from train.distributed import gather_over_ranks, mean_over_ranks
from train.methods.contract import Method, Metrics, collapse_metrics
from train.model import Layers, make_projector

# main_moco.py, --aug-plus; torchvision's RandomResizedCrop is bilinear where nothing is said.
_VIEW = ViewSpec(area=(0.2, 1.0), interpolation="bilinear", saturation=0.4, p_blur=0.5)
_CIFAR_VIEW = ViewSpec(saturation=0.4, p_blur=0.5)  # solo-learn's for CIFAR-10, symmetric_weak.yaml


def contrast(
    queries: torch.Tensor, keys: torch.Tensor, queue: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, D), (B, D), (K, D) of length 1 → the mean loss, and the share of queries whose own key is the nearest."""
    own = (queries * keys).sum(1, keepdim=True)
    logits = torch.cat([own, queries @ queue.T], 1) / temperature
    first = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
    return F.cross_entropy(logits, first), (logits.argmax(1) == first).float().mean()


class MoCoV2(Method):
    """Backbone and projector, which make queries, the key encoder that follows them, and the queue of keys (K, D)."""

    VIEWS = {"imagenet": (_VIEW, _VIEW), "cifar10": (_CIFAR_VIEW, _CIFAR_VIEW)}  # noqa: RUF012 (never changed)
    TOGETHER = ()  # each view has a network of its own

    queue: torch.Tensor
    position: torch.Tensor

    def __init__(self, backbone: nn.Module, features: int, config: PretrainConfig):
        super().__init__(backbone, features, config)
        widths = projector_widths(config.projector)
        self.projector = make_projector(features, widths, norm=False, bias=True)  # as published
        # Neither DistributedDataParallel nor the optimizer sees it; a checkpoint does.
        self.key_encoder = copy.deepcopy(Layers(backbone, self.projector)).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(config.queue, widths[-1])))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))  # of the oldest key

    def outputs(self, views: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """View 1's queries and view 2's keys."""
        features = self.backbone(views[0])
        self.features = [features.detach()]
        queries = self.projector(features)
        with torch.no_grad():
            return queries, self.key_encoder(views[1])

    def loss(self, queries: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, Metrics]:
        """Of queries and keys (B, D); only queries have a gradient, as published."""
        queries, self.keys = F.normalize(queries), F.normalize(keys)
        loss, found = contrast(queries, self.keys, self.queue, self.config.temperature)
        return loss, mean_over_ranks({"loss": loss, "twin_top1": found} | collapse_metrics(queries))

    @torch.no_grad()
    def after_step(self, step: int, stop_step: int) -> None:
        """The step's keys enter the queue, and the key encoder follows."""
        keys = gather_over_ranks(self.keys)
        # A ring, so the queue need not be a multiple of the batch. Nothing is read back: the position stays a tensor.
        places = (self.position + torch.arange(len(keys), device=keys.device)) % len(self.queue)
        self.queue.index_copy_(0, places, keys)
        self.position.add_(len(keys)).remainder_(len(self.queue))
        following: list[torch.Tensor] = [*self.key_encoder.parameters()]
        trained: list[torch.Tensor] = [*self.backbone.parameters(), *self.projector.parameters()]
        torch._foreach_lerp_(following, trained, 1 - self.config.ema)

    def parameter_groups(self) -> list[dict]:
        """Plain SGD, weight decay on everything (main_moco.py)."""
        assert self.config.lr_weights is not None, "flags.resolved fills it in"
        group = {
            "name": "weights",
            "params": [*self.backbone.parameters(), *self.projector.parameters()],
            "peak_lr": self.config.lr_weights * self.config.global_batch / 256,
            "weight_decay": self.config.weight_decay,
            "adapt": False,
        }
        return [group]
