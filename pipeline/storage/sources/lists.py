"""Datasets whose classes stand in lists and not in folders, as their owners give them out.

    places205    root/trainvalsplit_places205/{train,val}_places205.csv     "a/abbey/gsun_1.jpg 0" a line
                 root/data/vision/torralba/deeplearning/images256/a/abbey/gsun_1.jpg
    inat18       root/{train,val}2018.json                                  images, annotations, categories
                 root/train_val2018/Plantae/7477/3b60c9.jpg

A list of another length than the published one is refused: part of a test set reads higher or lower than all of it.
"""

import json
from pathlib import Path
from typing import NamedTuple

from pipeline import constants
from pipeline.errors import UserError

_PLACES_IMAGES = Path("data/vision/torralba/deeplearning/images256")


class Listing(NamedTuple):
    """One split: class names, one name and label an image, and the folder that the names are relative to."""

    kind: str
    classes: list[str]
    names: list[str]
    labels: list[int]
    folder: Path


def list_path(root: Path, split: str) -> Path | None:
    """The list of a split ("train" or "val"), None where the folder holds neither dataset's."""
    for path in (root / "trainvalsplit_places205" / f"{split}_places205.csv", root / f"{split}2018.json"):
        if path.is_file():
            return path
    return None


def read_list(root: Path, split: str) -> Listing:
    """Raises UserError for a list that is not the published one, or images that are not where it says."""
    path = list_path(root, split)
    try:
        listing = _inat18(root, path) if path.suffix == ".json" else _places205(root, path)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(f"{path} cannot be read as the list of a dataset ({error!r}); download it again") from None
    found, published = (len(listing.names), len(listing.classes)), constants.LISTED_SIZES[listing.kind, split]
    if found != published:
        raise UserError(
            f"{path} lists {found[0]} images of {found[1]} classes, {listing.kind}'s {split} split has {published[0]} "
            f"of {published[1]}; download it again"
        )
    if not (listing.folder / listing.names[0]).is_file():
        raise UserError(f"{listing.folder / listing.names[0]} is missing; unpack the images into {root}")
    return listing


def _places205(root: Path, path: Path) -> Listing:
    rows = [line.split() for line in path.read_text().splitlines() if line.strip()]
    names, labels = [row[0] for row in rows], [int(row[1]) for row in rows]
    by_label = {label: name.rsplit("/", 1)[0] for name, label in zip(names, labels, strict=True)}
    classes = [by_label[label] for label in range(len(by_label))]
    return Listing("places205", classes, names, labels, root / _PLACES_IMAGES)


def _inat18(root: Path, path: Path) -> Listing:
    content = json.loads(path.read_text())
    names = {image["id"]: image["file_name"] for image in content["images"]}
    rows = [(names[entry["image_id"]], entry["category_id"]) for entry in content["annotations"]]
    classes = [f"{entry['id']:04d}" for entry in sorted(content["categories"], key=lambda entry: entry["id"])]
    return Listing("inat18", classes, [name for name, _ in rows], [label for _, label in rows], root)
