"""Transfer to another dataset: a batch norm and a linear classifier on a frozen encoder's features of its images.

    python eval/transfer.py --dataset places205             the newest run, on data/places205
    python eval/transfer.py --dataset inat18                on data/inat18
    python eval/transfer.py --dataset folder --data DIR     any folder of images, converted

Protocols transfer-places205 (14 epochs, a tenth of the rate after 4, 8 and 12) and transfer-inat18 (84 epochs, after
24, 48 and 72): random crops and flips, average-pooled features, SGD with Nesterov momentum 0.9, learning rate
0.01 · batch / 256, weight decay 5e-4, weights N(0, 0.01). The batch norm before the classifier is VISSL's, by which
these numbers are published; it has no weight decay. transfer-folder is Places205's schedule.
"""

from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from eval.frozen import NormalizedHeads, frozen_stream
from eval.subject import SubjectConfig, images_per_step, open_subject, record_result, require_positive
from eval.supervised import Group, final_scores, fit, milestones_for, validate
from pipeline.command import DATA, run_command
from pipeline.errors import UserError

SCHEDULES = {"places205": (14, (4, 8, 12)), "inat18": (84, (24, 48, 72)), "folder": (14, (4, 8, 12))}
LR_BATCH = 256  # the batch that --lr is for
VALIDATION_CHUNK = 8192


@dataclass(frozen=True)
class TransferConfig(SubjectConfig):
    """Linear evaluation on a dataset that the encoder was not trained on."""

    dataset: Literal["places205", "inat18", "folder"] = "places205"
    """Which schedule; and which folder under data/ where --data is not given."""
    fraction: float = 1.0
    """Share of the training labels to use."""
    epochs: int | None = None
    """None: the protocol's, 14 or 84; the rate's steps keep their places in them."""
    batch: int = 256
    """Images of one step; all images where there are fewer."""
    lr: float = 0.01
    """Learning rate at batch 256; it grows with the batch."""
    weight_decay: float = 5e-4
    """Of the classifier."""
    validate_every: int = 1
    """Epochs between two validations; the last epoch is always validated."""


class AveragePooled(nn.Module):
    """An encoder's (B, D) as the one map {"linear": (B, D, 1, 1)}."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(self, images):
        return {"linear": self.encoder(images)[:, :, None, None]}


def chosen_data(config: TransferConfig) -> TransferConfig:
    """--data or the dataset's usual place. Raises UserError where a folder of images was not named."""
    if config.data is None and config.dataset == "folder":
        raise UserError("--dataset folder was given without --data; name the folder of its train.beton and val.beton")
    return replace(config, data=config.data or DATA / config.dataset)


def main(config: TransferConfig) -> dict:
    if config.features == "pixels":
        raise UserError("--features pixels was given; use eval/linear.py --cached --features pixels --data DIR")
    require_positive("validate-every", config.validate_every)
    config = chosen_data(config)
    subject = open_subject(config, config.fraction)
    published_epochs, published_milestones = SCHEDULES[config.dataset]
    published = {"epochs": published_epochs, "batch": 256, "lr": 0.01, "weight_decay": 5e-4}
    settings = {key: getattr(config, key) for key in published} | {
        "epochs": published_epochs if config.epochs is None else config.epochs
    }
    epochs, batch = settings["epochs"], images_per_step(subject, settings)
    if batch < 2:
        raise UserError(f"--batch {config.batch} leaves {batch} image a step, at least 2 are needed for batch norm")
    steps, dimensions = subject.subset.images // batch, subject.encoder.info.features
    head = NormalizedHeads({"linear": (dimensions, 1, 1)}, subject.classes, config.seed, affine=True)
    head = head.to(subject.encoder.device)
    lr, milestones = config.lr * batch / LR_BATCH, milestones_for(published_milestones, published_epochs, epochs)
    groups = [
        Group(list(head.heads.parameters()), lr, config.weight_decay, milestones),
        Group(list(head.norms.parameters()), lr, 0.0, milestones),
    ]
    val_features, val_labels = subject.val_features()[:, :, None, None], subject.val_labels()
    chunks = zip(val_features.split(VALIDATION_CHUNK), val_labels.split(VALIDATION_CHUNK), strict=True)
    validation = [({"linear": features}, labels) for features, labels in chunks]
    loader = subject.augmented_loader(batch)
    try:
        history = fit(
            head,
            groups,
            frozen_stream(AveragePooled(subject.encoder.module), loader, epochs * steps),
            lambda: validate(head, validation),
            epochs,
            steps,
            nesterov=True,
            validate_every=config.validate_every,
        )
    finally:
        loader.close()
    protocol, values = f"transfer-{config.dataset}", final_scores(history, "linear")
    return record_result(subject, protocol, published, settings, "top1", values, config.fraction)


if __name__ == "__main__":
    run_command(TransferConfig, main)
