"""One update of the weights, built in one place for everything that makes updates.

    update = make_update(config, ranks)      the network on its device, the optimizer, and how they step
    metrics = update(views, step)            forward pass, loss, backward pass, LARS

The loop in pretrain.py, scripts/bench and scripts/doctor.py all call it, so what is measured is what trains.
Whether a step is compiled, recorded as a CUDA graph, recomputes activations or takes both views together is decided
here by the configuration and the device; the update is the same up to rounding.

The weights begin at random, or with --init-from in a checkpoint of ours or somebody else's. Such a run is a new one:
its own schedule from step 0, no momentum, its own recipe. A run that was stopped continues by itself and needs no flag.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline.errors import UserError
from train.batchnorm import with_global_batch_norm
from train.checkpoint import read_network
from train.config import AMP, PretrainConfig
from train.distributed import Ranks, averaging_gradients, say
from train.guard import UpdateGuard
from train.lars import LARS, gradient_norm
from train.memory import compile_parts, recompute_blocks, with_activations, with_device_defaults
from train.methods.choose import make_method
from train.methods.contract import Method, Metrics, keep_views_apart
from train.model import make_backbone, network_names, require_side
from train.online_linear import OnlineLinear
from train.recorded import RecordedStep

FINAL_SHARE = 0.001  # the cosine ends at this share of the peak (Zbontar 2021, section 2.2)
NO_IDS = np.arange(0)
Views = tuple[torch.Tensor, ...]


def lr_share(step: int, warmup_steps: int, total_steps: int) -> float:
    """The learning rate of a step as a share of its peak: a pure function, so a resumed run needs no state.

    Linear from 0 over the warm-up, then half a cosine from 1 to FINAL_SHARE, which it nears but never runs at.
    A run no longer than its warm-up ends on the way up.
    """
    if step < warmup_steps:
        return step / warmup_steps
    done = (step - warmup_steps) / (total_steps - warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * done))
    return cosine + FINAL_SHARE * (1 - cosine)


def initial_network(config: PretrainConfig) -> tuple[nn.Module, int, dict[str, torch.Tensor]]:
    """The configured backbone, its number of features, and what `start_heads_` takes.

    With --init-from the weights are the file's, all from one read of it. Raises UserError.
    """
    backbone, features = make_backbone(config.arch, config.stem)
    require_side(backbone, config.arch, config.resolution)
    backbone.train()
    if not config.init_from:
        return backbone, features, {}
    own = network_names(config.arch)[-1]
    theirs = read_network(config.init_from, config.key, own if ":" in own else "")  # "": whichever ResNet is in it
    info = theirs.info
    if (network_names(info.arch)[-1], info.stem) != (own, config.stem):
        raise UserError(
            f"--init-from {config.init_from} is {info.arch} with the {info.stem} stem, this run is {config.arch} "
            f"with the {config.stem} stem; pass --arch {info.arch} --stem {info.stem}, or another file"
        )
    backbone.load_state_dict(theirs.backbone.state_dict())
    return backbone, features, theirs.heads


def start_heads_(method: nn.Module, theirs: dict[str, torch.Tensor]) -> bool:
    """Takes the weights of everything behind the backbone from `theirs`, and says whether it did.

    All of it, or nothing where a part is missing or has another shape: a run's checkpoint has them all, the
    published Barlow Twins checkpoint.pth the projector, a backbone file none.
    """
    own = {name: weight for name, weight in method.state_dict().items() if not name.startswith("backbone.")}
    if any(name not in theirs or theirs[name].shape != weight.shape for name, weight in own.items()):
        return False
    method.load_state_dict({name: theirs[name] for name in own}, strict=False)
    return True


@dataclass
class Update:
    """The network and all else that an update changes. Made by `make_update`.

    config   the run's, with everything decided that was left to the device
    method   the network with its heads (train/methods/contract.py); `model` is what steps call: DDP around it
    linear   trained beside it, on its features; None without --knn-every and for images without labels
    mark     called with the name of each stage when it ends, for a benchmark to note the time
    """

    config: PretrainConfig
    ranks: Ranks
    method: Method
    features: int
    model: nn.Module
    optimizer: LARS
    scaler: torch.amp.GradScaler
    guard: UpdateGuard
    steps_per_epoch: int
    linear: OnlineLinear | None = None
    recorded: RecordedStep | None = None
    mark: Callable[[str], None] = lambda stage: None

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint holds: with the step and the seed it is everything that later steps depend on."""
        beside = {"online_linear": self.linear} if self.linear else {}
        return {"model": self.method, "optimizer": self.optimizer, "scaler": self.scaler, **beside}

    @property
    def stop_step(self) -> int:
        """How many updates the run consists of."""
        return self.config.epochs * self.steps_per_epoch

    @property
    def rates(self) -> dict[str, float]:
        """The learning rates of the last step, by the name of the optimizer's group."""
        return {group["name"]: group["lr"] for group in self.optimizer.param_groups}

    def __call__(self, views: Views, step: int = 0, labels: torch.Tensor | None = None) -> Metrics | None:
        """Makes update number `step` (from 0) with this rank's views (B, 3, H, W).

        The labels (B,) are for the linear layer beside the network alone. Returns the metrics, 0-d tensors on the
        device, or None where --on-nan skip left the update out.
        """
        self.guard.before_step()
        share = lr_share(step, self.config.warmup_epochs * self.steps_per_epoch, self.stop_step)
        groups = self.optimizer.param_groups
        for group in groups:
            group["lr"] = group["peak_lr"] * (1.0 if group.get("constant_lr") else share)
        frozen = [group for group in groups if step < group.get("frozen_epochs", 0) * self.steps_per_epoch]
        for group in frozen:
            group["lr"] = 0.0
        # For networks with dropout: a resumed run draws the same masks.
        torch.manual_seed(hash((self.config.seed, step, self.ranks.rank)))
        metrics = self.recorded(views) if self.recorded else self._step(views, step)
        if metrics is not None:
            for group in frozen:  # as if it had had no gradient: no momentum waits for the end of its epochs
                self.optimizer.forget_(group)
            self.method.after_step(step, self.stop_step)
            if self.linear and labels is not None:
                self.linear.step(self.method.features, labels, share)
        self.mark("optimizer")
        return metrics

    def _step(self, views: Views, step: int) -> Metrics | None:
        """Starts the kernels of a step one by one."""
        metrics = self.gradients(views)
        kept = self.guard.keeps(metrics["loss"], step)
        if kept:
            self.scaler.step(self.optimizer)  # with fp16 the one host sync of a step: were the gradients finite?
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return metrics if kept else None

    def gradients(self, views: Views) -> Metrics:
        """Forward and backward pass: the step's metrics; the gradients are in the parameters."""
        loss, metrics = self.forward(views)
        self.scaler.scale(loss).backward()
        # fp16 scales the loss, and so the gradients: undone for the record.
        metrics["gradient_norm"] = gradient_norm(self.optimizer) / self.scaler.scale(torch.ones_like(metrics["loss"]))
        self.mark("backward")
        return metrics

    def forward(self, views: Views) -> tuple[torch.Tensor, Metrics]:
        """The loss, 0-d, and its metrics; the method's own part is float32 under any autocast."""
        amp = self.config.amp
        with torch.autocast(self.ranks.device.type, AMP[amp], enabled=amp != "off"):
            loss, metrics = self.model(views)
        self.mark("loss")
        return loss, metrics


