"""VOC 2007 classification: linear SVMs on a frozen encoder's features, all labels and few.

    python pipeline/convert.py --source DIR --out data/voc07      once; DIR holds VOC2007, or VOCdevkit
    python eval/svm.py --voc DIR                                  the newest run
    python eval/svm.py --voc DIR --checkpoint resnet50.pth --no-low-shot
    python eval/svm.py --voc DIR --stages feature5 feature1 feature2 feature3 feature4     VISSL's table by layer

Protocol svm-voc07 (Goyal 2019, as VISSL runs it): whole images of trainval, squashed into the square; the last stage's
map averaged to 2×2 (eval/frozen.py; a ResNet-50's are 8192 numbers), scaled to length 1; for every class one LinearSVC
(squared hinge, L2, positives count twice, at most 2000 iterations), its cost from .01 … 1000 the one with the best
average precision in 3-fold cross-validation on trainval; judged on test by the area under the precision-recall curve
(`map_area`; `map` is VOC 2007's own average of 11 points, about 3 lower). An image that shows a class in difficult
objects only counts as a negative in training and not at all on test. A ResNet's average pool (`--stages output`) and
`--view centre` are modified protocols; so is any network without stages.

Source: VISSL, configs/config/benchmark/linear_image_classification/voc07/eval_resnet_8gpu_transfer_voc07_svm.yaml
(Resize 256, then Resize [224, 224]) and vissl/utils/svm_utils/{svm_trainer,evaluate}.py. The paper itself says no more
than that PIRL's settings were used (Zbontar 2021, appendix C.1); with centre crops and the average pool its published
weights were found to read 86.83 in place of 86.2 (facebookresearch/barlowtwins, issue 32).

Low-shot (`map_area_k1` … `map_area_k96`): k positives and 19·k negatives of each class, five samples, their mean; the
cost, one for all classes, is the one of 1, 10, 100 that reads best on test, as published. `details` has all of them.
(VISSL's own configuration of it resizes once, to [224, 224].)

Cost, of all of VOC2007: 660 cross-validated SVMs, whose features the processes share; each copies those of its folds
beside it, and once more in liblinear's form of 16 bytes a number. At 8192 numbers that is 0.75 GB a process (--workers
bounds it) and about 10 s of a core for a class and a cost, 40 minutes of one core in all (on made-up features).
"""

import itertools
import os
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import cross_val_score
from sklearn.svm import LinearSVC
from sklearn.utils.parallel import Parallel, delayed

from eval.frozen import StageFeatures, StagesConfig, chosen_stages, map_shapes, stage_encoder, stage_settings
from eval.metrics import average_precision_11, average_precision_area
from eval.protocols import SVM
from eval.splits import Dataset, Subset, open_dataset
from eval.subject import Subject, open_subject, record_result
from eval.voc import ABSENT, CLASSES, IGNORED, PRESENT, voc_targets
from pipeline.command import DATA, run_command
from pipeline.errors import UserError
from pipeline.progress import progress

LOW_SHOT_COSTS = (1.0, 10.0, 100.0)
FOLDS = SVM.settings["folds"]


@dataclass(frozen=True)
class SvmConfig(StagesConfig):
    """VOC 2007 classification by linear SVMs. Without --data it is data/voc07; --shots is not used."""

    voc: Path = DATA / "VOCdevkit"
    """The folder that VOC2007 lies in, for its annotations."""
    view: Literal["squash", "centre"] = SVM.settings["view"]
    """What of an image is seen: all of it, squashed into the square, or the centre crop of other evaluations."""
    costs: tuple[float, ...] = tuple(SVM.settings["costs"])
    """Costs that are cross-validated."""
    low_shot: bool = True
    """Whether to train on k images a class as well."""
    low_shot_k: tuple[int, ...] = tuple(SVM.settings["low_shot_k"])
    """The numbers of positives; those that a class has not are left out."""
    low_shot_samples: int = SVM.settings["low_shot_samples"]
    """Independent samples of each k."""
    fraction: Annotated[float, tyro.conf.Fixed, tyro.conf.Suppress] = 1.0  # no flag: the low-shot part has its own


@dataclass(frozen=True)
class VocDataset(Dataset):
    """trainval and test, with targets (N, 20), (M, 20) in place of labels."""

    train_targets: np.ndarray
    val_targets: np.ndarray

    @property
    def classes(self) -> list[str]:
        return list(CLASSES)


