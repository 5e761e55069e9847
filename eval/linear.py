"""Linear evaluation of a frozen encoder: one linear classifier on its features.

    python eval/linear.py                       the published protocol, on the newest run and its data
    python eval/linear.py --protocol avgpool    MMSelfSup's AvgPool row
    python eval/linear.py --cached              minutes become seconds: trained on kept features
    python eval/linear.py --sweep               learning rates × weight decays, all heads on one pass of the encoder
    python eval/linear.py --fraction 0.1        with a tenth of the labels

Protocol linear-bt (Zbontar 2021, section 3.1): the classifier sees a new random crop and flip of every image each
epoch, through the encoder in evaluation mode; weights N(0, 0.01), SGD, momentum 0.9, learning rate 0.3, cosine,
weight decay 1e-6, 100 epochs.

Protocol linear-avgpool (MMSelfSup): the same with learning rate 30, a tenth of it after epochs 60 and 80 of 100, and
no weight decay.

Protocol linear-cached, ours: the centre view's features are extracted once, every dimension is standardized by its
training mean and deviation and divided by √D, and the classifier trains on those; 30 epochs at learning rate 3
(chosen by CIFAR-10's test accuracy of raw pixels and of a random network's features, not of a trained one's).
It costs one pass over the images and reads lower or higher than linear-bt: never compare the two.

--sweep appends "-sweep" to the protocol's name: a class-balanced tenth of the training images is held out, all heads
train on the others, and the headline is the validation accuracy of the head that reads best on the held-out tenth
(of equals the lower rate, then the lower decay). Validation images choose nothing. `details` has every head.
"""

import sys
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from eval.metrics import Accuracy
from eval.protocols import LINEAR_AVGPOOL, LINEAR_BT, LINEAR_CACHED, Protocol
from eval.splits import Subset
from eval.subject import Subject, SubjectConfig, images_per_step, open_subject, record_result
from eval.supervised import (
    Epoch,
    Group,
    Heads,
    feature_stream,
    final_scores,
    fit,
    fit_on_crops,
    in_chunks,
    make_head,
    threads_for,
    validate,
)
from pipeline.choices.subsets import balanced_subset
from pipeline.command import run_command
from pipeline.errors import UserError

SWEEP_LR = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # × the protocol's
SWEEP_WEIGHT_DECAY = (0.0, 1e-6, 1e-4)
HELD_OUT = 0.1


@dataclass(frozen=True)
class LinearConfig(SubjectConfig):
    """Linear evaluation."""

    protocol: Literal["bt", "avgpool"] = "bt"
    """Barlow Twins' published protocol, or MMSelfSup's on the average-pooled features."""
    cached: bool = False
    """Train on kept features of centre views instead of fresh random crops: fast, and another protocol."""
    sweep: bool = False
    """Train a head for every learning rate and weight decay at once and choose by a held-out tenth of train."""
    sweep_lr: tuple[float, ...] = ()
    """Learning rates of the sweep. None given: the protocol's × 0.03, 0.1, 0.3, 1, 3 and 10."""
    sweep_weight_decay: tuple[float, ...] = SWEEP_WEIGHT_DECAY
    """Weight decays of the sweep."""
    epochs: int | None = None
    """None: the protocol's, 100; with --cached 30."""
    batch: int | None = None
    """Images of one step. None: the protocol's 256, or all images where there are fewer."""
    lr: float | None = None
    """Learning rate, not scaled by the batch. None: the protocol's, 0.3, avgpool's 30; with --cached 3."""
    weight_decay: float | None = None
    """None: the protocol's, 1e-6, avgpool's 0."""


class Point(NamedTuple):
    """What one classifier trains with."""

    lr: float
    weight_decay: float


def chosen_protocol(config: LinearConfig) -> Protocol:
    """The protocol that the flags name. Raises UserError where they contradict each other."""
    if config.features == "pixels" and not config.cached:
        raise UserError("--features pixels was given without --cached; raw pixels are evaluated with both flags")
    if config.cached and config.protocol != "bt":
        raise UserError(f"--cached is a protocol of its own and --protocol {config.protocol} another; give one of them")
    if config.sweep and (config.lr is not None or config.weight_decay is not None):
        raise UserError("--sweep was given with --lr or --weight-decay; use --sweep-lr and --sweep-weight-decay")
    if config.sweep and not config.sweep_weight_decay:
        raise UserError("--sweep-weight-decay was given without a value, at least one is expected")
    if config.cached:
        return LINEAR_CACHED
    return LINEAR_BT if config.protocol == "bt" else LINEAR_AVGPOOL


def sweep_of(protocol: Protocol) -> Protocol:
    """A protocol with lists of learning rates and weight decays in place of one each."""
    grid = {
        "lr": [round(protocol.settings["lr"] * factor, 6) for factor in SWEEP_LR],
        "weight_decay": list(SWEEP_WEIGHT_DECAY),
        "held_out": HELD_OUT,
    }
    return replace(protocol, name=f"{protocol.name}-sweep", settings=protocol.settings | grid)


def held_out(subject: Subject[LinearConfig]) -> tuple[Subset, Subset]:
    """The labelled share in two: what heads train on, and the class-balanced tenth that chooses among them."""
    labels = subject.train_labels().cpu().numpy()
    ids = np.arange(len(labels)) if subject.subset.ids is None else subject.subset.ids
    fewest = int(np.bincount(labels, minlength=subject.classes).min())
    if fewest < 2:
        raise UserError(
            f"--sweep holds out images of every class, and a class has {fewest} labelled; "
            "give a larger --fraction or --shots, or leave --sweep out"
        )
    chosen = np.zeros(len(ids), bool)
    chosen[balanced_subset(subject.config.seed, labels, HELD_OUT)] = True
    name = subject.subset.name
    return (
        Subset(ids[~chosen], f"{name} without {chosen.sum()} held out", int((~chosen).sum())),
        Subset(ids[chosen], f"held out of {name}", int(chosen.sum())),
    )


