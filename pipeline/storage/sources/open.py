"""Finds what kind of dataset lies in a folder, and lists one split of it. To add a kind: a file here, a line in KINDS.

A kind is a module with two functions. `find(root, split)` says where in a folder this split of it lies (one of
SPLITS), by the names in it alone; None if there is none. `read(root, split, found)` lists the split as a Source:
classes, names, labels, and where the images are. It opens no image that the converter will read, and raises UserError
for a split that is not complete.
"""

import contextlib
from collections import Counter
from collections.abc import Sequence
from itertools import islice
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
    webdataset,
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
    webdataset,  # root/*train*.tar or root/{train,val}/*.tar, read in place            ids by tar, then as in it
    imagenet_flat,  # Kaggle's ImageNet; val/ILSVRC2012_val_*.JPEG beside its labels    ids of class folders
    folders,  # root/{train,val}/<class>/**/<image>, or without classes                 ids by class, then by name
    imagenet_tars,  # root/ILSVRC2012_img_{train,val}.tar, read in place                ids of the unpacked folder
)

PUBLISHED = (cifar, stl10, tiny_imagenet, voc2007, lists)  # of which a folder can hold several
EXPECTED = "--source expects a folder of images, such as one folder a class"
NEAR_FOLDERS = 300  # of each level below --source, that are looked into for a dataset where it is none


def split_names(root: Path) -> list[str]:
    """The splits found under a folder; an empty list if the folder is itself one split. Raises UserError."""
    if not root.exists():
        raise UserError(f"{root} is missing; {EXPECTED}")
    several = [kind for kind in PUBLISHED if any(kind.find(root, split) for split in SPLITS)]
    if len(several) > 1:
        names = ", ".join(kind.__name__.rpartition(".")[2] for kind in several)
        raise UserError(f"{root} holds several datasets ({names}); give --source the folder of one of them")
    found = [split for split in SPLITS if any(kind.find(root, split) for kind in KINDS)]
    if not (found or root.is_dir() or webdataset.shards(root, "")):
        raise UserError(f"{root} is not a folder; {EXPECTED}")
    return found


def open_source(root: str | Path, split: str = "") -> Source:
    """Lists one split of a dataset. `split` may be empty if `root` is itself one split, a folder of images.

    Raises UserError for a missing or empty folder, a class without images, an incomplete tar file or list, CIFAR-10
    with other pixels or labels than the published ones, names that cannot be kept or that two images have.
    """
    root = Path(root)
    splits = split_names(root)
    if root.is_file() and splits:
        split = split or splits[0]  # there is one
    if not splits and webdataset.shards(root, ""):
        source = webdataset.read(root, split, root)
    elif not splits:
        source = _one_split(root, split)
    elif split not in splits:
        asked = f"has no split {split!r}" if split else "holds splits, and --out names one file"
        raise UserError(f"{root} {asked}, found {' and '.join(splits)}; choose one with --split")
    else:
        source = next(kind.read(root, split, found) for kind in KINDS if (found := kind.find(root, split)))
    check_names(source)
    return source


def _one_split(root: Path, split: str) -> Source:
    """A folder of images. Raises UserError if it is none, and says which folder near it is a dataset."""
    try:
        source = folders.class_folders(root, split)
    except UserError as error:
        raise UserError(f"{error}{_known_near(root, root.resolve().parents[:2])}") from None
    # One folder with a whole dataset inside is no class.
    if len(source.classes) == 1 and source.labelled and (known := _known_near(root)):
        raise UserError(f"{root} has one folder, {source.classes[0]}, and no classes{known}")
    return source


def _known_near(root: Path, above: Sequence[Path] = ()) -> str:
    """Which file or folder in `root`, or near it, is a dataset, as the end of a sentence; or ""."""
    if files := sorted(path for path in root.glob("*") if path.suffix in (".beton", ".ffcv")):
        return f"; {files[0].name} looks like FFCV's, give --source {files[0]}"
    below = [folder for level in ("*/", "*/*/") for folder in sorted(islice(root.glob(level), NEAR_FOLDERS))]
    for folder in (*below, *above):
        for kind in KINDS:
            with contextlib.suppress(OSError, UserError):  # a folder that may not be looked into is not recommended
                if splits := [split for split in SPLITS if kind.find(folder, split)]:
                    name = getattr(kind, "__name__", "").rpartition(".")[2].replace("_", " ")
                    return f"; {folder} looks like a dataset ({name}: {' and '.join(splits)}), give --source {folder}"
    return ""


def check_names(source: Source) -> None:
    """Raises UserError for names that x.files.tsv cannot hold, and for labels that are no class.

    One name an image, of characters that can be written, without what parts columns and lines.
    """
    try:
        "".join((*source.names, *source.classes)).encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        found = error.object[max(error.start - 20, 0) : error.end + 20]
        raise UserError(f"{source.where} has {found!r} in a name, which cannot be written; rename it") from None
    if ((source.labels < 0) | (source.labels >= len(source.classes))).any():
        raise UserError(
            f"{source.where} has labels from {source.labels.min()} to {source.labels.max()} for {len(source.classes)}"
            " classes; download it again, or write it again"
        )
    for name in source.names:
        if "\t" in name or "\n" in name:
            raise UserError(f"{str(source.where / name)!r} has a tab or a line break in its name; rename it")
    if len(set(source.names)) < len(source):
        name, times = Counter(source.names).most_common(1)[0]
        raise UserError(f"{source.where} has {times} images of the name {name}; every image needs a name of its own")