def open_voc(config: SvmConfig) -> VocDataset:
    """The converted images and their annotations. Raises UserError where a class cannot be validated or judged."""
    data = (config.data or DATA / "voc07").expanduser()
    if not (data / "train.beton").is_file():
        raise UserError(
            f"no train.beton in {data}; make it with `python pipeline/convert.py --source {config.voc} --out {data}`"
        )
    images = open_dataset(data)
    targets = [voc_targets(config.voc.expanduser(), beton.file_names()) for beton in (images.train, images.val)]
    for beton, of_split, least, what in (
        (images.train, targets[0], FOLDS, "3-fold cross-validation"),
        (images.val, targets[1], 1, "an average precision"),
    ):
        counts = (of_split == PRESENT).sum(0)
        if counts.min() < least:
            raise UserError(
                f"{beton.path} has {counts.min()} images with {CLASSES[counts.argmin()]}, {what} needs {least}; "
                "convert all of VOC2007's images"
            )
    return VocDataset(images.name, images.train, images.val, images.val_labels, *targets)


def stage_features(subject: Subject[SvmConfig], stage: str) -> list[np.ndarray]:
    """Of trainval (N, D) and test (M, D), float64 rows of length 1; kept in the run folder, 32 kB an image."""
    config, encoder = subject.config, stage_encoder(subject.encoder, stage)
    sets = [replace(subject.feature_set(split), encoder=encoder) for split in ("train", "val")]
    return [unit_rows(replace(one, squash=config.view == "squash").read().float().numpy()) for one in sets]


def unit_rows(features: np.ndarray) -> np.ndarray:
    """(N, D) → float64, every row divided by its length (plus 1e-5, as published)."""
    features = features.astype(np.float64)
    return features / (np.linalg.norm(features, axis=1, keepdims=True) + 1e-5)


def make_svm(cost: float, seed: int) -> LinearSVC:
    """The classifier of one class; positives count twice."""
    return LinearSVC(
        C=cost,
        penalty="l2",
        loss="squared_hinge",
        dual=True,
        tol=1e-4,
        max_iter=2000,
        class_weight={PRESENT: 2, -1: 1},
        random_state=seed,
    )


def svm_labels(targets: np.ndarray) -> np.ndarray:
    """(N,) targets → 1 and -1: the ignored are negatives in training."""
    return np.where(targets == PRESENT, 1, -1)


def cross_validated(features: np.ndarray, targets: np.ndarray, cost: float, seed: int) -> float:
    """Mean average precision of three folds, one class: (N, D), (N,) → a share."""
    with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):  # 2000 iterations are the protocol's
        svm, labels = make_svm(cost, seed), svm_labels(targets)
        return cross_val_score(svm, features, labels, cv=FOLDS, scoring="average_precision").mean()


def test_scores(
    features: np.ndarray, targets: np.ndarray, test: np.ndarray, cost: float, seed: int, rows=slice(None)
) -> tuple[np.ndarray, bool]:
    """Decision values (M,) of the test images, of an SVM trained on some rows, and whether it converged; one class."""
    with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):
        svm = make_svm(cost, seed).fit(features[rows], svm_labels(targets[rows]))
    return svm.decision_function(test), bool(np.max(svm.n_iter_) < svm.max_iter)


def judged(scores: np.ndarray, targets: np.ndarray) -> tuple[float, float]:
    """11-point and area average precision of one class, without the images whose only such objects are difficult."""
    kept = targets != IGNORED
    present = targets[kept] == PRESENT
    return average_precision_11(scores[kept], present), average_precision_area(scores[kept], present)


def low_shot_rows(targets: np.ndarray, k: int, random: np.random.Generator) -> np.ndarray:
    """k positives and (classes − 1)·k negatives of one class: (N,) targets → rows."""
    negatives = (len(CLASSES) - 1) * k
    return np.concatenate(
        [
            random.choice(np.flatnonzero(targets == PRESENT), k, replace=False),
            random.choice(np.flatnonzero(targets == ABSENT), negatives, replace=False),
        ]
    )


def in_parallel(config: SvmConfig, task, arguments: list[tuple], what: str) -> list:
    """[task(*argument)] in processes, which share the features' memory; in this one where one worker is asked for."""
    jobs = config.workers or len(os.sched_getaffinity(0))
    made = Parallel(jobs, return_as="generator")(delayed(task)(*argument) for argument in arguments)
    return list(progress(made, what, len(arguments), unit="SVM"))