def standardize_(train: torch.Tensor, *others: torch.Tensor) -> None:
    """(N, D), (M, D) … in place: training mean 0 and deviation 1/√D in every dimension; constant ones become 0."""
    mean, deviation = train.mean(0), train.std(0, correction=0)
    scale = torch.where(deviation > 1e-6 * deviation.max(), 1 / (deviation * train.shape[1] ** 0.5), 0.0)
    for features in (train, *others):
        features.sub_(mean).mul_(scale)


def features_within(subject: Subject[LinearConfig], other: Subset) -> torch.Tensor:
    """Features (n, D) of the subject's images, as rows of those of its images and the `other` ones together.

    The two are the labelled share, whose features may be kept already: so a sweep does not extract two parts of it.
    """
    own = subject.subset.ids
    assert own is not None and other.ids is not None, "held_out lists both"
    both = np.sort(np.concatenate([own, other.ids]))
    ids = None if len(both) == len(subject.dataset.train) else both
    whole = subject.with_subset(Subset(ids, "", len(both))).train_features()
    return whole[torch.from_numpy(np.searchsorted(both, own)).to(whole.device)]


def features_for(
    subject: Subject[LinearConfig], choosing: Subset | None
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """Features to train on (None: of new crops each epoch), of the validation images, and of the images `choosing`."""
    val, cached = subject.val_features(), subject.config.cached
    held = val[:0]
    if choosing:
        of_held = subject.with_subset(choosing)
        held = features_within(of_held, subject.subset) if cached else of_held.train_features()
    if not cached:
        return None, val, held
    train = features_within(subject, choosing) if choosing else subject.train_features()
    standardize_(train, val, held)
    return train, val, held


def train_heads(
    subject: Subject[LinearConfig],
    protocol: Protocol,
    points: dict[str, Point],
    *,
    settings: dict,
    choosing: Subset | None = None,
) -> tuple[list[Epoch], dict[str, Accuracy]]:
    """Trains a head for each named point on one stream of features.

    Returns the epochs with the accuracy of every head on the validation images, and the final accuracy of every head on
    the training images `choosing`, which train nothing.
    """
    config, dimensions = subject.config, subject.encoder.info.features
    epochs, batch = settings["epochs"], images_per_step(subject, settings)
    train, val, held = features_for(subject, choosing)
    heads = Heads({name: make_head(dimensions, subject.classes, config.seed) for name in points})
    heads = heads.to(subject.encoder.device)
    milestones = protocol.milestones_at(epochs)
    groups = [Group(list(heads.heads[name].parameters()), *point, milestones) for name, point in points.items()]
    val_labels = subject.val_labels()
    how: dict[str, Any] = {
        "validation": lambda: validate(heads, in_chunks(val, val_labels)),
        "may_diverge": choosing is not None,
    }
    # A frozen encoder needs every core; small heads alone are fastest on one.
    multiplications = batch * subject.classes * dimensions * len(points) if train is not None else sys.maxsize
    with threads_for(multiplications):
        if train is not None:
            stream = feature_stream(train, subject.train_labels(), config.seed, batch, epochs)
            history = fit(heads, groups, stream, epochs=epochs, steps=len(train) // batch, **how)
        else:
            extract = subject.encoder.module
            history = fit_on_crops(subject, heads, groups, settings=settings, extract=extract, **how)
        if not choosing:
            return history, {}
        return history, validate(heads, in_chunks(held, subject.with_subset(choosing).train_labels()))


def run_sweep(config: LinearConfig, subject: Subject, protocol: Protocol) -> dict:
    """Every point of the grid at once; the held-out tenth chooses."""
    sweep = sweep_of(protocol)
    given = {"lr": sorted(config.sweep_lr) or sweep.settings["lr"], "weight_decay": sorted(config.sweep_weight_decay)}
    settings = sweep.with_flags(config) | given
    grid = [Point(lr, weight_decay) for lr in settings["lr"] for weight_decay in settings["weight_decay"]]
    points = {str(i): point for i, point in enumerate(grid)}
    training, choosing = held_out(subject)
    subject = subject.with_subset(training)
    history, held = train_heads(subject, sweep, points, settings=settings, choosing=choosing)
    found = [
        {**point._asdict(), "held_out_top1": held[name].top1, **history[-1].accuracy[name]._asdict()}
        for name, point in points.items()
    ]
    best = max(found, key=lambda one: one["held_out_top1"])  # of equals the first: the grid is sorted
    values = {name: best[name] for name in ("top1", "top5", "held_out_top1", "lr", "weight_decay")}
    return record_result(subject, sweep, settings=settings, values=values, details={"sweep": found})


def main(config: LinearConfig) -> dict:
    """Trains, validates and records; returns the result's line. Raises UserError."""
    protocol = chosen_protocol(config)
    subject = open_subject(config)
    if config.sweep:
        return run_sweep(config, subject, protocol)
    settings = protocol.with_flags(config)
    points = {"linear": Point(settings["lr"], settings["weight_decay"])}
    history, _ = train_heads(subject, protocol, points, settings=settings)
    return record_result(subject, protocol, settings=settings, values=final_scores(history, "linear"))


if __name__ == "__main__":
    run_command(LinearConfig, main)
