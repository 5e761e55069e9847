"""Semi-supervised evaluation: the whole network fine-tuned on a small labelled share of the images.

    python eval/semisup.py --fraction 0.01      the newest run, on the data it was trained on
    python eval/semisup.py --checkpoint runs/NAME --data DIR --fraction 0.1
    python eval/semisup.py --fraction 0.01 --seeds 5       mean and standard deviation of five trainings
    python eval/semisup.py --fraction 0.1 --save mine.safetensors      keeps the fine-tuned network, for timm

Protocol semisup-bt (Zbontar 2021, section 3.2): a linear classifier N(0, 0.01) on the encoder, all weights train
for 20 epochs with SGD, momentum 0.9, cosine, learning rate 0.005 for the encoder and 0.5 for the classifier, no
weight decay; random crops and flips. The published code runs on 8 GPUs, each of which normalizes its own 32 images of
a batch. So does this on one device (eval/norm_groups.py), unless --norm-images 0 is given. It also makes a step on the
images that an epoch leaves over (11 of the 1 % list's); here an epoch has full batches only. On ImageNet and subsets of
its classes the images are those of SimCLR's 1 % and 10 % lists, elsewhere a seeded class-balanced share
(eval/splits.py).
"""

import copy
import json
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eval.norm_groups import groups_of, norm_groups
from eval.protocols import SEMISUP
from eval.subject import Subject, SubjectConfig, images_per_step, open_subject, record_result, require_positive
from eval.supervised import Group, Heads, final_scores, fit_on_crops, inputs_of, make_head, validate
from pipeline.command import run_command
from pipeline.disk import write_whole
from pipeline.errors import UserError
from train.content import tensor_file


@dataclass(frozen=True)
class SemisupConfig(SubjectConfig):
    """Semi-supervised evaluation."""

    fraction: float = 0.1
    """Share of the training labels to use: 0.01, 0.1 or 1.0 (eval/splits.py says which images)."""
    epochs: int = SEMISUP.settings["epochs"]
    """Passes over the labelled images."""
    batch: int = SEMISUP.settings["batch"]
    """Images of one step; all images where there are fewer."""
    lr_backbone: float = SEMISUP.settings["lr_backbone"]
    """Learning rate of the encoder's weights, not scaled by the batch."""
    lr_classifier: float = SEMISUP.settings["lr_classifier"]
    """Learning rate of the linear classifier."""
    weight_decay: float = SEMISUP.settings["weight_decay"]
    """Weight decay of all weights."""
    norm_images: int = SEMISUP.settings["norm_images"]
    """Images over which batch norm takes its statistics in training: neighbours in the shuffled batch, in as few groups
    of about equal size as that many at most need. The running statistics are the first group's. 0: the whole batch."""
    validate_every: int = 1
    """Epochs between two validations; the last epoch is always validated."""
    seeds: int = 1
    """Trainings, of --seed and the seeds after it: the values are their means, and <value>_std the sample standard
    deviations. A seed decides the classifier's start, the order, the views and a balanced share's images."""
    save: Path | None = None
    """Write the fine-tuned network with its classifier to this .safetensors file, by timm's names, so that
    timm.create_model(ARCH, num_classes=K, checkpoint_path=FILE) is that network."""


class FineTuned(nn.Module):
    """An encoder with classifiers on it: (B, 3, H, W) → {name: (B, K)}."""

    def __init__(self, backbone: nn.Module, heads: Heads):
        super().__init__()
        self.backbone, self.heads = backbone, heads

    def forward(self, images):
        return self.heads(self.backbone(images))


