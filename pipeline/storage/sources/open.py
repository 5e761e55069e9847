"""Finds what kind of dataset lies in a folder, and lists one split of it. To add a kind: a file here, a line in KINDS.

A kind is a module with two functions. `find(root, split)` says where in a folder this split of it lies ("train" or
"val"), by the names in it alone; None if there is none. `read(root, split, found)` lists the split as a Source:
classes, names, labels, and where the images are. It opens no image that the converter will read, and raises UserError
for a split that is not complete.
"""

from pathlib import Path
from typing import Protocol

from pipeline.errors import UserError
from pipeline.storage.sources import (
    cifar,
    folders,
    imagenet_flat,
    imagenet_tars,
    lists,
    parquet,
    stl10,
    tiny_imagenet,
    voc2007,
)
from pipeline.storage.sources.source import SPLITS, Source


class Kind(Protocol):
    """What each module of KINDS offers."""

    def find(self, root: Path, split: str, /) -> Path | None: ...
    def read(self, root: Path, split: str, found: Path, /) -> Source: ...


# The first that has a split reads it.
KINDS: tuple[Kind, ...] = (
    cifar,  # CIFAR-10 and CIFAR-100: the owners' pickles or bytes, npm's sheets        ids in file order
    stl10,  # root[/stl10_binary]/{train,test,unlabeled}_X.bin                          ids in file order
    tiny_imagenet,  # root[/tiny-imagenet-200]/{wnids.txt,train,val}                    ids by class, then by name
    voc2007,  # root[/VOCdevkit]/VOC2007; train is trainval, val is test                ids in list order, one class
    lists,  # Places205 and iNaturalist 2018 as downloaded                              ids in list order
    parquet,  # Hugging Face's root[/data]/{train,validation}-*.parquet                 ids in file order
    imagenet_flat,  # Kaggle's ImageNet; val/ILSVRC2012_val_*.JPEG beside its labels    ids of class folders
    folders,  # root/{train,val}/<class>/**/<image>                                     ids by class, then by name
    imagenet_tars,  # root/ILSVRC2012_img_{train,val}.tar, read in place                ids of the unpacked folder
)

PUBLISHED = (cifar, stl10, tiny_imagenet, voc2007, lists)  # of which a folder can hold several


def split_names(root: Path) -> list[str]:
    """The splits found under a folder; an empty list if the folder is itself one split. Raises UserError."""
    several = [kind for kind in PUBLISHED if any(kind.find(root, split) for split in SPLITS)]
    if len(several) > 1:
        names = ", ".join(kind.__name__.rpartition(".")[2] for kind in several)
        raise UserError(f"{root} holds several datasets ({names}); give --source the folder of one of them")
    if not root.is_dir() and not (root.is_file() and any(parquet.find(root, split) for split in SPLITS)):
        found = "is not a folder" if root.exists() else "is missing"
        raise UserError(f"{root} {found}; --source expects a folder of images, one folder a class")
    return [split for split in SPLITS if any(kind.find(root, split) for kind in KINDS)]


def open_source(root: str | Path, split: str = "") -> Source:
    """Lists one split of a dataset. `split` may be empty if `root` is itself one split, a folder of classes.

    Raises UserError for a missing or empty folder, a class without images, an incomplete tar file or list, CIFAR-10
    with other pixels or labels than the published ones.
    """
    root = Path(root)
    splits = split_names(root)
    if root.is_file():
        split = split or splits[0]  # there is one
    if not splits:
        return folders.class_folders(root, split)
    if split not in splits:
        asked = f"has no split {split!r}" if split else "holds splits, and --out names one file"
        raise UserError(f"{root} {asked}, found {' and '.join(splits)}; choose one with --split")
    return next(kind.read(root, split, found) for kind in KINDS if (found := kind.find(root, split)))
