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

from eval.frozen import NormalizedHeads
from eval.protocols import TRANSFER
from eval.subject import SubjectConfig, images_per_step, open_subject, record_result, require_positive
from eval.supervised import Group, final_scores, fit_on_crops, in_chunks, validate
from pipeline.command import DATA, run_command
from pipeline.errors import UserError

LR_BATCH = 256  # the batch that --lr is for


@dataclass(frozen=True)
class TransferConfig(SubjectConfig):
    """Linear evaluation on a dataset that the encoder was not trained on."""

    dataset: Literal["places205", "inat18", "folder"] = "places205"
    """Which schedule; and which folder under data/ where --data is not given."""
    epochs: int | None = None
    """None: the protocol's, 14 or 84. The learning rate falls at the same shares of them as published."""
    batch: int = 256
    """Images of one step; all images where there are fewer."""
    lr: float = 0.01
    """Learning rate at batch 256; it grows with the batch."""
    weight_decay: float = 5e-4
    """Weight decay of the classifier."""
    validate_every: int = 1
    """Epochs between two validations; the last epoch is always validated."""


def chosen_data(config: TransferConfig) -> TransferConfig:
    """--data or the dataset's usual place. Raises UserError where a folder of images was not named."""
    if config.data is None and config.dataset == "folder":
        raise UserError("--dataset folder was given without --data; name the folder of its train.beton and val.beton")
    return replace(config, data=config.data or DATA / config.dataset)


def main(config: TransferConfig) -> dict:
    """Trains, validates and records; returns the result's line. Raises UserError."""
    if config.features == "pixels":
        raise UserError("--features pixels was given; use eval/linear.py --cached --features pixels --data DIR")
    require_positive("validate-every", config.validate_every)
    protocol = TRANSFER[config.dataset]
    subject = open_subject(chosen_data(config))
    settings = protocol.with_flags(config)
    batch = images_per_step(subject, settings, least=2)
    encoder, dimensions = subject.encoder.module, subject.encoder.info.features
    head = NormalizedHeads({"linear": (dimensions, 1, 1)}, subject.classes, config.seed, affine=True)
    head = head.to(subject.encoder.device)
    lr, milestones = config.lr * batch / LR_BATCH, protocol.milestones_at(settings["epochs"])
    groups = [
        Group(list(head.heads.parameters()), lr, config.weight_decay, milestones),
        Group(list(head.norms.parameters()), lr, 0.0, milestones),
    ]

    def as_map(features):
        return {"linear": features[:, :, None, None]}  # (B, D) → one map of a pixel, which the head normalizes

    validation = [(as_map(x), labels) for x, labels in in_chunks(subject.val_features(), subject.val_labels())]
    history = fit_on_crops(
        subject,
        head,
        groups,
        settings=settings,
        extract=lambda images: as_map(encoder(images)),
        validation=lambda: validate(head, validation),
        nesterov=True,
        validate_every=config.validate_every,
    )
    return record_result(subject, protocol, settings=settings, values=final_scores(history, "linear"))


if __name__ == "__main__":
    run_command(TransferConfig, main)
