"""Linear classifiers on all five stages of a frozen ResNet at once: what each depth of it knows.

    python eval/heads.py                                    the newest run, on the data it was trained on
    python eval/heads.py --checkpoint resnet50.pth --data DIR

Protocol heads-mmselfsup: the stem's and the four stages' maps are average-pooled to about 9,000 numbers
(eval/frozen.py has the table), normalized by a batch norm without weights, and classified linearly; weights
N(0, 0.01), SGD with Nesterov momentum 0.9, learning rate 0.01, a tenth of it after epochs 30 and 60 of 90, weight
decay 1e-4, batch 256; random crops and flips, brightness, contrast and saturation jittered in every one, then
AlexNet's colour noise (pipeline/choices/lighting.py). All heads train on one pass of the encoder.

Source: MMSelfSup v0.9.0, resnet50_mhead_linear-8xb32-steplr-90e_in1k.py, lines 13 to 48; its model card has the
published numbers. (The configuration of 1.x steps at 60 and 80, resizes bicubically and has no head on the stem.)
"""

from dataclasses import dataclass

from eval.frozen import NormalizedHeads, StageFeatures, map_shapes, stage_settings, train_heads
from eval.protocols import HEADS
from eval.subject import SubjectConfig, images_per_step, open_subject, record_result, require_positive
from eval.supervised import Group, final_scores
from pipeline.command import run_command
from pipeline.errors import UserError


@dataclass(frozen=True)
class HeadsConfig(SubjectConfig):
    """Linear evaluation of five stages."""

    epochs: int = HEADS.settings["epochs"]
    """Passes over the training images; the learning rate falls at the same shares of them as published."""
    batch: int = HEADS.settings["batch"]
    """Images of one step; all images where there are fewer."""
    lr: float = HEADS.settings["lr"]
    """Learning rate, not scaled by the batch."""
    weight_decay: float = HEADS.settings["weight_decay"]
    """Weight decay of the classifiers."""
    validate_every: int = 10
    """Epochs between two validations, each a pass of the encoder; the last epoch is always validated."""


def main(config: HeadsConfig) -> dict:
    """Trains, validates and records; returns the result's line. Raises UserError."""
    if config.features == "pixels":
        raise UserError("--features pixels has no stages; use eval/linear.py --cached --features pixels")
    require_positive("validate-every", config.validate_every)
    subject = open_subject(config)
    images_per_step(subject, HEADS.with_flags(config), least=2)
    extract = StageFeatures(subject.encoder.module)
    shapes = map_shapes(extract, subject.encoder)
    settings = HEADS.with_flags(config) | {"pooling": stage_settings(extract)["pooling"]}
    heads = NormalizedHeads(shapes, subject.classes, config.seed, affine=False).to(subject.encoder.device)
    group = Group(list(heads.parameters()), config.lr, config.weight_decay, HEADS.milestones_at(config.epochs))
    history = train_heads(
        subject, heads, [group], settings=settings, extract=extract, validate_every=config.validate_every
    )
    scores = {name: final_scores(history, name) for name in shapes}
    values = {f"{name}_{key}": scores[name][key] for name in shapes for key in ("top1", "top5")}
    details = {"dimensions": {name: head.in_features for name, head in heads.heads.items()}}
    return record_result(subject, HEADS, settings=settings, values=values, details=details)


if __name__ == "__main__":
    run_command(HeadsConfig, main)
