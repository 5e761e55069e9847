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

import functools
import sys
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from eval.frozen import frozen_stream
from eval.metrics import Accuracy
from eval.splits import Subset
from eval.subject import Subject, SubjectConfig, images_per_step, open_subject, record_result
from eval.supervised import (
    Epoch,
    Group,
    Heads,
    feature_stream,
    final_scores,
    fit,
    make_head,
    milestones_for,
    threads_for,
    validate,
)
from pipeline.choices.subsets import balanced_subset
from pipeline.command import run_command
from pipeline.errors import UserError

PROTOCOLS = {
    "linear-bt": {"epochs": 100, "batch": 256, "lr": 0.3, "weight_decay": 1e-6},
    "linear-avgpool": {"epochs": 100, "batch": 256, "lr": 30.0, "weight_decay": 0.0},
    "linear-cached": {"epochs": 30, "batch": 256, "lr": 3.0, "weight_decay": 1e-6},
}
MILESTONES = {"linear-avgpool": (60, 80)}  # of the published epochs; the others decay along a cosine
SWEEP_LR = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # × the protocol's
SWEEP_WEIGHT_DECAY = (0.0, 1e-6, 1e-4)
HELD_OUT = 0.1
VALIDATION_CHUNK = 8192


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
    fraction: float = 1.0
    """Share of the training labels to use: 0.01, 0.1 or 1.0 (eval/splits.py says which images)."""
    epochs: int | None = None
    """None: the protocol's, 100; with --cached 30."""
    batch: int | None = None
    """Images of one step. None: the protocol's 256, or all images where there are fewer."""
    lr: float | None = None
    """Learning rate, not scaled by the batch. None: the protocol's, 0.3, avgpool's 30; with --cached 3."""
    weight_decay: float | None = None
    """None: the protocol's, 1e-6, avgpool's 0."""


def chosen_settings(config: LinearConfig) -> tuple[str, dict]:
    """The protocol's name and its settings with the flags laid over them. Raises UserError."""
    if config.features == "pixels" and not config.cached:
        raise UserError("--features pixels was given without --cached; raw pixels are evaluated with both flags")
    if config.cached and config.protocol != "bt":
        raise UserError(f"--cached is a protocol of its own and --protocol {config.protocol} another; give one of them")
    if config.sweep and (config.lr is not None or config.weight_decay is not None):
        raise UserError("--sweep was given with --lr or --weight-decay; use --sweep-lr and --sweep-weight-decay")
    name = "linear-cached" if config.cached else f"linear-{config.protocol}"
    flags = {key: getattr(config, key) for key in PROTOCOLS[name]}
    return name, PROTOCOLS[name] | {key: value for key, value in flags.items() if value is not None}


def sweep_settings(config: LinearConfig, protocol: str, settings: dict) -> tuple[dict, dict]:
    """The published settings and those of this sweep: lists of rates and decays in place of one each."""
    default = {"lr": [round(PROTOCOLS[protocol]["lr"] * x, 6) for x in SWEEP_LR]}
    default |= {"weight_decay": list(SWEEP_WEIGHT_DECAY), "held_out": HELD_OUT}
    given = {"lr": sorted(config.sweep_lr) or default["lr"], "weight_decay": sorted(config.sweep_weight_decay)}
    if not given["weight_decay"]:
        raise UserError("--sweep-weight-decay was given without a value, at least one is expected")
    return PROTOCOLS[protocol] | default, settings | default | given


def held_out(subject: Subject) -> tuple[Subset, Subset]:
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


Judged = dict[str, tuple[torch.Tensor, torch.Tensor]]  # beginning of a score's name → features, labels


def labelled_features(subject: Subject, other: Subset | None) -> torch.Tensor:
    """Features of the subject's images; with the `other` part of the same images, rows of what is kept of both."""
    if other is None:
        return subject.train_features()
    own = subject.subset.ids
    both = np.sort(np.concatenate([own, other.ids]))
    ids = None if len(both) == len(subject.dataset.train) else both
    whole = subject.with_subset(Subset(ids, "", len(both))).train_features()
    return whole[torch.from_numpy(np.searchsorted(both, own)).to(whole.device)]