def make_update(
    config: PretrainConfig, ranks: Ranks, *, steps_per_epoch: int = 1, ids: np.ndarray = NO_IDS, classes: int = 0
) -> Update:
    """Builds the network with the weights of its seed or of --init-from, and everything that steps it.

    With `classes` also a linear layer beside it, which tells so many apart. `ids` are the samples in use, to name those
    of a step that is lost. Benchmarks need neither: they repeat step 0, which in a warm-up has the learning rate 0, so
    the weights stay. Raises UserError for what cannot run here.
    """
    config = with_device_defaults(config, ranks)
    torch.manual_seed(config.seed)
    backbone, features, theirs = initial_network(config)
    method = make_method(backbone, features, config)
    if config.init_from:
        heads = "backbone and heads" if start_heads_(method, theirs) else "the backbone alone"
        say(ranks, f"{config.run}: a new run begins with {heads} of {config.init_from}")
    del theirs  # hundreds of MB
    method = with_global_batch_norm(method.to(ranks.device).to(memory_format=torch.channels_last))
    config = with_activations(config, method, ranks)
    # The order matters: what replaces batch norms is done, what is compiled comes last.
    if config.views_together:
        keep_views_apart(method)
    if config.activations == "blocks":
        recompute_blocks(method.backbone)
    optimizer = LARS(method.parameter_groups(), eta=config.lars_eta, clip=config.lars_clip)
    if config.compile:
        compile_parts(config, method)
    torch.backends.cudnn.benchmark = not config.deterministic
    update = Update(
        config=config,
        ranks=ranks,
        method=method,
        features=features,
        model=averaging_gradients(method, ranks),
        optimizer=optimizer,
        scaler=torch.amp.GradScaler(ranks.device.type, enabled=config.amp == "fp16"),
        guard=UpdateGuard(method, config, ranks, ids=ids),
        steps_per_epoch=steps_per_epoch,
    )
    if classes:
        adapt = optimizer.param_groups[0]["adapt"]
        update.linear = OnlineLinear(features, classes, config, adapt=adapt, device=ranks.device)
    if config.cuda_graph:
        update.recorded = RecordedStep(update.gradients, optimizer)
    return update