def require_groups(batch: int, norm_images: int) -> None:
    """Raises UserError where batch norm would get a group of one image."""
    if norm_images < 0 or norm_images == 1 or (norm_images and batch // groups_of(batch, norm_images) < 2):
        raise UserError(
            f"--norm-images {norm_images} was given with {batch} images a step, 0 or groups of 2 images and more are "
            "expected; give 0 for statistics of the whole batch"
        )


def fine_tune(subject: Subject[SemisupConfig]) -> tuple[dict[str, float], nn.Linear]:
    """Trains encoder and classifier, and returns the scores and the classifier. The subject's encoder is changed."""
    config = subject.config
    settings = SEMISUP.with_flags(config)
    require_groups(images_per_step(subject, settings, least=2), config.norm_images)
    head = make_head(subject.encoder.info.features, subject.classes, config.seed)
    heads = Heads({"semisup": head})
    model = FineTuned(subject.encoder.module, heads.to(subject.encoder.device))
    groups = [
        Group(list(model.backbone.parameters()), config.lr_backbone, config.weight_decay),
        Group(list(heads.parameters()), config.lr_classifier, config.weight_decay),
    ]
    labels = subject.val_labels()
    with subject.val_loader() as val, norm_groups(model.backbone, config.norm_images):
        history = fit_on_crops(
            subject,
            model,
            groups,
            settings=settings,
            validation=lambda: validate(model, inputs_of(val.batches(), labels=labels)),
            validate_every=config.validate_every,
        )
    return final_scores(history, "semisup"), head


def by_timms_names(subject: Subject[SemisupConfig], head: nn.Linear) -> tuple[str, dict[str, torch.Tensor]]:
    """(timm's name of the network; all weights, by timm's names). Raises UserError where timm has no such network."""
    import timm

    info = subject.encoder.info
    name, tensors = info.arch.removeprefix("timm:"), dict(subject.encoder.module.state_dict())
    expected: dict = {}
    if name in timm.list_models():
        with torch.random.fork_rng(devices=[]):  # of its weights only names and shapes count
            theirs: Any = timm.create_model(name, num_classes=subject.classes)
        tensors |= {f"{theirs.pretrained_cfg['classifier']}.{n}": weight for n, weight in head.state_dict().items()}
        expected = theirs.state_dict()
    if {n: w.shape for n, w in tensors.items()} != {n: w.shape for n, w in expected.items()}:
        raise UserError(
            f"--save keeps a network by timm's names, and timm has no {info.arch} ({info.stem} stem) with these "
            "weights; leave --save out, or fine-tune a network of timm"
        )
    return name, {n: weight.detach().cpu().contiguous() for n, weight in tensors.items()}


def require_savable(subject: Subject[SemisupConfig], path: Path) -> None:
    """Raises UserError, before the training, for what --save could not keep after it."""
    if subject.config.seeds > 1:
        raise UserError(f"--save keeps one network, and --seeds {subject.config.seeds} trains several; give one --seed")
    if path.suffix != ".safetensors" or not path.parent.is_dir():
        raise UserError(f"--save {path}: give a file name that ends in .safetensors, in a folder that is there")
    by_timms_names(subject, make_head(subject.encoder.info.features, subject.classes, 0))


def save(subject: Subject[SemisupConfig], head: nn.Linear, path: Path) -> None:
    """Writes the fine-tuned network. Raises UserError where the disk does not take it."""
    name, tensors = by_timms_names(subject, head)
    info = subject.encoder.info
    about = {"arch": name, "classes": json.dumps(subject.dataset.classes), "resolution_px": str(info.resolution_px)}
    about["normalization"] = json.dumps(asdict(info.normalization))
    write_whole(path, tensor_file(tensors, about))
    call = f'timm.create_model("{name}", num_classes={subject.classes}, checkpoint_path="{path}")'
    print(f"{path}: {call}", file=sys.stderr)


def over_seeds(scores: list[dict[str, float]]) -> dict[str, float]:
    """Means of the scores of several seeds, and their sample standard deviations as <name>_std; one seed's as it is."""
    if len(scores) == 1:
        return scores[0]
    by_name = {name: [score[name] for score in scores] for name in scores[0]}
    means = {name: statistics.fmean(values) for name, values in by_name.items()}
    return means | {f"{name}_std": statistics.stdev(values) for name, values in by_name.items()}


def main(config: SemisupConfig) -> dict:
    """Trains once a seed, validates and records; returns the result's line. Raises UserError."""
    if config.features == "pixels":
        raise UserError("--features pixels has no weights to fine-tune; use eval/linear.py --cached --features pixels")
    for flag in ("validate_every", "seeds"):
        require_positive(flag.replace("_", "-"), getattr(config, flag))
    first, scores, seeds = open_subject(config), [], []
    if config.save:
        require_savable(first, config.save.expanduser())
    # The file may hold another step's weights by the time a seed is through, so that they are kept here.
    pretrained = copy.deepcopy(first.encoder.module.state_dict())
    for seed in range(config.seed, config.seed + config.seeds):
        if config.seeds > 1:
            print(f"seed {seed}", file=sys.stderr)
        subject = first.with_seed(seed)
        subject.encoder.module.load_state_dict(pretrained)
        score, head = fine_tune(subject)
        scores.append(score)
        seeds.append({"seed": seed, "split": subject.subset.name, **score})
    if config.save:
        save(subject, head, config.save.expanduser())
    settings, values = SEMISUP.with_flags(config), over_seeds(scores)
    return record_result(first, SEMISUP, settings=settings, values=values, details={"seeds": seeds})


if __name__ == "__main__":
    run_command(SemisupConfig, main)
