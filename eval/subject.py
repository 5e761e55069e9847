"""What every evaluation begins and ends with: the encoder and dataset its flags name, and the line it leaves.

A result is one JSON line in `<run folder>/results.jsonl`, and on stdout with two decimals where values are
percentages; eval/README.md lists what it holds. A sentence and a table on stderr say it to a person.
"""

import json
import sys
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Generic, Literal, TypeVar

import torch

from eval.features import Encoder, FeatureSet, open_encoder
from eval.folder import made_result_folder
from eval.protocols import Protocol, with_all_settings
from eval.result_fields import wrong_fields
from eval.splits import Dataset, Subset, labelled_subset, open_dataset, shot_subset
from eval.spoken import rounded, spoken
from pipeline.command import DATA, RUNS
from pipeline.disk import append_line, followed_once, read_lines
from pipeline.errors import UserError
from pipeline.loader import Loader, make_loader
from pipeline.progress import say_line
from pipeline.spec import ViewSpec

RESULTS = "results.jsonl"


@dataclass(frozen=True)
class EncoderConfig:
    """Which network is evaluated."""

    checkpoint: Path = RUNS / "latest"
    """A run folder, or a file: checkpoint.pt, backbone.safetensors, Barlow Twins' published resnet50.pth or
    checkpoint.pth, any state dict of a torchvision ResNet (self-supervised or supervised), or of --arch."""
    arch: str = ""
    """Which network somebody else's file holds: a name of torchvision or timm, such as vit_b_16,
    torchvision:convnext_tiny or timm:vit_small_patch16_224. Empty: a ResNet, or what timm's config.json beside it
    says."""
    key: str = ""
    """Which network of a file that holds several: its place in it, such as state_dict.module.encoder_q, or whole
    names out of that, such as encoder_q. Empty: the one that the rule in train/foreign.py chooses."""
    out: Path | None = None
    """Folder for the result and what is kept beside it. None: the run folder; of somebody else's X.pth the folder
    X.pth.results beside it."""


@dataclass(frozen=True)
class SubjectConfig(EncoderConfig):
    """The flags that all evaluations of features share."""

    data: Path | None = None
    """A folder with train.beton and val.beton, or train.shards.json with --loader dali. None: the data the encoder was
    trained on, else data/imagenet."""
    fraction: float = 1.0
    """Share of the training labels to use: 0.01, 0.1 or 1.0 (eval/splits.py says which images)."""
    shots: int = 0
    """Labelled images of each class, chosen by the seed, in place of --fraction; 0: --fraction decides."""
    features: Literal["encoder", "random", "pixels"] = "encoder"
    """What to evaluate: the encoder, or, as controls, its architecture with random weights (of --seed) and the raw
    pixels of its centre views (at most 32 px)."""
    resolution: int | None = None
    """Side of the views, px. None: what the encoder was trained at, 224 where its file does not tell. Published
    protocols have 224: at another side the result's name ends in "-modified"."""
    feature_type: Literal["float32", "float16"] = "float32"
    """Type in which a frozen encoder's features are kept; float16 halves the disk they take, and is a modified
    protocol."""
    loader: Literal["fast", "ffcv", "torch", "dali"] = "fast"
    """Which data path: our threads, FFCV's Loader, the PIL/torchvision reference, or NVIDIA DALI as decoder."""
    workers: int = 0
    """Threads (fast, ffcv, dali) or processes (torch) of the loader; 0: one a core that this process may use."""
    seed: int = 0
    """Decides the classifier's initial weights, the order of images, their views, and the balanced subset."""


Config = TypeVar("Config", bound=SubjectConfig)  # the flags of one kind of evaluation