def judged_features(config: LinearConfig, subject: Subject, choosing: Subset | None) -> Judged:
    """What heads are judged on: the validation images and, as "held out …", the training images that choose."""
    judged = {"": (subject.val_features(), subject.val_labels())}
    if choosing:
        held = subject.with_subset(choosing)
        features = labelled_features(held, subject.subset) if config.cached else held.train_features()
        judged["held out "] = (features, held.train_labels())
    return judged


def scores_of(model: Heads, judged: Judged) -> dict[str, Accuracy]:
    scores = {}
    for prefix, (features, labels) in judged.items():
        chunks = zip(features.split(VALIDATION_CHUNK), labels.split(VALIDATION_CHUNK), strict=True)
        scores |= {prefix + name: accuracy for name, accuracy in validate(model, chunks).items()}
    return scores


def train_heads(
    config: LinearConfig,
    subject: Subject,
    protocol: str,
    settings: dict,
    points: dict[str, tuple[float, float]],
    choosing: Subset | None = None,
) -> list[Epoch]:
    """Trains a head for each named (learning rate, weight decay) on one stream of features."""
    epochs, batch = settings["epochs"], images_per_step(subject, settings)
    steps, dimensions = subject.subset.images // batch, subject.encoder.info.features
    judged = judged_features(config, subject, choosing)
    heads = Heads({name: make_head(dimensions, subject.classes, config.seed) for name in points})
    heads = heads.to(subject.encoder.device)
    milestones = None
    if protocol in MILESTONES:
        milestones = milestones_for(MILESTONES[protocol], PROTOCOLS[protocol]["epochs"], epochs)
    groups = [Group(list(heads.heads[name].parameters()), *point, milestones) for name, point in points.items()]
    loader, multiplications = None, sys.maxsize  # a frozen encoder needs every core
    if config.cached:
        features = labelled_features(subject, choosing)
        standardize_(features, *(others for others, _ in judged.values()))
        stream = feature_stream(features, subject.train_labels(), config.seed, batch, epochs)
        multiplications = batch * subject.classes * dimensions * len(points)  # small heads alone are fastest on one
    else:
        loader = subject.augmented_loader(batch)
        stream = frozen_stream(subject.encoder.module, loader, epochs * steps)
    try:
        with threads_for(multiplications):
            validation = functools.partial(scores_of, heads, judged)
            return fit(heads, groups, stream, validation, epochs, steps, may_diverge=choosing is not None)
    finally:
        if loader:
            loader.close()


def run_sweep(config: LinearConfig, subject: Subject, protocol: str, settings: dict) -> dict:
    """Every point of the grid at once; the held-out tenth chooses."""
    published, settings = sweep_settings(config, protocol, settings)
    grid = [(lr, weight_decay) for lr in settings["lr"] for weight_decay in settings["weight_decay"]]
    points = {str(i): point for i, point in enumerate(grid)}
    training, choosing = held_out(subject)
    subject = subject.with_subset(training)
    last = train_heads(config, subject, protocol, settings, points, choosing)[-1].accuracy
    best = max(points, key=lambda name: last[f"held out {name}"].top1)  # of equals the first: the grid is sorted
    details = [
        dict(zip(("lr", "weight_decay"), point, strict=True))
        | {"held_out_top1": last[f"held out {name}"].top1, **last[name]._asdict()}
        for name, point in points.items()
    ]
    values = {**last[best]._asdict(), "held_out_top1": last[f"held out {best}"].top1}
    values |= dict(zip(("lr", "weight_decay"), points[best], strict=True))
    return record_result(
        subject, f"{protocol}-sweep", published, settings, "top1", values, config.fraction, {"sweep": details}
    )


def main(config: LinearConfig) -> dict:
    protocol, settings = chosen_settings(config)
    subject = open_subject(config, config.fraction)
    if config.sweep:
        return run_sweep(config, subject, protocol, settings)
    points = {"linear": (settings["lr"], settings["weight_decay"])}
    history = train_heads(config, subject, protocol, settings, points)
    values = final_scores(history, "linear")
    return record_result(subject, protocol, PROTOCOLS[protocol], settings, "top1", values, config.fraction)


if __name__ == "__main__":
    run_command(LinearConfig, main)
