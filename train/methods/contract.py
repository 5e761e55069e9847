"""What a method is: one nn.Module made of a backbone and the configuration, in one file beside this one.

The update (train/update.py) calls what stands here and nothing else, and --compile compiles each child module. Heads,
loss and any further state are the method's own affair; its `state_dict` holds everything that a resumed run needs
beside step and optimizer. How to add one: train/README.md.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn

from pipeline.spec import ViewSpec
from train.config import PretrainConfig, projector_widths
from train.model import make_projector
from train.together import of_each_view

Metrics = dict[str, torch.Tensor]


class Method(nn.Module):
    """A backbone and a projector behind it; what a method adds is a subclass that has at least VIEWS and `loss`.

    VIEWS     the value of --views → the view table, one ViewSpec a view
    TOGETHER  the networks that both views go through, by name: with --views-together in one pass (train/together.py)
    backbone  the network that evaluations keep; all else is dropped after pretraining
    """

    VIEWS: dict[str, tuple[ViewSpec, ...]]
    TOGETHER: tuple[str, ...] = ("backbone", "projector")

    def __init__(self, backbone: nn.Module, features: int, config: PretrainConfig):
        super().__init__()
        self.backbone = backbone
        self.projector = make_projector(features, projector_widths(config.projector))
        self.config = config

    def forward(self, views: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, Metrics]:
        """V tensors (B, C, H, W) of this rank → the loss and its metrics.

        The loss is 0-d float32; its mean over ranks is what is minimized. The metrics are 0-d and detached,
        "loss" among them, and equal on all ranks.
        """
        outputs = self.outputs(views)
        with torch.autocast(views[0].device.type, enabled=False):
            return self.loss(*(z if z.dtype == torch.float64 else z.float() for z in outputs))

    def outputs(self, views: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """What `loss` is made of, each (B, D), under autocast: by default the embeddings of the views."""
        return of_each_view(views, self.config.views_together, self.backbone, self.projector)

    def loss(self, *outputs: torch.Tensor) -> tuple[torch.Tensor, Metrics]:
        """The loss and its metrics, as `forward` returns them, in float32."""
        raise NotImplementedError

    def parameter_groups(self) -> list[dict]:
        """The optimizer's groups: params, name, peak_lr, weight_decay, adapt (train/lars.py).

        A group with constant_lr keeps its peak_lr; the others follow the schedule.
        """
        return weight_and_bias_groups(self.parameters(), self.config)

    def after_step(self, step: int, stop_step: int) -> None:
        """After the optimizer's update number `step` (from 0) of `stop_step`: for state that follows the weights."""

    def pictures(self) -> Metrics:
        """Matrices (H, W) in [-1, 1] of the last step by name, for TensorBoard."""
        return {}


def weight_and_bias_groups(parameters: Iterable[nn.Parameter], config: PretrainConfig) -> list[dict]:
    """Weights, and 1-d parameters without weight decay or adaptation.

    Without either, an update is linear in the gradient: --paper-world-size divides its learning rate,
    which is the same as dividing its gradient.
    """
    trained, base = [p for p in parameters if p.requires_grad], config.global_batch / 256
    lr_biases = config.lr_biases / config.paper_world_size
    return [
        {
            "name": "weights",
            "params": [p for p in trained if p.ndim > 1],
            "peak_lr": config.lr_weights * base,
            "weight_decay": config.weight_decay,
            "adapt": True,
        },
        {
            "name": "biases",
            "params": [p for p in trained if p.ndim <= 1],
            "peak_lr": lr_biases * base,
            "weight_decay": 0.0,
            "adapt": False,
        },
    ]


@torch.no_grad()
def collapse_metrics(z: torch.Tensor) -> Metrics:
    """Of this rank's embeddings (B, D), scaled to length 1: what falls when they collapse.

    embedding_spread      √D times the mean deviation of a dimension: about 1; 0 where all embeddings are one point
    effective_dimensions  (Σ λ)² / Σ λ² over the eigenvalues of their covariance: 1 where they lie on one line, at
                          most min(B − 1, D). Batch norm keeps the spread up while this falls.
    """
    directions = F.normalize(z.float())
    centred = directions - directions.mean(0)
    gram = centred @ centred.T  # (B, B), with the eigenvalues of the (D, D) covariance
    return {
        "embedding_spread": centred.square().mean(0).sqrt().mean() * z.shape[1] ** 0.5,
        "effective_dimensions": gram.trace().square() / gram.square().sum().clamp(min=1e-12),
    }