@dataclass(frozen=True)
class Subject(Generic[Config]):
    """One evaluation's encoder, dataset, labelled share of it, and the run folder that gets the result."""

    config: Config
    encoder: Encoder
    dataset: Dataset
    subset: Subset
    run: Path
    started: float

    @property
    def classes(self) -> int:
        return len(self.dataset.classes)

    def with_subset(self, subset: Subset) -> "Subject[Config]":
        """The same evaluation on other training images."""
        return replace(self, subset=subset)

    def with_seed(self, seed: int) -> "Subject[Config]":
        """The same encoder and dataset with another seed, which may choose other training images."""
        config = replace(self.config, seed=seed)
        return replace(self, config=config, subset=chosen_subset(config, self.dataset))

    def train_labels(self) -> torch.Tensor:
        """Labels of the labelled share, (n,) int64, on the encoder's device."""
        labels = self.dataset.train.labels
        return torch.from_numpy(labels if self.subset.ids is None else labels[self.subset.ids]).to(self.encoder.device)

    def val_labels(self) -> torch.Tensor:
        """Labels of the validation images, (M,) int64, counted as train counts classes, on the encoder's device."""
        return torch.from_numpy(self.dataset.val_labels).to(self.encoder.device)

    def feature_set(self, split: Literal["train", "val"]) -> FeatureSet:
        """Features of the labelled share, or of the validation images, as they are kept in the run folder."""
        beton, ids = (self.dataset.train, self.subset.ids) if split == "train" else (self.dataset.val, None)
        config, dtype = self.config, getattr(torch, self.config.feature_type)
        return FeatureSet(self.encoder, beton, self.run / "features", ids, config.loader, config.workers, dtype)

    def train_features(self) -> torch.Tensor:
        """(n, D) float32, on the encoder's device."""
        return self.feature_set("train").read().to(self.encoder.device).float()

    def val_features(self) -> torch.Tensor:
        """(M, D) float32, on the encoder's device."""
        return self.feature_set("val").read().to(self.encoder.device).float()

    def augmented_loader(self, batch: int, view: ViewSpec) -> Loader:
        """Shuffled full batches of random views of the labelled share."""
        centre = self.feature_set("train").loading
        seed = self.config.seed
        return make_loader(replace(centre, views=(view,), shuffle=True, seed=seed, global_batch=batch))

    def val_loader(self) -> Loader:
        """The validation images' centre views, once each a pass, in order."""
        return make_loader(self.feature_set("val").loading)


def open_subject(config: Config, *, dataset: Dataset | None = None) -> Subject[Config]:
    """Everything the flags name, opened and checked, and the folder that gets the result. Raises UserError.

    `dataset` replaces the one that the flags name. A link such as runs/latest is followed once, here: it may name
    another run before this evaluation ends.
    """
    started = time.monotonic()
    config = replace(config, checkpoint=followed_once(config.checkpoint))
    encoder = encoder_of(config)
    data = config.data.expanduser() if config.data else Path(encoder.info.data or DATA / "imagenet")
    dataset = dataset or open_dataset(data)
    subset = chosen_subset(config, dataset)
    run = made_result_folder(config.checkpoint, config.out)  # last, so that what is refused leaves none
    return Subject(config, encoder, dataset, subset, run, started)


def encoder_of(config: SubjectConfig) -> Encoder:
    """The encoder, or the control, that the flags name. Raises UserError."""
    if config.resolution is not None:
        require_positive("resolution", config.resolution)
    return open_encoder(
        config.checkpoint,
        pixels=config.features == "pixels",
        random_seed=config.seed if config.features == "random" else None,
        resolution_px=config.resolution,
        key=config.key,
        arch=config.arch,
    )


def chosen_subset(config: SubjectConfig, dataset: Dataset) -> Subset:
    """The labelled share that the flags name. Raises UserError."""
    if config.shots:
        return shot_subset(dataset.train, config.shots, config.seed)
    return labelled_subset(dataset.train, config.fraction, config.seed)


def require_positive(flag: str, value: int) -> None:
    """Raises UserError for a flag below 1."""
    if value < 1:
        raise UserError(f"--{flag} {value} was given, at least 1 is expected")


