"""The one supervised loop: linear probes, several heads at once, fine-tuning and transfer all train through `fit`.

    stream of (inputs, labels) ──▶ model ──▶ {head: logits} ──▶ Σ cross-entropy ──▶ SGD, one rate a group
                                                    after an epoch: validate() → {head: Accuracy}

What differs between protocols is what goes in: the inputs (images, or features of a frozen backbone), the
parameters that train, and each group's learning rate, weight decay and schedule. The losses of several heads
are summed; they share no trained parameter when the backbone is frozen, so each head's gradient is its own.

Results are a function of the seed alone on a CPU with a given number of threads; CUDA's kernels may differ in
the last bits.
"""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from eval.metrics import Accuracy, rank_accuracy
from eval.subject import Subject, images_per_step
from pipeline.choices.lighting import draw_lighting
from pipeline.choices.order import shuffled_batches
from pipeline.errors import UserError
from pipeline.spec import SUPERVISED_VIEW, Batch, ViewSpec
from train.knn_vote import label_ranks

MOMENTUM = 0.9  # every published protocol here trains with this
VALIDATION_CHUNK = 8192
LINE_HEADS = 6  # named in an epoch's line
SMALL_STEP = 1 << 25  # multiplications of one forward pass that a single core does in a millisecond


@dataclass(frozen=True)
class Group:
    """Parameters that share a learning rate. `milestones` (): cosine to zero; else × 0.1 at each of these epochs."""

    params: list[nn.Parameter]
    lr: float
    weight_decay: float = 0.0
    milestones: tuple[int, ...] = ()


@dataclass(frozen=True)
class Epoch:
    """What is known after an epoch: counted from 1; mean training loss; accuracy by head, {} where not validated."""

    epoch: int
    loss: float
    accuracy: dict[str, Accuracy]
    seconds: float


def scheduled_lr(group: Group, epoch: int, epochs: int) -> float:
    """The learning rate of an epoch (counted from 0): constant within it, as the published evaluations have it."""
    if not group.milestones:
        return group.lr * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
    return group.lr * 0.1 ** sum(epoch >= milestone for milestone in group.milestones)


def make_head(features: int, classes: int, seed: int) -> nn.Linear:
    """A linear classifier with weights N(0, 0.01) and bias 0, the same for a seed wherever it runs."""
    head = nn.utils.skip_init(nn.Linear, features, classes)
    nn.init.normal_(head.weight, 0.0, 0.01, generator=torch.Generator().manual_seed(seed))
    nn.init.zeros_(head.bias)
    return head


class Heads(nn.Module):
    """Linear classifiers on the same features: (B, D) → {name: (B, K)}."""

    def __init__(self, heads: dict[str, nn.Linear]):
        super().__init__()
        self.heads = nn.ModuleDict(heads)

    def forward(self, features):
        return {name: head(features) for name, head in self.heads.items()}


