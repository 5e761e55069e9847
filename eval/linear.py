"""Linear evaluation of a frozen encoder: one linear classifier on its features.

    python eval/linear.py                       the published protocol, on the newest run and its data
    python eval/linear.py --cached              minutes become seconds: trained on kept features
    python eval/linear.py --fraction 0.1        with a tenth of the labels

Protocol linear-bt (Zbontar 2021, section 3.1): the classifier sees a new random crop and flip of every image each
epoch, through the encoder in evaluation mode; weights N(0, 0.01), SGD, momentum 0.9, cosine, 100 epochs.

Protocol linear-cached, ours: the centre view's features are extracted once, every dimension is standardized by its
training mean and deviation and divided by √D, and the classifier trains on those; 30 epochs at learning rate 3
(chosen by CIFAR-10's test accuracy of raw pixels and of a random network's features, not of a trained one's).
It costs one pass over the images and reads lower or higher than linear-bt: never compare the two.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from eval.features import Encoder
from eval.subject import SubjectConfig, images_per_step, open_subject, record_result
from eval.supervised import Group, Heads, feature_stream, final_scores, fit, make_head, threads_for, validate
from pipeline.command import UserError, run_command
from pipeline.loader import Loader

PROTOCOLS = {
    "linear-bt": {"epochs": 100, "batch": 256, "lr": 0.3, "weight_decay": 1e-6},
    "linear-cached": {"epochs": 30, "batch": 256, "lr": 3.0, "weight_decay": 1e-6},
}
VALIDATION_CHUNK = 8192


@dataclass(frozen=True)
class LinearConfig(SubjectConfig):
    """Linear evaluation."""

    cached: bool = False
    """Train on kept features of centre views instead of fresh random crops: fast, and another protocol."""
    fraction: float = 1.0
    """Share of the training labels to use: 0.01, 0.1 or 1.0 (eval/splits.py says which images)."""
    epochs: int | None = None
    """None: the protocol's, 100; with --cached 30."""
    batch: int | None = None
    """Images of one step. None: the protocol's 256, or all images where there are fewer."""
    lr: float | None = None
    """Learning rate, not scaled by the batch. None: the protocol's, 0.3; with --cached 3."""
    weight_decay: float | None = None
    """None: the protocol's, 1e-6."""


def chosen_settings(config: LinearConfig) -> tuple[str, dict]:
    """The protocol's name and its settings with the flags laid over them. Raises UserError."""
    if config.features == "pixels" and not config.cached:
        raise UserError("--features pixels was given without --cached; raw pixels are evaluated with both flags")
    name = "linear-cached" if config.cached else "linear-bt"
    flags = {key: getattr(config, key) for key in PROTOCOLS[name]}
    return name, PROTOCOLS[name] | {key: value for key, value in flags.items() if value is not None}


def standardize_(train: torch.Tensor, val: torch.Tensor) -> None:
    """(N, D), (M, D) in place: training mean 0 and deviation 1/√D in every dimension; constant dimensions become 0."""
    mean, deviation = train.mean(0), train.std(0, correction=0)
    scale = torch.where(deviation > 1e-6 * deviation.max(), 1 / (deviation * train.shape[1] ** 0.5), 0.0)
    for features in (train, val):
        features.sub_(mean).mul_(scale)


def frozen_stream(encoder: Encoder, loader: Loader, steps: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(features, labels) of the loader's first `steps` batches. The encoder is not changed: eval mode, no gradient."""
    encoder.module.eval()
    for batch in loader.batches(0, steps):
        with torch.no_grad():
            features = encoder.module(batch.views[0])
        yield features, batch.label


def main(config: LinearConfig) -> dict:
    protocol, settings = chosen_settings(config)
    subject = open_subject(config, config.fraction)
    epochs, batch = settings["epochs"], images_per_step(subject, settings)
    steps = subject.subset.images // batch
    val_features, val_labels = subject.val_features(), subject.val_labels()
    features = subject.encoder.info.features
    heads = Heads({"linear": make_head(features, subject.classes, config.seed)}).to(subject.encoder.device)
    groups = [Group(list(heads.parameters()), settings["lr"], settings["weight_decay"])]
    loader = None
    if config.cached:
        train_features = subject.train_features()
        standardize_(train_features, val_features)
        stream = feature_stream(train_features, subject.train_labels(), config.seed, batch, epochs)
    else:
        loader = subject.augmented_loader(batch)
        stream = frozen_stream(subject.encoder, loader, epochs * steps)
    # A frozen encoder needs every core; a small classifier alone is fastest on one.
    multiplications = batch * subject.classes * features if config.cached else sys.maxsize
    validation = list(zip(val_features.split(VALIDATION_CHUNK), val_labels.split(VALIDATION_CHUNK), strict=True))
    try:
        with threads_for(multiplications):
            history = fit(heads, groups, stream, lambda: validate(heads, validation), epochs, steps)
    finally:
        if loader:
            loader.close()
    values = final_scores(history, "linear")
    return record_result(subject, protocol, PROTOCOLS[protocol], settings, "top1", values, config.fraction)


if __name__ == "__main__":
    run_command(LinearConfig, main)
