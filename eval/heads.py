"""Linear classifiers on all five stages of a frozen ResNet at once: what each depth of it knows.

    python eval/heads.py                                    the newest run, on the data it was trained on
    python eval/heads.py --checkpoint resnet50.pth --data DIR

Protocol heads-mmselfsup: the stem's and the four stages' maps are average-pooled to about 9,000 numbers
(eval/frozen.py has the table), normalized by a batch norm without weights, and classified linearly; weights
N(0, 0.01), SGD with Nesterov momentum 0.9, learning rate 0.01, a tenth of it after epochs 60 and 80 of 90, weight
decay 1e-4, batch 256; random crops and flips. All heads train on one pass of the encoder. (MMSelfSup's own
configuration jitters colours besides.)
"""

from dataclasses import dataclass, fields

from eval.frozen import NormalizedHeads, StageFeatures, centre_stream, frozen_stream, map_shapes
from eval.subject import SubjectConfig, images_per_step, open_subject, record_result, require_positive
from eval.supervised import Group, final_scores, fit, milestones_for, validate
from pipeline.command import run_command
from pipeline.errors import UserError

MILESTONES, PUBLISHED_EPOCHS = (60, 80), 90
HEADLINE = "feature5"


@dataclass(frozen=True)
class HeadsConfig(SubjectConfig):
    """Linear evaluation of five stages."""

    fraction: float = 1.0
    """Share of the training labels to use: 0.01, 0.1 or 1.0 (eval/splits.py says which images)."""
    epochs: int = PUBLISHED_EPOCHS
    """Passes over the training images; the rate's steps keep their places in them."""
    batch: int = 256
    """Images of one step; all images where there are fewer."""
    lr: float = 0.01
    """Learning rate, not scaled by the batch."""
    weight_decay: float = 1e-4
    """Of the classifiers."""
    validate_every: int = 10
    """Epochs between two validations, each a pass of the encoder; the last epoch is always validated."""


SETTINGS = ("epochs", "batch", "lr", "weight_decay")
PUBLISHED = {f.name: f.default for f in fields(HeadsConfig) if f.name in SETTINGS} | {"pooling": "as published"}


def main(config: HeadsConfig) -> dict:
    if config.features == "pixels":
        raise UserError("--features pixels has no stages; use eval/linear.py --cached --features pixels")
    require_positive("validate-every", config.validate_every)
    subject = open_subject(config, config.fraction)
    settings = {key: getattr(config, key) for key in SETTINGS}
    batch = images_per_step(subject, settings)
    if batch < 2:
        raise UserError(f"--batch {config.batch} leaves {batch} image a step, at least 2 are needed for batch norm")
    steps = subject.subset.images // batch
    extract = StageFeatures(subject.encoder.module)
    shapes = map_shapes(extract, subject.encoder)
    settings["pooling"] = "as published" if extract.published else "adaptive"
    heads = NormalizedHeads(shapes, subject.classes, config.seed, affine=False).to(subject.encoder.device)
    milestones = milestones_for(MILESTONES, PUBLISHED_EPOCHS, config.epochs)
    groups = [Group(list(heads.parameters()), config.lr, config.weight_decay, milestones)]
    val_labels = subject.val_labels()
    train_loader, val_loader = subject.augmented_loader(batch), subject.val_loader()
    try:
        history = fit(
            heads,
            groups,
            frozen_stream(extract, train_loader, config.epochs * steps),
            lambda: validate(heads, centre_stream(extract, val_loader, val_labels)),
            config.epochs,
            steps,
            nesterov=True,
            validate_every=config.validate_every,
        )
    finally:
        train_loader.close()
        val_loader.close()
    scores = {name: final_scores(history, name) for name in shapes}
    values = {f"{name}_{key}": scores[name][key] for name in shapes for key in ("top1", "top5")}
    details = {"dimensions": {name: head.in_features for name, head in heads.heads.items()}}
    metric = f"{HEADLINE}_top1"
    return record_result(subject, "heads-mmselfsup", PUBLISHED, settings, metric, values, config.fraction, details)


if __name__ == "__main__":
    run_command(HeadsConfig, main)
