"""PASCAL VOC 2007 as unpacked: train is its trainval list, val its test list.

An image shows several classes and a .beton has one label an image: here all have one, and the evaluation reads the
annotations.
"""

import os
from pathlib import Path

import numpy as np

from pipeline.errors import UserError
from pipeline.storage.sources.source import Source, text_lines

_MAIN = Path("ImageSets/Main")
_LISTS = {"train": "trainval", "val": "test"}


def voc_root(folder: Path) -> Path | None:
    """VOC2007 itself, if it is `folder` or lies in it, in VOCdevkit or not."""
    for root in (folder, folder / "VOC2007", folder / "VOCdevkit" / "VOC2007"):
        if (root / _MAIN).is_dir():
            return root
    return None


def find(root: Path, split: str) -> Path | None:
    """The split's list."""
    voc = voc_root(root)
    listed = voc / _MAIN / f"{_LISTS[split]}.txt" if voc and split in _LISTS else None
    return listed if listed and listed.is_file() else None


def read(root: Path, split: str, listed: Path) -> Source:
    """Lists the images of a split. Raises UserError if some of them are missing."""
    voc = listed.parents[2]
    names = [f"JPEGImages/{line.split()[0]}.jpg" for line in text_lines(listed)]
    missing = [name for name in names if not os.path.isfile(voc / name)]
    if missing or not names:
        raise UserError(
            f"{listed} lists {len(names)} images, {len(missing)} of them are missing"
            f"{f' ({missing[0]} first)' if missing else ''}; unpack VOC2007's {_LISTS[split]} archive again"
        )
    return Source("voc 2007", split, ["image"], names, np.zeros(len(names), np.int64), voc)
