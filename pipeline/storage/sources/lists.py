"""Datasets whose classes stand in lists and not in folders, as their owners give them out.

    places205    root/trainvalsplit_places205/{train,val}_places205.csv     "a/abbey/gsun_1.jpg 0" a line
                 root/data/vision/torralba/deeplearning/images256/a/abbey/gsun_1.jpg
    inat18       root/{train,val}2018.json                                  images, annotations, categories
                 root/train_val2018/Plantae/7477/3b60c9.jpg

A list of another length than the published one is refused: part of a test set reads higher or lower than all of it.
"""

import json
import operator
import os
from pathlib import Path

import numpy as np

from pipeline import constants
from pipeline.errors import BAD_BYTES, UserError
from pipeline.storage.sources.source import Source, file_bytes, text_lines

_PLACES_IMAGES = Path("data/vision/torralba/deeplearning/images256")


def find(root: Path, split: str) -> Path | None:
    """The list of one of the two datasets."""
    for path in (root / "trainvalsplit_places205" / f"{split}_places205.csv", root / f"{split}2018.json"):
        if path.is_file():
            return path
    return None


def read(root: Path, split: str, path: Path) -> Source:
    """Raises UserError for a list that is not the published one, or images that are not where it says."""
    try:
        source = _inat18(root, split, path) if path.suffix == ".json" else _places205(root, split, path)
    except UserError:
        raise
    except BAD_BYTES as error:
        found = " ".join(repr(error).split())
        raise UserError(f"{path} cannot be read as the list of a dataset ({found}); download it again") from None
    require_published_size(source, source.kind, path)
    if not os.path.isfile(source.where / source.names[0]):
        raise UserError(f"{source.where / source.names[0]} is missing; unpack the images into {root}")
    return source


def require_published_size(source: Source, kind: str, path: Path) -> None:
    """Raises UserError where what was found in `path` has not as many images and classes as were published."""
    found, published = (len(source), len(source.classes)), constants.LISTED_SIZES[kind, source.split]
    if found != published:
        raise UserError(
            f"{path} lists {found[0]} images of {found[1]} classes, {kind}'s {source.split} split has {published[0]} "
            f"of {published[1]}; download it again"
        )


def _places205(root: Path, split: str, path: Path) -> Source:
    rows = [line.split() for line in text_lines(path)]
    names, labels = [row[0] for row in rows], [int(row[1]) for row in rows]
    by_label = {label: name.rsplit("/", 1)[0] for name, label in zip(names, labels, strict=True)}
    classes = [by_label[label] for label in range(len(by_label))]
    return Source("places205", split, classes, names, np.array(labels, np.int64), root / _PLACES_IMAGES)


def _inat18(root: Path, split: str, path: Path) -> Source:
    content = json.loads(file_bytes(path))
    names = {image["id"]: os.fspath(image["file_name"]) for image in content["images"]}  # fails if it is no text
    rows = [(names[entry["image_id"]], operator.index(entry["category_id"])) for entry in content["annotations"]]
    classes = [f"{entry['id']:04d}" for entry in sorted(content["categories"], key=lambda entry: entry["id"])]
    labels = np.array([label for _, label in rows], np.int64)
    return Source("inat18", split, classes, [name for name, _ in rows], labels, root)
