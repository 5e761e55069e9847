"""Tiny ImageNet as downloaded; its test images have no labels and are left out.

    root[/tiny-imagenet-200]/wnids.txt                                 the 200 classes
    root[/tiny-imagenet-200]/train/<wnid>/images/<wnid>_0.JPEG
    root[/tiny-imagenet-200]/val/images/val_0.JPEG                     val/val_annotations.txt has "val_0.JPEG <wnid> …"

Val's order is that of class folders: by class, then by name.
"""

import os
from pathlib import Path

import numpy as np

from pipeline.errors import UserError
from pipeline.storage.sources import folders
from pipeline.storage.sources.lists import require_published_size
from pipeline.storage.sources.source import Source, text_lines

_KIND = "tiny imagenet"


def find(root: Path, split: str) -> Path | None:
    """A split's folder. Val that was sorted into class folders is no matter of this file."""
    for folder in (root / "tiny-imagenet-200", root):
        inside = folder / split / "images" if split == "val" else folder / split
        if (folder / "wnids.txt").is_file() and split != "unlabelled" and inside.is_dir():
            return folder / split
    return None


def read(root: Path, split: str, folder: Path) -> Source:
    """Raises UserError for more or fewer images than the published, or a list that does not fit them."""
    source = folders.class_folders(folder, split) if split == "train" else _val(folder)
    require_published_size(source, _KIND, folder)
    wnids = sorted(word for line in text_lines(folder.parent / "wnids.txt") for word in line.split())
    if source.classes != wnids:
        raise UserError(f"the classes in {folder} are not those of {folder.parent / 'wnids.txt'}; unpack both again")
    return source


def _val(folder: Path) -> Source:
    listed = folder / "val_annotations.txt"
    if not listed.is_file():
        raise UserError(f"{listed}, which has the classes of the images, is missing; unpack Tiny ImageNet again")
    try:
        rows = sorted((line.split()[1], f"images/{line.split()[0]}") for line in text_lines(listed))
    except IndexError:
        raise UserError(f"{listed} has lines without an image and its class; unpack Tiny ImageNet again") from None
    names = [name for _, name in rows]
    there = {f"images/{name}" for name in os.listdir(folder / "images")}
    if there != set(names):
        wrong = sorted(there ^ set(names))
        raise UserError(
            f"{listed} and the images beside it differ in {len(wrong)} names ({wrong[0]} first); unpack Tiny ImageNet"
            " again"
        )
    classes, labels = np.unique([wnid for wnid, _ in rows], return_inverse=True)
    return Source(_KIND, "val", classes.tolist(), names, labels.astype(np.int64), folder)
