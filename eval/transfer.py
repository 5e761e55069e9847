"""Transfer to another dataset: a batch norm and a linear classifier on a frozen encoder's maps of its images.

    python eval/transfer.py --dataset places205             the newest run, on data/places205
    python eval/transfer.py --dataset inat18                on data/inat18
    python eval/transfer.py --dataset folder --data DIR     any folder of images, converted
    python eval/transfer.py --stages feature5 feature1 feature2 feature3 feature4 output     VISSL's table by layer

Protocols transfer-places205 (14 epochs, a tenth of the rate after 4, 8 and 12) and transfer-inat18 (84 epochs, after
24, 48 and 72): random crops and flips; the last stage's map averaged to 2×2 (eval/frozen.py; a ResNet-50's are 8192
numbers), a batch norm of its channels, a linear classifier; SGD with Nesterov momentum 0.9, learning rate
0.01 · batch / 256, weight decay 5e-4 on the classifier and its bias, none on the batch norm. transfer-folder is
Places205's schedule. `--stages output`, a ResNet's average pool, is a modified protocol; so is any network without
stages. Further stages train on the same pass and change nothing of the first.

Source: VISSL, by which these numbers are published, configs/config/benchmark/linear_image_classification/places205/
eval_resnet_8gpu_transfer_places205_linear.yaml (and inaturalist18/, which has res5avg besides): 8 GPUs of 32 images,
their batch norms synchronized; regularize_bn False, regularize_bias True. (The papers of PIRL and Barlow Twins say
"reduced at two equally spaced intervals", the configurations have three steps.)
"""

from dataclasses import dataclass, replace
from typing import Literal

from eval.frozen import (
    NormalizedHeads,
    StageFeatures,
    StagesConfig,
    chosen_stages,
    map_shapes,
    stage_settings,
    train_heads,
)
from eval.protocols import TRANSFER
from eval.subject import images_per_step, open_subject, record_result, require_positive
from eval.supervised import Group, final_scores
from pipeline.command import DATA, run_command
from pipeline.errors import UserError

LR_BATCH = 256  # the batch that --lr is for


@dataclass(frozen=True)
class TransferConfig(StagesConfig):
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
    """Epochs between two validations, each a pass of the encoder; the last epoch is always validated."""


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
    batch = images_per_step(subject, protocol.with_flags(config), least=2)
    extract = StageFeatures(subject.encoder.module, chosen_stages(config, subject.encoder))
    shapes = map_shapes(extract, subject.encoder)
    settings = protocol.with_flags(config) | stage_settings(extract)
    heads = NormalizedHeads(shapes, subject.classes, config.seed, affine=True).to(subject.encoder.device)
    lr, milestones = config.lr * batch / LR_BATCH, protocol.milestones_at(settings["epochs"])
    groups = [
        Group(list(heads.heads.parameters()), lr, config.weight_decay, milestones),
        Group(list(heads.norms.parameters()), lr, 0.0, milestones),
    ]
    history = train_heads(
        subject, heads, groups, settings=settings, extract=extract, validate_every=config.validate_every
    )
    values = final_scores(history, extract.stages[0])
    if len(extract.stages) > 1:
        del values["final_loss"]  # it is of all stages together
    for stage in extract.stages[1:]:
        scores = final_scores(history, stage)
        values |= {f"{stage}_{name}": scores[name] for name in ("top1", "top5")}
    details = {"dimensions": {name: head.in_features for name, head in heads.heads.items()}}
    return record_result(subject, protocol, settings=settings, values=values, details=details)


if __name__ == "__main__":
    run_command(TransferConfig, main)