def full_svm(config: SvmConfig, features, targets, test, test_targets) -> tuple[dict, list[dict]]:
    """Every class at its cross-validated cost: the values, and per class what there is to say."""
    classes = range(len(CLASSES))
    grid = [(features, targets[:, c], cost, config.seed) for c in classes for cost in config.costs]
    validated = np.array(in_parallel(config, cross_validated, grid, "3 folds")).reshape(len(CLASSES), -1)
    costs = [config.costs[i] for i in validated.argmax(1)]
    chosen = [(features, targets[:, c], test, costs[c], config.seed) for c in classes]
    fitted = in_parallel(config, test_scores, chosen, "all labels")
    precision = 100 * np.array([judged(scores, test_targets[:, c]) for c, (scores, _) in enumerate(fitted)])
    by_class = [
        {"class": CLASSES[c], "cost": costs[c], "ap_area": area, "ap": points, "converged": fitted[c][1]}
        for c, (points, area) in enumerate(precision)
    ]
    points, area = precision.mean(0)
    return {"map_area": area, "map": points}, by_class


def low_shot_svm(config: SvmConfig, features, targets, test, test_targets) -> tuple[dict, list[dict]]:
    """Few labels: the mean over samples of the best cost's mAP for every k, and all of them."""
    most = min((targets == PRESENT).sum(0).min(), (targets == ABSENT).sum(0).min() // (len(CLASSES) - 1))
    ks = [k for k in config.low_shot_k if k <= most]
    arguments = []
    for k, cost, sample in itertools.product(ks, LOW_SHOT_COSTS, range(config.low_shot_samples)):
        random = np.random.default_rng((config.seed, sample, k))  # every cost trains on the same images
        for c in range(len(CLASSES)):
            rows = low_shot_rows(targets[:, c], k, random)
            arguments.append((features, targets[:, c], test, cost, config.seed, rows))
    found = in_parallel(config, test_scores, arguments, "few labels")
    precision = [judged(scores, test_targets[:, i % len(CLASSES)])[1] for i, (scores, _) in enumerate(found)]
    shape = (len(ks), len(LOW_SHOT_COSTS), config.low_shot_samples, len(CLASSES))
    by_sample = 100 * np.reshape(precision, shape).mean(-1)
    values: dict[str, float] = {}
    details: list[dict] = []
    for k, means in zip(ks, by_sample, strict=True):
        best = means[means.mean(1).argmax()]
        values |= {f"map_area_k{k}": float(best.mean()), f"map_area_k{k}_std": float(best.std())}
        details += [
            {"k": k, "cost": cost, "map_area_by_sample": maps.tolist()}
            for cost, maps in zip(LOW_SHOT_COSTS, means, strict=True)
        ]
    return values, details


def stage_svms(subject: Subject[SvmConfig], dataset: VocDataset, stage: str) -> tuple[dict[str, float], dict]:
    """All SVMs on one stage's features: the values, and what else there is to say."""
    features, test = stage_features(subject, stage)
    split = (features, dataset.train_targets, test, dataset.val_targets)
    values, by_class = full_svm(subject.config, *split)
    details = {"classes": by_class}
    if subject.config.low_shot:
        few, details["low_shot"] = low_shot_svm(subject.config, *split)
        values |= few
    return values, details


def main(config: SvmConfig) -> dict:
    """Trains, judges and records; returns the result's line. Raises UserError."""
    if not config.costs or min(config.costs) <= 0 or config.low_shot_samples < 1:
        raise UserError(f"--costs {config.costs}, --low-shot-samples {config.low_shot_samples}: give positive numbers")
    dataset = open_voc(config)
    whole = Subset(None, "trainval", len(dataset.train))
    subject = open_subject(replace(config, shots=0), dataset=dataset).with_subset(whole)
    extract = StageFeatures(subject.encoder.module, chosen_stages(config, subject.encoder))
    map_shapes(extract, subject.encoder)
    settings = {"view": config.view, "costs": list(config.costs), "folds": FOLDS} | stage_settings(extract)
    if config.low_shot:
        settings |= {"low_shot_k": list(config.low_shot_k), "low_shot_samples": config.low_shot_samples}
    values: dict[str, float] = {}
    details: dict[str, list | dict] = {}
    for stage in extract.stages:
        found, of_stage = stage_svms(subject, dataset, stage)
        first = stage == extract.stages[0]
        values |= found if first else {f"{stage}_{name}": value for name, value in found.items()}
        details |= of_stage if first else {stage: of_stage}
    return record_result(subject, SVM, settings=settings, values=values, details=details)


if __name__ == "__main__":
    run_command(SvmConfig, main)
