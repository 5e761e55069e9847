"""What every evaluation begins and ends with: the encoder and dataset its flags name, and the line it leaves.

A result is one JSON line in `<run folder>/results.jsonl`, and on stdout. Every line carries its protocol's name;
with any of the protocol's settings changed the name ends in "-modified" and `changed` says which.
"""

import json
import os
import sys
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import torch

from eval.features import Encoder, centre_loader_config, features_of, open_encoder
from eval.splits import Dataset, Subset, labelled_subset, open_dataset, shot_subset
from pipeline.command import DATA, RUNS, UserError
from pipeline.loader import Loader, make_loader
from pipeline.spec import SUPERVISED_VIEW, LoaderConfig
from train.run_data import dataset_sha256

RESULTS = "results.jsonl"


@dataclass(frozen=True)
class SubjectConfig:
    """The flags that all evaluations share."""

    checkpoint: Path = RUNS / "latest"
    """A run folder, or a file: checkpoint.pt, backbone.safetensors, Barlow Twins' published resnet50.pth or
    checkpoint.pth, or any state dict of a torchvision ResNet (self-supervised or supervised)."""
    data: Path | None = None
    """A folder with train.beton and val.beton. None: the data the encoder was trained on, else data/imagenet."""
    shots: int = 0
    """Labelled images of each class, chosen by the seed, in place of --fraction; 0: --fraction decides."""
    features: Literal["encoder", "random", "pixels"] = "encoder"
    """What to evaluate: the encoder, or, as controls, its architecture with random weights (of --seed) and the raw
    pixels of its centre views (at most 32 px)."""
    resolution: int | None = None
    """Side of the views, px. None: what the encoder was trained at, 224 where its file does not tell."""
    out: Path | None = None
    """Folder for the result and the kept features. None: the run folder, or the one that --checkpoint lies in."""
    feature_type: Literal["float32", "float16"] = "float32"
    """Type in which a frozen encoder's features are kept; float16 halves the disk they take."""
    loader: Literal["ffcv", "torch", "dali"] = "ffcv"
    """Which data path: the fast one, the PIL/torchvision reference, or NVIDIA DALI as decoder."""
    workers: int = 0
    """Threads (ffcv, dali) or processes (torch) of the loader; 0: one a core that this process may use."""
    seed: int = 0
    """Decides the classifier's initial weights, the order of images, their views, and the balanced subset."""


@dataclass(frozen=True)
class Subject:
    """One evaluation's encoder, dataset, labelled share of it, and the run folder that gets the result."""

    config: SubjectConfig
    encoder: Encoder
    dataset: Dataset
    subset: Subset
    run: Path
    started: float

    @property
    def classes(self) -> int:
        return len(self.dataset.classes)

    def with_subset(self, subset: Subset) -> "Subject":
        """The same evaluation on other training images."""
        return replace(self, subset=subset)

    def train_labels(self) -> torch.Tensor:
        """Labels of the labelled share, (n,) int64, on the encoder's device."""
        labels = self.dataset.train.labels
        return torch.from_numpy(labels if self.subset.ids is None else labels[self.subset.ids]).to(self.encoder.device)

    def val_labels(self) -> torch.Tensor:
        """Labels of the validation images, (M,) int64, counted as train counts classes, on the encoder's device."""
        return torch.from_numpy(self.dataset.val_labels).to(self.encoder.device)

    def train_features(self) -> torch.Tensor:
        """(n, D) float32, on the encoder's device."""
        return self._features(self.dataset.train, self.subset.ids)

    def val_features(self) -> torch.Tensor:
        """(M, D) float32, on the encoder's device."""
        return self._features(self.dataset.val, None)

    def augmented_loader(self, batch: int) -> Loader:
        """Shuffled full batches of random crops and flips of the labelled share."""
        config, info = self.config, self.encoder.info
        return make_loader(
            LoaderConfig(
                data=self.dataset.train.path,
                views=(SUPERVISED_VIEW,),
                resolution_px=info.resolution_px,
                global_batch=batch,
                seed=config.seed,
                ids=self.subset.ids,
                normalization=info.normalization,
                backend=config.loader,
                workers=config.workers,
                device=self.encoder.device,
            )
        )

    def val_loader(self) -> Loader:
        """The validation images' centre views, once each a pass, in order."""
        c = self.config
        return make_loader(centre_loader_config(self.encoder, self.dataset.val.path, None, c.loader, c.workers))

    def _features(self, beton, ids) -> torch.Tensor:
        c, dtype = self.config, getattr(torch, self.config.feature_type)
        features = features_of(self.encoder, beton, self.run / "features", ids, c.loader, c.workers, dtype)
        return features.to(self.encoder.device).float()