def feature_stream(
    features: torch.Tensor, labels: torch.Tensor, seed: int, batch: int, epochs: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Shuffled full batches of features held in memory, (N, D) and (N,): the loader's order, without a loader."""
    stop = epochs * (len(features) // batch)
    for _, _, ids in shuffled_batches(seed, np.arange(len(features)), batch, 0, 1, 0, stop):
        rows = torch.from_numpy(ids).to(features.device)
        yield features[rows].float(), labels[rows]


@contextlib.contextmanager
def threads_for(multiplications: int) -> Iterator[None]:
    """One CPU thread inside where a step has too few multiplications for more than one to pay.

    Waking the others costs more than such a step, and on a busy machine ten times more.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1 if multiplications < SMALL_STEP else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def inputs_of(
    batches: Iterable[Batch], extract: Callable | None = None, labels: torch.Tensor | None = None
) -> Iterator[tuple]:
    """(images, or what a frozen `extract` makes of them without a gradient; labels) of a loader's batches.

    `labels` (M,), by position in the loader's file, replace those of the file.
    """
    for batch in batches:
        inputs = batch.views[0]
        if extract:
            with torch.no_grad():
                inputs = extract(inputs)
        yield inputs, batch.label if labels is None else labels[batch.sample]


def in_chunks(features: torch.Tensor, labels: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Features (M, D) and labels (M,) held in memory, as `validate` takes them."""
    return zip(features.split(VALIDATION_CHUNK), labels.split(VALIDATION_CHUNK), strict=True)


@torch.no_grad()
def validate(model: nn.Module, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, Accuracy]:
    """Accuracy of every head over (inputs, labels) batches, in evaluation mode."""
    model.eval()
    ranks: dict[str, list[torch.Tensor]] = {}
    for inputs, labels in batches:
        for name, logits in model(inputs).items():
            ranks.setdefault(name, []).append(label_ranks(logits, labels))
    return {name: rank_accuracy(torch.cat(parts)) for name, parts in ranks.items()}


def make_optimizer(groups: list[Group], nesterov: bool) -> torch.optim.SGD:
    """SGD with momentum 0.9, one parameter group for each of ours, in order."""
    return torch.optim.SGD(
        [{"params": g.params, "lr": g.lr, "weight_decay": g.weight_decay} for g in groups],
        momentum=MOMENTUM,
        nesterov=nesterov,
    )


def train_epoch(model: nn.Module, optimizer, stream: Iterator, steps: int) -> dict[str, torch.Tensor]:
    """Takes `steps` batches from the stream and one optimizer step on each. Returns each head's summed loss, 0-d."""
    model.train()
    totals: dict[str, torch.Tensor] = {}
    for _ in range(steps):
        inputs, labels = next(stream)
        losses = {name: cross_entropy(logits, labels) for name, logits in model(inputs).items()}
        optimizer.zero_grad(set_to_none=True)
        sum(losses.values(), torch.zeros(())).backward()
        optimizer.step()
        totals = {name: totals.get(name, 0.0) + loss.detach() for name, loss in losses.items()}
    return totals


def mean_loss(totals: dict[str, torch.Tensor], steps: int, may_diverge: bool) -> float:
    """The heads' mean losses, summed. With `may_diverge` those that are not finite are left out while one is left."""
    losses = [total.item() / steps for total in totals.values()]
    finite = [loss for loss in losses if math.isfinite(loss)]
    return sum(finite if finite and may_diverge else losses)


def fit(
    model: nn.Module,
    groups: list[Group],
    stream: Iterator[tuple[torch.Tensor, torch.Tensor]],
    *,
    validation: Callable[[], dict[str, Accuracy]],
    epochs: int,
    steps: int,
    nesterov: bool = False,
    validate_every: int = 1,
    may_diverge: bool = False,
) -> list[Epoch]:
    """Trains `model` (inputs → {head: logits}) for `epochs` epochs of `steps` batches of the stream.

    One stream for all epochs, so that a loader can prepare the next batches while this one validates. Validates
    every `validate_every` epochs and after the last. One line an epoch goes to stderr. Raises UserError where
    the loss is no longer finite; with `may_diverge` only where no head's is, and a lost head scores 0.
    """
    optimizer = make_optimizer(groups, nesterov)
    history = []
    for epoch in range(epochs):
        started = time.monotonic()
        for target, group in zip(optimizer.param_groups, groups, strict=True):
            target["lr"] = scheduled_lr(group, epoch, epochs)
        loss = mean_loss(train_epoch(model, optimizer, stream, steps), steps, may_diverge)
        if not math.isfinite(loss):
            rates = ", ".join(f"{rate:g}" for rate in dict.fromkeys(group.lr for group in groups))
            raise UserError(
                f"the training loss is {loss} after epoch {epoch + 1}, a finite number was expected; "
                f"the learning rates ({rates}) are too high for these features, or the encoder's output is not finite"
            )
        validated = epoch + 1 == epochs or (epoch + 1) % validate_every == 0
        accuracy = validation() if validated else {}
        history.append(Epoch(epoch + 1, loss, accuracy, time.monotonic() - started))
        print(epoch_line(history[-1], epochs), file=sys.stderr, flush=True)
    return history


def training_view(settings: dict) -> ViewSpec:
    """Random crop and flip; where the protocol has a jitter, with that on every image."""
    if "jitter" not in settings:
        return SUPERVISED_VIEW
    strengths = dict(zip(("brightness", "contrast", "saturation", "hue"), settings["jitter"], strict=True))
    return replace(SUPERVISED_VIEW, p_jitter=1.0, **strengths)


def with_lighting(batches: Iterable[Batch], subject: Subject, strength: float) -> Iterator[Batch]:
    """The same batches with AlexNet's colour noise (pipeline/choices/lighting.py) added to their normalized views."""
    std, epoch, offsets = np.array(subject.encoder.info.normalization.std, np.float32), -1, torch.empty(0)
    for batch in batches:
        if batch.epoch != epoch:
            # A table of the whole epoch, looked up where the views are: nothing is read back from a GPU.
            epoch, every = batch.epoch, np.arange(len(subject.dataset.train))
            offsets = torch.from_numpy(draw_lighting(subject.config.seed, epoch, every, strength) / std)
            offsets = offsets.to(batch.sample.device)
        noise = offsets[batch.sample, :, None, None]
        yield batch._replace(views=tuple(view + noise for view in batch.views))


def fit_on_crops(
    subject: Subject, model: nn.Module, groups: list[Group], *, settings: dict, extract: Callable | None = None, **how
) -> list[Epoch]:
    """`fit` on new random crops and flips of the labelled share each epoch, or on what `extract` makes of them.

    `settings` has the epochs, the batch and, where the protocol has them, the strengths of jitter and lighting; `how`
    is the rest of what `fit` takes.
    """
    batch, epochs = images_per_step(subject, settings), settings["epochs"]
    steps = subject.subset.images // batch
    with subject.augmented_loader(batch, training_view(settings)) as loader:
        batches: Iterable[Batch] = loader.batches(0, epochs * steps)
        if settings.get("lighting"):
            batches = with_lighting(batches, subject, settings["lighting"])
        stream = inputs_of(batches, extract)
        return fit(model, groups, stream, epochs=epochs, steps=steps, **how)


def epoch_line(epoch: Epoch, epochs: int) -> str:
    """One epoch for a person to read."""
    shown = list(epoch.accuracy.items())
    scores = "".join(f"  {name} top-1 {a.top1:.2f} top-5 {a.top5:.2f}" for name, a in shown[:LINE_HEADS])
    scores += f"  and {len(shown) - LINE_HEADS} more" if len(shown) > LINE_HEADS else ""
    return f"epoch {epoch.epoch}/{epochs}  loss {epoch.loss:.4f}{scores}  {epoch.seconds:.1f} s"


def final_scores(history: list[Epoch], head: str) -> dict[str, float]:
    """The last epoch's accuracy of a head, and the best of all epochs, chosen on the validation images themselves."""
    validated = [epoch for epoch in history if epoch.accuracy]
    last = validated[-1].accuracy[head]
    best = max(validated, key=lambda epoch: epoch.accuracy[head].top1)
    return {
        "top1": last.top1,
        "top5": last.top5,
        "best_top1": best.accuracy[head].top1,
        "best_epoch": best.epoch,
        "final_loss": history[-1].loss,
    }
