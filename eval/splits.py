"""Which images an evaluation learns from and is judged on: a dataset's two files, and a labelled share of the first.

`eval/splits/` holds SimCLR's lists of ImageNet's 1 % and 10 % (google-research/simclr, Apache 2.0). A list applies
where all of this is true: the fraction is 0.01 or 0.1; every class has at least one listed file in the dataset; and
of all files at least half that fraction is listed. So it applies to ImageNet and to subsets of its classes, of which it
picks the files that are there. A file is known by its name alone, whatever its suffix: n01440764_10026.JPEG, .png, and
n01440764_10026_n01440764.JPEG as Hugging Face has it. Everything else gets a seeded, class-balanced share; for what
looks like ImageNet a note says why. The split's name tells which.
"""

import functools
import hashlib
import re
import sys
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from pipeline.choices.subsets import balanced_subset, k_shot
from pipeline.constants import IMAGENET_CLASSES, IMAGENET_LIST_IMAGES, IMAGENET_LIST_SHA256
from pipeline.errors import UserError
from pipeline.storage.beton import Stored
from pipeline.storage.shards import SUFFIX as SHARDS
from pipeline.storage.shards import open_stored
from train.run_data import dataset_sha256

LISTS = Path(__file__).resolve().parent / "splits"
_IMAGENET_NAME = re.compile(r"(n\d{8}_\d+)(?:_n\d{8})?(?:\.\w+)?")


@dataclass(frozen=True)
class Dataset:
    """A folder with train.beton and val.beton, or these as shards. `val_labels` (M,) count classes as train does."""

    name: str
    train: Stored
    val: Stored
    val_labels: np.ndarray

    @property
    def classes(self) -> list[str]:
        return self.train.classes

    def sha256(self) -> dict[str, str]:
        """The digests of both files, as results and kept features name a dataset."""
        return {"train": dataset_sha256(self.train), "val": dataset_sha256(self.val)}


@dataclass(frozen=True)
class Subset:
    """A labelled share of the training images: sorted ids (n,), or None for all; and how they were chosen."""

    ids: np.ndarray | None
    name: str
    images: int


def dataset_files(data: Path) -> tuple[Path, Path]:
    """The training and the validation file of a folder, or of its train.beton or train.shards.json."""
    for suffix in (".beton", SHARDS):
        if data.name.endswith(suffix):
            return data, data.with_name(f"val{suffix}")
    return data / "train.beton", data / "val.beton"


def open_dataset(data: Path) -> Dataset:
    """Opens the files that `data` names. Raises UserError where one of them, a class or the labels are missing.

    Classes are matched by name, so a validation set may lack some of them; it may not have others. Every class needs
    a training image.
    """
    path, held_out = dataset_files(data)
    train = open_stored(path)
    _require_labels(train)
    if not held_out.is_file():
        raise UserError(
            f"{held_out} is missing, whose images evaluations are judged on; pipeline/convert.py makes it, with"
            " --holdout 0.1 of a tenth of the training images if the dataset has no other"
        )
    val = open_stored(held_out)
    _require_labels(val)
    unknown = sorted(set(val.classes) - set(train.classes))
    if unknown:
        raise UserError(
            f"{val.path} has {len(unknown)} of {len(val.classes)} classes that {train.path.name} lacks "
            f"({', '.join(unknown[:3])}{', …' if len(unknown) > 3 else ''}); convert both from the same class folders"
        )
    missing = np.flatnonzero(np.bincount(train.labels, minlength=len(train.classes)) == 0)
    if len(missing):
        raise UserError(
            f"{train.path} has no image of {len(missing)} of its {len(train.classes)} classes "
            f"({train.classes[missing[0]]} first); add images of it or remove its folder, and convert again"
        )
    index = {name: i for i, name in enumerate(train.classes)}
    val_labels = np.array([index[name] for name in val.classes], np.int64)[val.labels]
    return Dataset(path.parent.resolve().name, train, val, val_labels)


def _require_labels(beton: Stored) -> None:
    if not beton.labelled:
        raise UserError(
            f"{beton.path} has images without labels, and an evaluation needs them; name a labelled dataset with"
            " --data, or convert these images again, sorted into one folder a class"
        )


@functools.cache
def imagenet_list(percent: int) -> frozenset[str]:
    """The file names of SimCLR's 1 % or 10 % of ImageNet. Raises UserError where the file was changed."""
    path = LISTS / f"imagenet_{percent}percent.txt"
    content = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(content).hexdigest() != IMAGENET_LIST_SHA256[percent]:
        raise UserError(f"{path} is not the published list (its sha256 differs); restore it with git checkout")
    return frozenset(content.decode("ascii").split())


def _listed_ids(train: Stored, percent: int) -> np.ndarray | None:
    """Ids of the listed files, None where the list does not apply, which is said of what looks like ImageNet."""
    listed = imagenet_list(percent)
    found = [_IMAGENET_NAME.fullmatch(PurePosixPath(name).name) for name in train.file_names()]
    ids = np.array([i for i, match in enumerate(found) if match and f"{match[1]}.JPEG" in listed], np.int64)
    lacking = np.setdiff1d(np.arange(len(train.classes)), train.labels[ids])
    few = len(ids) < percent / 200 * len(train)
    if not len(lacking) and not few:
        return ids
    by_class = all(re.fullmatch(r"n\d{8}", name) for name in train.classes) or len(train.classes) == IMAGENET_CLASSES
    if by_class or all(found):
        why = f"{len(ids)} of {len(train)} files are on it" if few else f"none of {train.classes[lacking[0]]} is on it"
        print(
            f"note: SimCLR's list of ImageNet's {percent} % does not apply ({why}, by names such as"
            " n01440764_10026.JPEG); a seeded, class-balanced share is used instead",
            file=sys.stderr,
        )
    return None


def labelled_subset(train: Stored, fraction: float, seed: int) -> Subset:
    """The training images whose labels may be used. Raises UserError for a fraction outside (0, 1]."""
    if not 0 < fraction <= 1:
        raise UserError(f"--fraction {fraction:g} is outside (0, 1]; give a share such as 0.01, 0.1 or 1.0")
    if fraction == 1:
        return Subset(None, "all", len(train))
    percent = {0.01: 1, 0.1: 10}.get(fraction)
    if percent is None or (ids := _listed_ids(train, percent)) is None:
        ids = balanced_subset(seed, train.labels, fraction)
        return Subset(ids, f"balanced-{fraction:g}-seed{seed}", len(ids))
    total = IMAGENET_LIST_IMAGES[percent]
    partly = "" if len(ids) == total else f" ({len(ids)} of {total} files)"
    return Subset(ids, f"imagenet-{percent}percent{partly}", len(ids))


def shot_subset(train: Stored, shots: int, seed: int) -> Subset:
    """`shots` labelled images of each class. Raises UserError where a class has fewer."""
    ids = k_shot(seed, train.labels, shots)
    return Subset(ids, f"{shots}-shot-seed{seed}", len(ids))
