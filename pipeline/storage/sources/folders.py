"""Images in folders: which files are images, which folders are classes or splits, and what of a dataset is left out.

    root/<class>/**/<image>
    root/<image>                                   no folder with images: they have no labels
    root/train/…  root/val/…  root/unlabelled/…    as one of these; validation/ or valid/ is val, if there is no val/

A folder with such a name is a split if it holds folders, or if all folders beside it have such names; otherwise train/
is a class among others. If train/ is a split, so are val/ and unlabelled/. All below unlabelled/ has no labels.

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
from pipeline.storage.sources.source import SPLITS, UNLABELLED, Source

SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".dib", ".ppm", ".pgm", ".pbm", ".pnm"),
    *(".tif", ".tiff", ".gif", ".avif", ".jp2", ".j2k", ".j2c", ".jpx", ".jpf"),
)
NOT_DATA = ("@eaDir", "@Recycle", "#recycle", "#snapshot", "$RECYCLE.BIN", "System Volume Information", "__MACOSX")
_SPLIT_FOLDERS = {"train": ("train",), "val": ("val", "validation", "valid"), "unlabelled": ("unlabelled", "unlabeled")}
_LIKE_SPLITS = {
    *("train", "training", "val", "valid", "validation", "test", "testing", "unlabelled", "unlabeled"),
    *("ilsvrc2012_img_train", "ilsvrc2012_img_val", "ilsvrc2012_img_test"),  # ImageNet's tars, unpacked
}
_SUFFIX = re.compile(r"\.[a-z0-9]*[a-z][a-z0-9]*")  # "img.0001" has none


def find(root: Path, split: str) -> Path | None:
    """The folder of a split, None if there is none."""
    # Alone, valid/ could be a class.
    beside_train = split != "train" and find(root, "train") is not None
    for name in _SPLIT_FOLDERS[split] if beside_train else _SPLIT_FOLDERS[split][:1]:
        folder = root / name
        if folder.is_dir() and (beside_train or _only_like_splits(_data_folders(root)) or _data_folders(folder)):
            return folder
    return None


def read(root: Path, split: str, folder: Path) -> Source:
    """Lists a split's folder, and counts what lies beside the splits."""
    source = unlabelled_images(folder, split) if split == "unlabelled" else class_folders(folder, split)
    used = {tar_name(s) for s in SPLITS} | {found.name for s in SPLITS if (found := find(root, s))}
    source.left_out.update(f"{_kind(entry)} beside the splits" for entry in _entries(root) if entry.name not in used)
    return source


def split_of(root: Path) -> str:
    """Which split a folder without splits is: "val" if it is called so, otherwise "train"."""
    return "val" if root.resolve().name.lower() in _SPLIT_FOLDERS["val"] else "train"


def class_folders(root: Path, split: str) -> Source:
    """Lists a folder of classes, or the images of one that has images and no class.

    Raises UserError if there are neither, for a class without images, and if most images lie beside the classes.
    """
    loose, left_out, by_class = 0, Counter[str](), {}
    for entry in _entries(root):
        if _is_data_folder(entry):
            by_class[entry.name] = [f"{entry.name}/{name}" for name in _images_under(entry.path, left_out)]
        else:
            loose += not entry.is_dir() and _is_image(entry.name)
            left_out[f"{_kind(entry)} beside the class folders"] += 1
    classes, names = list(by_class), [name for members in by_class.values() for name in members]
    if loose and not names:
        return unlabelled_images(root, split)
    if not classes:
        raise UserError(
            f"{root} has no class folders and no images ({' '.join(SUFFIXES)}); a folder of images, or one folder a"
            " class with its images inside, is expected"
        )
    for name, members in by_class.items():
        if not members:
            raise UserError(
                f"{root / name} has no images ({' '.join(SUFFIXES)}); add images to this class or remove its folder"
            )
    if loose > len(names):
        raise UserError(
            f"{root} has {loose} images beside its class folders and {len(names)} in them; move them into class"
            " folders or out of the way, or pass --unlabelled to take all images without labels"
        )
    if any(name.count("/") > 1 for name in names) and _only_like_splits(classes):
        raise UserError(
            f"{root} has the folders {' and '.join(classes)}, which look like splits and not like classes; "
            "rename them to train and val, or give one of them to --source"
        )
    labels = np.repeat(np.arange(len(classes)), [len(members) for members in by_class.values()])
    return Source("folder", split, classes, names, labels, root, left_out=left_out)


def unlabelled_images(root: Path, split: str) -> Source:
    """Lists every image below a folder, without labels. Raises UserError if there is none."""
    left_out = Counter[str]()
    names = _images_under(str(root), left_out)
    if not names:
        raise UserError(f"{root} and the folders below it have no images ({' '.join(SUFFIXES)}); give --source others")
    labels = np.zeros(len(names), np.int64)
    return Source("images", split, list(UNLABELLED), names, labels, root, labelled=False, left_out=left_out)


def _entries(folder: str | Path) -> list[os.DirEntry]:
    """Sorted by name. Raises UserError for a folder of somebody else's, and a link that leads back to above it."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        for entry in entries:
            entry.is_dir()  # follows links, which may fail; the answer is kept
    except OSError as error:
        raise UserError(f"{error.filename} cannot be listed ({error.strerror}); repair or remove it") from None
    return entries


def _data_folders(folder: Path) -> list[str]:
    return [entry.name for entry in _entries(folder) if _is_data_folder(entry)]


def _only_like_splits(names: list[str]) -> bool:
    return {name.lower() for name in names} <= _LIKE_SPLITS


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


def _images_under(root: str, left_out: Counter[str]) -> list[str]:
    """The names of all images below a folder, relative to it and sorted, however deep it is."""
    names, folders = [], [(root, "")]
    while folders:
        folder, prefix = folders.pop()
        for entry in _entries(folder):
            if _is_data_folder(entry):
                folders.append((entry.path, f"{prefix}{entry.name}/"))
            elif _is_image(entry.name) and not entry.is_dir():
                names.append(prefix + entry.name)
            else:
                left_out[_kind(entry)] += 1
    return sorted(names)