def images_per_step(subject: Subject, settings: dict, least: int = 1) -> int:
    """The batch, or all images where there are fewer. Raises UserError for settings that cannot train.

    `least` is 2 where a batch norm trains, which needs two images.
    """
    for flag in ("epochs", "batch"):
        require_positive(flag, settings[flag])
    batch = min(settings["batch"], subject.subset.images)
    if batch < least:
        raise UserError(
            f"--batch {settings['batch']} leaves {batch} image a step, at least {least} are needed for batch norm"
        )
    return batch


def record_result(
    subject: Subject, protocol: Protocol, *, settings: dict, values: dict, details: dict | None = None
) -> dict:
    """Prints a result and appends it to the run folder's results.jsonl; returns it. Raises UserError as `write_result`.

    `settings` are those that were used, by the names of the protocol's; `values` are plain numbers by name. `details`
    is what else there is to say, such as every point of a sweep.
    """
    info, dataset, config = subject.encoder.info, subject.dataset, subject.config
    about = {
        **encoder_facts(subject.encoder, config.checkpoint),
        "dataset": dataset.name,
        "data": str(dataset.train.path),
        "dataset_sha256": dataset.sha256(),
        "fraction": None if config.shots else config.fraction,
        "split": subject.subset.name,
        "train_images": subject.subset.images,
        "val_images": len(dataset.val),
        "classes": subject.classes,
        "seed": config.seed,
    }
    return write_result(
        subject.run,
        protocol,
        settings=settings | {"resolution_px": info.resolution_px, "feature_type": config.feature_type},
        values=values,
        details=details or {},
        about=about,
        loader=config.loader,
        feature_type=config.feature_type,
        seconds=round(time.monotonic() - subject.started, 2),
    )


def encoder_facts(encoder: Encoder, checkpoint: Path) -> dict:
    """What a result's line says of the encoder, and of where it ran."""
    info = encoder.info
    return {
        "encoder": encoder.kind,
        **{name: getattr(info, name) for name in ("arch", "step", "epochs", "resolution_px")},
        "checkpoint": str(checkpoint),
        "checkpoint_sha256": info.sha256,
        "key": info.key,
        "normalization": [list(info.normalization.mean), list(info.normalization.std)],
        "device": torch.cuda.get_device_name() if encoder.device != "cpu" else "cpu",
    }


def write_result(
    run: Path, protocol: Protocol, *, settings: dict, values: dict, details: dict, about: dict, **ending
) -> dict:
    """Appends a result, with the time before it, to the run folder's results.jsonl, and prints it; returns it.

    `about` says what was measured on what; `ending` is what the line ends with. Where the folder does not take it,
    which raises UserError, the line itself is printed, with all digits.
    """
    name, changed = protocol.compared(settings)
    result = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "protocol": name,
        "metric": protocol.metric,
        "value": values[protocol.metric],
        "values": values,
        "details": details,
        **about,
        "settings": settings,
        "changed": changed,
        **ending,
    }
    line = json.dumps(result, allow_nan=False)
    advice = "the result printed above was not kept: make room there and run again, or keep the printed line"
    try:
        append_line(run / RESULTS, line, advice=advice)
    except UserError:
        print(line, flush=True)
        raise
    short = rounded(values)
    print(json.dumps(result | {"value": short[protocol.metric], "values": short}), flush=True)
    say_line(spoken(result, run / RESULTS))
    return result


def read_results(run: Path) -> list[dict]:
    """The results of a run folder, oldest first. Raises UserError where there are none.

    A line that is no result, or lacks what this program reads, is named and passed over.
    """
    path = run / RESULTS
    if not path.is_file():
        raise UserError(f"{path} is missing; measure this run first, for example with `python eval/knn.py`")
    results = []
    for line in read_lines(path):
        if wrong := wrong_fields(line):
            what = repr(line["protocol"])[:60] if "protocol" in line else "without a protocol"
            lacks = f"lacks {', '.join(wrong)}, or has another kind of value there"
            print(f"note: {path}: a line ({what}) {lacks}, and is left out", file=sys.stderr)
        else:
            results.append(with_all_settings(line))
    return results
