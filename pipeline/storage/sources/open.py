"""Finds what kind of dataset lies in a folder, and lists one split of it. To add a kind: a file here, a line in KINDS.

A kind is a module with two functions. `find(root, split)` says where in a folder this split of it lies ("train" or
"val"), by the names in it alone; None if there is none. `read(root, split, found)` lists the split as a Source:
classes, names, labels, and where the images are. It opens no image that the converter will read, and raises UserError
for a split that is not complete.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from pipeline.errors import UserError
from pipeline.storage.beton import require_same_classes
from pipeline.storage.sources import cifar10, folders, imagenet_tars, lists, voc2007, webdataset
from pipeline.storage.sources.source import SPLITS, Source


class Kind(Protocol):
    """What each module of KINDS offers."""

    def find(self, root: Path, split: str, /) -> Path | None: ...
    def read(self, root: Path, split: str, found: Path, /) -> Source: ...


# The first that has a split reads it.
KINDS: tuple[Kind, ...] = (
    cifar10,  # root/cifar-10-batches-py/ (pickles) or root/data_batch_*.png …         ids in file order
    voc2007,  # root[/VOCdevkit]/VOC2007; train is trainval, val is test                ids in list order, one class
    lists,  # Places205 and iNaturalist 2018 as downloaded                              ids in list order
    webdataset,  # root/*train*.tar or root/{train,val}/*.tar, read in place            ids by tar, then as in it
    folders,  # root/{train,val}/<class>/**/<image>                                     ids by class, then by name
    imagenet_tars,  # root/ILSVRC2012_img_{train,val}.tar, read in place                ids of the unpacked folder
)


def split_names(root: Path) -> list[str]:
    """The splits found under a folder; an empty list if the folder is itself one split. Raises UserError."""
    if root.is_file() and webdataset.shards(root, ""):
        return []
    if not root.is_dir():
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
    if not splits and webdataset.shards(root, ""):
        return webdataset.read(root, split, root)
    if not splits:
        return folders.class_folders(root, split)
    if split not in splits:
        asked = f"has no split {split!r}" if split else "holds splits, and --out names one file"
        raise UserError(f"{root} {asked}, found {' and '.join(splits)}; choose one with --split")
    return next(kind.read(root, split, found) for kind in KINDS if (found := kind.find(root, split)))


def open_splits(root: Path, splits: Sequence[str]) -> list[Source]:
    """Lists several splits, which must have the same classes. Raises UserError if they have not."""
    opened = [open_source(root, split) for split in splits]
    for other in opened[1:]:
        require_same_classes(str(opened[0].where), opened[0].classes, str(other.where), other.classes)
    return opened
