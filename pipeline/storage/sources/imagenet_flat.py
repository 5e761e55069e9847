"""ImageNet as Kaggle gives it out, and any folder of the validation images without classes, as its tar unpacks.

    root[/ILSVRC]/Data/CLS-LOC/train/<synset>/n01440764_10026.JPEG        root may also be ILSVRC or CLS-LOC
    root[/ILSVRC]/Data/CLS-LOC/val/ILSVRC2012_val_00000001.JPEG           test/ has no labels and is left out
    root/val/ILSVRC2012_val_00000001.JPEG                                 val/ or root itself, train/ as usual

The classes of such images stand in the first of these that is found in their folder or above it:

    LOC_val_solution.csv                                       Kaggle's: "ILSVRC2012_val_00000001,n01751748 …"
    ILSVRC2012_devkit_t12.tar.gz, or the folder it unpacks to  the owners'
    imagenet_2012_validation_synset_labels.txt                 one synset a line, in the order of the images' numbers
    val.txt                                                    "ILSVRC2012_val_00000001.JPEG 65" (Caffe's; the number
                                                               counts the sorted folders of train/) or a synset there

The order is that of class folders, by class and then by name: so the .beton has the same bytes.
"""

import itertools
import os
import re
from collections import Counter
from pathlib import Path

import numpy as np

from pipeline import constants
from pipeline.errors import UserError
from pipeline.storage.sources import folders
from pipeline.storage.sources.imagenet_tars import DEVKIT, TRUTH, val_classes
from pipeline.storage.sources.source import Source, text_lines

_KAGGLE = (Path("ILSVRC/Data/CLS-LOC"), Path("Data/CLS-LOC"), Path("CLS-LOC"))
_SOLUTION = "LOC_val_solution.csv"
_SYNSETS = "imagenet_2012_validation_synset_labels.txt"
_LIST = "val.txt"
_LEVELS = 5  # the folder of the images and four above it: from CLS-LOC/val to Kaggle's root
_IMAGE = re.compile(r"ILSVRC2012_val_\d{8}\.\w+")
_SYNSET = re.compile(r"n\d{8}")


def find(root: Path, split: str) -> Path | None:
    """The folder of a split: all of Kaggle's, elsewhere only that of val without classes."""
    if split == "val" and (flat := next((folder for folder in (root / split, root) if _is_flat(folder)), None)):
        return flat
    if split == "unlabelled" or (root / "train").is_dir() or (root / "val").is_dir():
        return None
    return next((folder for base in _KAGGLE if (folder := root / base / split).is_dir()), None)


def read(root: Path, split: str, folder: Path) -> Source:
    """Lists a split's folder. Raises UserError for images whose class is not known, or that are no such images."""
    if not _is_flat(folder):
        return folders.read(folder.parent, split, folder)
    names, left_out = [], Counter[str]()
    for name in sorted(os.listdir(folder)):
        if _SYNSET.fullmatch(name) and (folder / name).is_dir():
            raise UserError(
                f"{folder} has images and the class folder {name}; finish moving the images into class folders, or "
                "unpack ILSVRC2012_img_val.tar again"
            )
        if _IMAGE.fullmatch(name) and name.lower().endswith(folders.SUFFIXES):
            names.append(name)
        else:
            left_out[os.path.splitext(name)[1] or name] += 1
    class_of = _classes_of(folder, names)
    names.sort(key=lambda name: (class_of[name], name))
    classes, labels = np.unique([class_of[name] for name in names], return_inverse=True)
    return Source(
        "imagenet flat val", split, classes.tolist(), names, labels.astype(np.int64), folder, left_out=left_out
    )


def _is_flat(folder: Path) -> bool:
    """Whether a folder holds ImageNet's validation images themselves. Its first names tell."""
    if not folder.is_dir():
        return False
    with os.scandir(folder) as entries:
        first = [entry.name for entry in itertools.islice(entries, 1000)]
    images = [name for name in first if name.lower().endswith(folders.SUFFIXES)]
    return bool(images) and all(map(_IMAGE.fullmatch, images))


def _classes_of(folder: Path, names: list[str]) -> dict[str, str]:
    """Image → synset. Raises UserError where nothing says it, or not of every image."""
    where, listed = _known_classes(folder)
    lacking = [name for name in names if Path(name).stem not in listed]
    if lacking:
        raise UserError(
            f"{where} does not say the class of {len(lacking)} of {len(names)} images in {folder} ({lacking[0]} first);"
            " it is incomplete or of other images, download both again"
        )
    return {name: listed[Path(name).stem] for name in names}


def _known_classes(folder: Path) -> tuple[Path, dict[str, str]]:
    """Which file says the classes, and what it says: stem of an image's name → synset. Raises UserError."""
    above = [Path(os.path.abspath(folder)), *Path(os.path.abspath(folder)).parents][:_LEVELS]
    for place in above:
        if (place / _SOLUTION).is_file():
            rows = [line.replace('"', "").split(",") for line in text_lines(place / _SOLUTION)]
            return place / _SOLUTION, _by_name(place / _SOLUTION, rows[1:])
    for place in above:
        for devkit in (place / DEVKIT, place / DEVKIT.removesuffix(".tar.gz") / "data", place / "data", place):
            if devkit.is_file() or (devkit / TRUTH).is_file():
                return devkit, _by_number(devkit, val_classes(devkit))
    for place in above[:2]:  # these two have names that other datasets may use as well
        if (place / _SYNSETS).is_file():
            return place / _SYNSETS, _by_number(place / _SYNSETS, text_lines(place / _SYNSETS))
        if (place / _LIST).is_file():
            rows = [line.split() for line in text_lines(place / _LIST)]
            return place / _LIST, _by_name(place / _LIST, rows, train=folder.parent / "train")
    raise UserError(
        f"{folder} holds ImageNet's validation images without class folders, and nothing that says their classes; put "
        f"{_SOLUTION} (Kaggle), {DEVKIT} or {_SYNSETS} beside it in {above[1]}, or convert --split train alone"
    )


def _by_number(path: Path, synsets: list[str]) -> dict[str, str]:
    """From the synsets in the order of the images' numbers, which count from 1."""
    wrong = [synset for synset in synsets if not _SYNSET.fullmatch(synset)]
    if len(synsets) != constants.IMAGENET_VAL_IMAGES or wrong:
        found = f"{wrong[0]!r}, which is no synset" if wrong else f"{len(synsets)} classes"
        raise UserError(
            f"{path} has {found}; a synset for each of {constants.IMAGENET_VAL_IMAGES} images is expected, download it "
            "again"
        )
    return {f"ILSVRC2012_val_{number:08d}": synset for number, synset in enumerate(synsets, 1)}


def _by_name(path: Path, rows: list[list[str]], train: Path | None = None) -> dict[str, str]:
    """From rows of an image's name and its class: a synset, or which of the sorted folders in `train`."""
    counted = sorted(entry.name for entry in os.scandir(train) if entry.is_dir()) if train and train.is_dir() else []
    found = {}
    for row in rows:
        word = row[1].split()[0] if len(row) > 1 and row[1].strip() else ""
        number = int(word) if word.isdecimal() and len(word) < 10 else len(counted)
        synset = counted[number] if number < len(counted) else word
        if not _SYNSET.fullmatch(synset):
            help_ = f" (train/ has {len(counted)} classes to count)" if word.isdecimal() and train else ""
            raise UserError(
                f"{path} has the line {' '.join(row)[:80]!r}, which names no class{help_}; download it again"
            )
        found[Path(row[0]).stem] = synset
    return found
