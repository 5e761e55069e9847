"""What a method is: one nn.Module made of a backbone and the configuration, in one file beside this one.

The update (train/update.py) calls what stands here and nothing else, and --compile compiles each child module. Heads,
loss and any further state are the method's own affair; its `state_dict` holds everything that a resumed run needs
beside step and optimizer. How to add one: train/README.md.

--views-together sends both views through the networks in one forward pass: half as many kernels to start, each on
twice the images. Everything but batch norm treats each image by itself, so the update is that of one pass a view, up
to the rounding of sums in another order; only dropout draws other masks. A batch norm takes its part of each view in
turn: statistics of that view alone, and running statistics that move once for view 1 and then for view 2, as they do
in two passes.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.spec import ViewSpec
from train.config import PretrainConfig, projector_widths
from train.model import Layers, make_projector

VIEWS = 2
Metrics = dict[str, torch.Tensor]


class Method(nn.Module):
    """A backbone and a projector behind it; what a method adds is a subclass that has at least VIEWS and `loss`.

    VIEWS     the value of --views → the view table, one ViewSpec a view
    TOGETHER  the networks that both views go through, by name: with --views-together in one pass
    backbone  the network that evaluations keep; all else is dropped after pretraining
    loss      what `outputs` returns, float32 → the loss and its metrics, as `forward` returns them
    features  what the backbone made of the last step's views, (B, D) or (2B, D) each, detached: the labels of all of
              them are the batch's, once or twice (train/online_linear.py)
    """

    VIEWS: dict[str, tuple[ViewSpec, ...]]
    TOGETHER: tuple[str, ...] = ("backbone", "projector")
    backbone: nn.Module
    projector: Layers
    loss: Callable[..., tuple[torch.Tensor, Metrics]]
    features: list[torch.Tensor]

    def __init__(self, backbone: nn.Module, features: int, config: PretrainConfig):
        super().__init__()
        self.backbone = backbone
        self.projector = make_projector(features, projector_widths(config.projector))
        self.config, self.features = config, []

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
        return self.of_each_view(views, self.backbone, self.projector)

    def of_each_view(self, views: Sequence[torch.Tensor], *networks: nn.Module) -> tuple[torch.Tensor, ...]:
        """What the networks, one behind the other, make of every view (B, ...); in one pass with --views-together."""
        together = self.config.views_together
        inputs = [torch.cat(tuple(views))] if together else views
        outputs, features = [], []
        for x in inputs:
            for network in networks:
                x = network(x)
                if network is self.backbone:
                    features.append(x.detach())
            outputs.append(x)
        self.features = features or self.features  # heads alone leave none
        return outputs[0].chunk(len(views)) if together else tuple(outputs)

    def parameter_groups(self) -> list[dict]:
        """The optimizer's groups: params, name, peak_lr, weight_decay, adapt (train/lars.py).

        A group with constant_lr keeps its peak_lr; the others follow the schedule. One with frozen_epochs does not
        move for so many epochs from the start, and begins without momentum.
        """
        return weight_and_bias_groups(self.parameters(), self.config)

    def after_step(self, step: int, stop_step: int) -> None:
        """After the optimizer's update number `step` (from 0) of `stop_step`: for state that follows the weights."""

    def pictures(self) -> Metrics:
        """Matrices (H, W) in [-1, 1] of the last step by name, for TensorBoard."""
        return {}


def keep_views_apart(method: Method) -> None:
    """Lets the batch norms of the networks that take both views together see one view at a time. In place.

    Parameter names stay. After whatever replaces batch norms, and before anything is compiled.
    """
    modules = (module for name in method.TOGETHER for module in getattr(method, name).modules())
    norms: list[nn.Module] = [module for module in modules if isinstance(module, _BatchNorm)]
    for norm in norms:
        norm.forward = partial(forward_by_view, norm, norm.forward)  # partial: a deep copy runs its own weights


def forward_by_view(norm: nn.Module, forward: Callable[..., torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """`forward`, a batch norm's, of both views in x (2B, ...), one after the other. Evaluating, it is the same."""
    if not norm.training:
        return forward(x)
    return torch.cat([forward(view) for view in x.chunk(VIEWS)])


def weight_and_bias_groups(parameters: Iterable[nn.Parameter], config: PretrainConfig) -> list[dict]:
    """Weights, and 1-d parameters without weight decay or adaptation.

    Without either, an update is linear in the gradient: --paper-world-size divides its learning rate,
    which is the same as dividing its gradient.
    """
    trained, base = [p for p in parameters if p.requires_grad], config.global_batch / 256
    assert config.lr_weights is not None and config.lr_biases is not None, "flags.resolved fills in both"
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
            "peak_lr": config.lr_biases / config.paper_world_size * base,
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
