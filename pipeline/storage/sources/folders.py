"""Images in folders: which files are images, which folders are classes or splits, and what of a dataset is left out.

    root/<class>/**/<image>
    root/train/<class>/…  root/val/<class>/…      validation/ or valid/ is val, if there is train/ and no val/

An image is a file whose name ends in one of SUFFIXES. Left out, and counted by suffix or name: other files, images
that lie beside the class folders, folders beside the splits, hidden files (a dot comes first), and the folders that
systems put everywhere (NOT_DATA, and hidden ones): of such a folder only its name is seen. Nothing is opened, and no
file is asked for its size: listing ImageNet takes seconds.
"""

import os
import re
from collections import Counter
from pathlib import Path

import numpy as np

from pipeline.errors import UserError
from pipeline.storage.sources.imagenet_tars import tar_name
from pipeline.storage.sources.source import SPLITS, Source

SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".dib", ".ppm", ".pgm", ".pbm", ".pnm"),
    *(".tif", ".tiff", ".gif", ".avif", ".jp2", ".j2k", ".j2c", ".jpx", ".jpf"),
)
NOT_DATA = ("@eaDir", "@Recycle", "#recycle", "#snapshot", "$RECYCLE.BIN", "System Volume Information", "__MACOSX")
_SPLIT_FOLDERS = {"train": ("train",), "val": ("val", "validation", "valid"), "unlabelled": ("unlabelled", "unlabeled")}
_LIKE_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}
_SUFFIX = re.compile(r"\.[a-z0-9]*[a-z][a-z0-9]*")  # "img.0001" has none


def find(root: Path, split: str) -> Path | None:
    """The folder of a split, None if there is none."""
    others_count = (root / "train").is_dir()  # alone, valid/ could be a class
    names = _SPLIT_FOLDERS[split] if others_count else _SPLIT_FOLDERS[split][:1]
    return next((root / name for name in names if (root / name).is_dir()), None)


def read(root: Path, split: str, folder: Path) -> Source:
    """Lists a split's folder, and counts what lies beside the splits."""
    source = class_folders(folder, split)
    used = {tar_name(s) for s in SPLITS} | {found.name for s in SPLITS if (found := find(root, s))}
    source.left_out.update(f"{_kind(entry)} beside the splits" for entry in _entries(root) if entry.name not in used)
    return source


def class_folders(root: Path, split: str) -> Source:
    """Lists a folder of classes. Raises UserError for one without class folders, or a class without images."""
    classes, loose = [], 0
    left_out: Counter[str] = Counter()
    for entry in _entries(root):
        if _is_data_folder(entry):
            classes.append(entry.name)
        else:
            loose += not entry.is_dir() and _is_image(entry.name)
            left_out[f"{_kind(entry)} beside the class folders"] += 1
    if not classes:
        found = f"{loose} images but no class folders" if loose else "no class folders"
        raise UserError(f"{root} has {found}; one folder a class with its images inside is expected")
    try:
        by_class = [sorted(_images_under(str(root / name), f"{name}/", left_out)) for name in classes]
    except OSError as error:  # a folder of somebody else's; a link that leads back to a folder above it
        raise UserError(f"{error.filename} cannot be listed ({error.strerror}); repair or remove it") from None
    for name, members in zip(classes, by_class, strict=True):
        if not members:
            raise UserError(
                f"{root / name} has no images ({' '.join(SUFFIXES)}); add images to this class or remove its folder"
            )
    deep = all(name.count("/") > 1 for members in by_class for name in members)
    if deep and {name.lower() for name in classes} <= _LIKE_SPLITS:
        raise UserError(
            f"{root} has the folders {' and '.join(classes)}, which look like splits and not like classes; "
            "rename them to train and val, or give one of them to --source"
        )
    names = [name for members in by_class for name in members]
    for name in names:
        if "\t" in name or "\n" in name:  # these part the columns and lines of x.files.tsv
            raise UserError(f"{str(root / name)!r} has a tab or a line break in its name; rename it")
    labels = np.repeat(np.arange(len(classes)), [len(members) for members in by_class])
    return Source("folder", split, classes, names, labels, root, left_out=left_out)


def _entries(folder: str | Path) -> list[os.DirEntry]:
    return sorted(os.scandir(folder), key=lambda entry: entry.name)


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and name[0] != "."


def _is_data_folder(entry: os.DirEntry) -> bool:
    return entry.is_dir() and entry.name[0] != "." and entry.name not in NOT_DATA


def _kind(entry: os.DirEntry) -> str:
    """What something left out is counted as."""
    if entry.is_dir():
        return f"{entry.name}/"
    if entry.name[0] == ".":
        return "hidden"
    suffix = os.path.splitext(entry.name)[1].lower()
    return suffix if _SUFFIX.fullmatch(suffix) else "without suffix"


def _images_under(folder: str, prefix: str, left_out: Counter[str]) -> list[str]:
    names = []
    for entry in _entries(folder):
        if _is_data_folder(entry):
            names += _images_under(entry.path, f"{prefix}{entry.name}/", left_out)
        elif _is_image(entry.name) and not entry.is_dir():
            names.append(prefix + entry.name)
        else:
            left_out[_kind(entry)] += 1
    return names