def open_subject(config: SubjectConfig, fraction: float) -> Subject:
    """Everything the flags name, opened and checked. Raises UserError."""
    started = time.monotonic()
    encoder, run = open_encoder_and_run(config)
    dataset = open_dataset(config.data.expanduser() if config.data else Path(encoder.info.data or DATA / "imagenet"))
    if config.shots:
        subset = shot_subset(dataset.train, config.shots, config.seed)
    else:
        subset = labelled_subset(dataset.train, fraction, config.seed)
    return Subject(config, encoder, dataset, subset, run, started)


def open_encoder_and_run(config: SubjectConfig) -> tuple[Encoder, Path]:
    """What the flags say is evaluated, and the folder that gets the result."""
    if config.resolution is not None:
        require_positive("resolution", config.resolution)
    checkpoint = config.checkpoint.expanduser()
    random_seed = config.seed if config.features == "random" else None
    encoder = open_encoder(checkpoint, config.features == "pixels", random_seed, config.resolution)
    checkpoint = checkpoint.resolve()
    run = config.out.expanduser() if config.out else checkpoint if checkpoint.is_dir() else checkpoint.parent
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {run} cannot be made ({error.strerror}); name a folder that can be written") from None
    return encoder, run


def require_positive(flag: str, value: int) -> None:
    if value < 1:
        raise UserError(f"--{flag} {value} was given, at least 1 is expected")


def images_per_step(subject: Subject, settings: dict) -> int:
    """The batch, or all images where there are fewer. Raises UserError for settings that cannot train."""
    for flag in ("epochs", "batch"):
        require_positive(flag, settings[flag])
    return min(settings["batch"], subject.subset.images)


def protocol_name(name: str, published: dict, settings: dict) -> tuple[str, dict]:
    """The protocol's name, marked where a setting differs from the published one, and those that do."""
    changed = {key: settings[key] for key in published if settings[key] != published[key]}
    return name + ("-modified" if changed else ""), changed


def record_result(
    subject: Subject,
    protocol: str,
    published: dict,
    settings: dict,
    metric: str,
    values: dict,
    fraction: float,
    details: dict | None = None,
) -> dict:
    """Prints the result and appends it to the run folder's results.jsonl in one write; returns it.

    `metric` names the one of `values` (plain numbers) that is the headline; `details` is what else there is to
    say, such as every point of a sweep. Raises UserError where the folder cannot be written.
    """
    protocol, changed = protocol_name(protocol, published, settings)
    dataset = subject.dataset
    result = {
        "protocol": protocol,
        "metric": metric,
        "value": values[metric],
        "values": values,
        "details": details or {},
        **encoder_facts(subject.encoder, subject.config.checkpoint),
        "dataset": dataset.name,
        "dataset_sha256": {"train": dataset_sha256(dataset.train), "val": dataset_sha256(dataset.val)},
        "fraction": None if subject.config.shots else fraction,
        "split": subject.subset.name,
        "train_images": subject.subset.images,
        "val_images": len(dataset.val),
        "classes": subject.classes,
        "seed": subject.config.seed,
        "settings": settings,
        "changed": changed,
        "loader": subject.config.loader,
        "feature_type": subject.config.feature_type,
        "seconds": round(time.monotonic() - subject.started, 2),
    }
    return write_result(subject.run, result)


def encoder_facts(encoder: Encoder, checkpoint: Path) -> dict:
    """What a result's line says of the encoder, and of where it ran."""
    info = encoder.info
    return {
        "encoder": encoder.kind,
        "arch": info.arch,
        "step": info.step,
        "epochs": info.epochs,
        "resolution_px": info.resolution_px,
        "checkpoint": str(checkpoint),
        "checkpoint_sha256": info.sha256,
        "device": torch.cuda.get_device_name() if encoder.device != "cpu" else "cpu",
    }


def write_result(run: Path, result: dict) -> dict:
    """Prints a result, with the time before it, and appends it to the run folder's results.jsonl; returns it."""
    result = {"time": datetime.now(UTC).isoformat(timespec="seconds"), **result}
    line = json.dumps(result, allow_nan=False)
    print(line, flush=True)
    append_line(run / RESULTS, line)
    return result


def append_line(path: Path, line: str) -> None:
    """Appends one line in one write, so that evaluations running at once do not mix theirs."""
    try:
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, line.encode() + b"\n")
        finally:
            os.close(file)
    except OSError as error:
        raise UserError(
            f"the result printed above could not be added to {path} ({error.strerror}); "
            "make the run folder writable and run again, or keep the printed line"
        ) from error


def read_results(run: Path) -> list[dict]:
    """The results of a run folder, oldest first. Raises UserError where there are none."""
    path = run / RESULTS
    if not path.is_file():
        raise UserError(f"{path} is missing; measure this run first, for example with `python eval/knn.py`")
    results = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            results.append(json.loads(line))
        except ValueError:
            print(f"{path}, line {number} is no result and was left out: {line[:60]!r}", file=sys.stderr)
    return results
