"""Datasets as they lie on disk, before conversion: which images, of which class, in which order.

    folder         root/<class>/**/<image>, or root/{train,val}/<class>/…             ids by class, then by name
                   (pipeline/storage/sources/folders.py says what is an image, a class, a split, and what is left out)
    imagenet tar   root/ILSVRC2012_img_{train,val}.tar, read in place                 the ids of the unpacked folder
    cifar-10       root/cifar-10-batches-py/ (pickles) or root/data_batch_*.png …     ids in file order
    voc 2007       root[/VOCdevkit]/VOC2007; train is trainval, val is test           ids in list order, one class
    places205, inat18       as downloaded, with their lists (pipeline/storage/sources/lists.py)       ids in list order

`open_source` lists one split and reads no image of the first two; CIFAR-10 it reads whole, since only the
published pixels and labels are accepted, whatever way they came.
"""

import hashlib
import io
import json
import os
import pickle
import tarfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline import constants
from pipeline.errors import UserError
from pipeline.storage.sources.folders import beside_splits, class_folders, split_folder
from pipeline.storage.sources.lists import list_path, read_list

Place = tuple[str, int, int]  # of an image: file, offset, size in bytes or -1 for all of the file

# By which a change of an image is noticed: size in bytes, and when its file was last written, ns; a tar's images have
# the time of the tar, pixels without a file part of their digest.
Stamp = tuple[int, int]

SPLITS = ("train", "val")

_CIFAR_PICKLES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "val": ["test_batch"]}
_CIFAR_LABELS = {"train": "train_lables.json", "val": "test_lables.json"}  # so spelt in the npm package
_VOC_LISTS = {"train": "trainval", "val": "test"}
_DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"


@dataclass(frozen=True)
class Source:
    """N images of one split.

    names    one a sample, relative to the split, "/" between the parts
    labels   (N,) int64, index into classes
    where    the folder that names are relative to, or the tar file
    extents  (N, 2) int64, offset and size in the tar file; None for a folder
    pixels   (N, H, W, 3) uint8 where the source holds raw pixels; None otherwise
    left_out what lies in its folders and is no image of it: suffix or name → how many
    """

    kind: str
    split: str
    classes: list[str]
    names: list[str]
    labels: np.ndarray
    where: Path
    extents: np.ndarray | None = None
    pixels: np.ndarray | None = None
    left_out: Counter = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.names)


def image_places(source: Source, start: int, stop: int) -> list[Place]:
    """Where images start … stop - 1 are."""
    if source.extents is None:
        return [(os.path.join(source.where, name), 0, -1) for name in source.names[start:stop]]
    return [(str(source.where), int(offset), int(size)) for offset, size in source.extents[start:stop]]


def read_image(place: Place) -> tuple[bytes, Stamp]:
    """The bytes of one image file, and its stamp: that of before it was read, so a later change shows in it."""
    path, offset, size = place
    with open(path, "rb") as file:
        about = os.fstat(file.fileno())
        file.seek(offset)
        return file.read(size), (about.st_size if size < 0 else size, about.st_mtime_ns)


def pixel_stamp(pixels: np.ndarray) -> Stamp:
    """The stamp of pixels without a file."""
    digest = hashlib.sha256(pixels.tobytes()).digest()
    return pixels.nbytes, int.from_bytes(digest[:8], "little", signed=True)


def read_stamps(source: Source, count: int) -> np.ndarray:
    """The stamps of the first `count` images as they are now, (count, 2) int64; -1 where there is no file.

    One question to the disk a file, from several threads: about ten seconds for ImageNet's 1.3 million on a local disk.
    """
    stamps = np.empty((count, 2), np.int64)
    if source.pixels is not None:
        for row, pixels in zip(stamps, source.pixels, strict=False):
            row[:] = pixel_stamp(pixels)
    elif source.extents is not None:
        stamps[:, 0], stamps[:, 1] = source.extents[:count, 1], source.where.stat().st_mtime_ns
    else:
        with ThreadPoolExecutor(8) as pool:
            jobs = (range(first, min(first + 1000, count)) for first in range(0, count, 1000))
            for part, found in pool.map(lambda part: (part, _file_stamps(source, part)), jobs):
                stamps[part.start : part.stop] = found
    return stamps


def _file_stamps(source: Source, part: range) -> list[Stamp]:
    found = []
    for path, _, _ in image_places(source, part.start, part.stop):
        try:
            about = os.stat(path)
            found.append((about.st_size, about.st_mtime_ns))
        except FileNotFoundError:
            found.append((-1, -1))
    return found


def split_names(root: Path) -> list[str]:
    """The splits found under a folder; an empty list where the folder is itself one split. Raises UserError."""
    if not root.is_dir():
        found = "is not a folder" if root.exists() else "is missing"
        raise UserError(f"{root} {found}; --source expects a folder of images, one folder a class")
    if _cifar_folder(root):
        return list(SPLITS)
    if voc := voc_root(root):
        return [s for s in SPLITS if (voc / "ImageSets" / "Main" / f"{_VOC_LISTS[s]}.txt").is_file()]
    if listed := [s for s in SPLITS if list_path(root, s)]:
        return listed
    return [s for s in SPLITS if split_folder(root, s) or (root / f"ILSVRC2012_img_{s}.tar").is_file()]


def open_source(root: str | Path, split: str = "") -> Source:
    """Lists one split of a dataset. `split` may be empty where `root` is itself one split, a folder of classes.

    Raises UserError for a missing or empty folder, a class without images, an incomplete tar file, CIFAR-10
    with other pixels or labels than the published ones.
    """
    root = Path(root)
    found = split_names(root)
    if found and split not in found:
        asked = f"no split {split!r}" if split else "more than one possible split"
        raise UserError(f"{root} has {asked}, found {' and '.join(found)}; choose one with --split")
    if not found:
        return _image_folder(root, split)
    if _cifar_folder(root):
        return _cifar10(root, split)
    if voc := voc_root(root):
        return _voc2007(voc, split)
    if list_path(root, split):
        kind, classes, names, labels, folder = read_list(root, split)
        return Source(kind, split, classes, names, np.array(labels, np.int64), folder)
    if split_folder(root, split):
        return _split_of_folders(root, split)
    return _imagenet_tar(root / f"ILSVRC2012_img_{split}.tar", split)


# ---- one folder a class ----


def _image_folder(root: Path, split: str) -> Source:
    classes, by_class, left_out = class_folders(root)
    names = [name for members in by_class for name in members]
    _check_names(root, names)
    labels = np.repeat(np.arange(len(classes)), [len(members) for members in by_class])
    return Source("folder", split, classes, names, labels, root, left_out=left_out)


def _split_of_folders(root: Path, split: str) -> Source:
    used = {f"ILSVRC2012_img_{s}.tar" for s in SPLITS}
    used |= {folder.name for s in SPLITS if (folder := split_folder(root, s))}
    source = _image_folder(split_folder(root, split), split)
    return replace(source, left_out=source.left_out + beside_splits(root, used))


def _check_names(root: Path, names: list[str]) -> None:
    for name in names:
        if "\t" in name or "\n" in name:
            raise UserError(f"{str(root / name)!r} has a tab or a line break in its name; rename it")


# ---- ImageNet's own tar files ----


def _tar_members(path: Path, start: int, end: int) -> list[tarfile.TarInfo]:
    """The files of the tar that lies in bytes start … end of `path`; their offsets count from 0 of `path`."""
    members = []
    try:
        with open(path, "rb") as file:
            file.seek(start)
            with tarfile.TarFile(fileobj=file) as tar:
                for member in tar:
                    if member.offset_data + member.size > end:
                        raise tarfile.ReadError("a member reaches past the end")
                    members.append(member)
    except tarfile.ReadError as error:
        raise UserError(f"{path} is not a tar file, or not all of it ({error}); download it again") from None
    return [member for member in members if member.isfile()]


def _class_tars(path: Path) -> dict[str, list[tuple[str, int, int]]]:
    """Of the train tar, a tar with one tar a class: class → (name, offset, size) in the outer file."""
    images = {}
    for outer in _tar_members(path, 0, path.stat().st_size):
        inner = _tar_members(path, outer.offset_data, outer.offset_data + outer.size)
        images[outer.name.removesuffix(".tar")] = [(m.name, m.offset_data, m.size) for m in inner]
    return images


def _val_classes(devkit: Path) -> list[str]:
    """The class of each validation image, in the order of their numbers, from the devkit's two files."""
    from scipy.io import loadmat  # only here: half a second

    with tarfile.open(devkit, "r:gz") as tar:
        files = {Path(member.name).name: member for member in tar if member.isfile()}
        synsets = loadmat(io.BytesIO(tar.extractfile(files["meta.mat"]).read()), squeeze_me=True)["synsets"]
        truth = tar.extractfile(files["ILSVRC2012_validation_ground_truth.txt"]).read().decode()
    by_id = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
    return [by_id[int(line)] for line in truth.split()]


def _flat_val_tar(path: Path) -> dict[str, list[tuple[str, int, int]]]:
    """Of the val tar, images without classes: class → (name, offset, size); the classes are the devkit's."""
    devkit = path.parent / _DEVKIT
    if not devkit.is_file():
        raise UserError(f"{path.name} does not say the class of its images; put {_DEVKIT} beside it in {path.parent}")
    classes, images = _val_classes(devkit), {}
    for member in _tar_members(path, 0, path.stat().st_size):
        number = int(Path(member.name).stem.rsplit("_", 1)[1])  # ILSVRC2012_val_00000001.JPEG
        images.setdefault(classes[number - 1], []).append((member.name, member.offset_data, member.size))
    return images


def _imagenet_tar(path: Path, split: str) -> Source:
    images = _class_tars(path) if split == "train" else _flat_val_tar(path)
    expected = constants.IMAGENET_TRAIN_IMAGES if split == "train" else constants.IMAGENET_VAL_IMAGES
    count = sum(map(len, images.values()))
    if count != expected or len(images) != constants.IMAGENET_CLASSES:
        raise UserError(
            f"{path} has {count} images of {len(images)} classes, ImageNet's {split} split has {expected} of"
            f" {constants.IMAGENET_CLASSES}; the file is incomplete, download it again"
        )
    classes = sorted(images)
    rows = [(f"{c}/{name}", label, at, size) for label, c in enumerate(classes) for name, at, size in sorted(images[c])]
    names, labels, offsets, sizes = zip(*rows, strict=True)
    extents = np.stack([offsets, sizes], 1).astype(np.int64)
    return Source("imagenet tar", split, classes, list(names), np.array(labels), path, extents)


# ---- PASCAL VOC 2007 ----


def voc_root(folder: Path) -> Path | None:
    """VOC2007 itself, where it is `folder` or lies in it, in VOCdevkit or not."""
    for root in (folder, folder / "VOC2007", folder / "VOCdevkit" / "VOC2007"):
        if (root / "ImageSets" / "Main").is_dir():
            return root
    return None


def _voc2007(root: Path, split: str) -> Source:
    """An image shows several classes, a .beton has one label an image: here all have one (eval/voc.py has them)."""
    listed = root / "ImageSets" / "Main" / f"{_VOC_LISTS[split]}.txt"
    names = [f"JPEGImages/{line.split()[0]}.jpg" for line in listed.read_text().splitlines() if line.strip()]
    missing = [name for name in names if not (root / name).is_file()]
    if missing or not names:
        raise UserError(
            f"{listed} lists {len(names)} images, {len(missing)} of them are missing"
            f"{f' ({missing[0]} first)' if missing else ''}; unpack VOC2007's {_VOC_LISTS[split]} archive again"
        )
    return Source("voc 2007", split, ["image"], names, np.zeros(len(names), np.int64), root)


# ---- CIFAR-10 ----


def _cifar_folder(root: Path) -> Path | None:
    for folder in (root / "cifar-10-batches-py", root):
        if (folder / "data_batch_1").is_file():
            return folder
    return root if (root / "data_batch_1.png").is_file() else None


class _ArrayUnpickler(pickle.Unpickler):
    """Loads the arrays, lists and strings of CIFAR-10's batches, and nothing that could run code."""

    ALLOWED = ("_reconstruct", "ndarray", "dtype")

    def find_class(self, module: str, name: str):
        if module.split(".")[0] == "numpy" and name in self.ALLOWED:
            return {"_reconstruct": np._core.multiarray._reconstruct, "ndarray": np.ndarray, "dtype": np.dtype}[name]
        if (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not expected in it")


def _cifar_pickles(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    pixels, labels = [], []
    for name in _CIFAR_PICKLES[split]:
        with open(folder / name, "rb") as file:
            batch = _ArrayUnpickler(file, encoding="bytes").load()
        pixels.append(batch[b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        labels += batch[b"labels"]
    return np.ascontiguousarray(np.concatenate(pixels)), np.array(labels)


def _cifar_sheets(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """One image a row of the sheet: 1024 × 10,000 px are (10000, 32, 32, 3)."""
    sheets = []
    for name in _CIFAR_PICKLES[split]:
        with Image.open(folder / f"{name}.png") as sheet:
            sheets.append(np.asarray(sheet.convert("RGB")).reshape(-1, 32, 32, 3))
    return np.concatenate(sheets), np.array(json.loads((folder / _CIFAR_LABELS[split]).read_text()))


def _cifar10(root: Path, split: str) -> Source:
    folder = _cifar_folder(root)
    read = _cifar_pickles if (folder / "data_batch_1").is_file() else _cifar_sheets
    try:
        pixels, labels = read(folder, split)
    except (OSError, ValueError, TypeError, AttributeError, LookupError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"CIFAR-10 in {folder} cannot be read ({error}); fetch it again") from None
    wanted = {
        "train": (constants.CIFAR10_TRAIN_SHA256, constants.CIFAR10_TRAIN_LABELS_SHA256),
        "val": (constants.CIFAR10_TEST_SHA256, constants.CIFAR10_TEST_LABELS_SHA256),
    }[split]
    for what, array, sha256 in zip(("pixels", "labels"), (pixels, labels.astype(np.uint8)), wanted, strict=True):
        if hashlib.sha256(array.tobytes()).hexdigest() != sha256:
            raise UserError(
                f"the {what} of CIFAR-10's {split} split in {folder} are not the published ones; fetch it again"
            )
    names = [f"{split}/{i:05d}" for i in range(len(labels))]
    return Source("cifar-10", split, list(constants.CIFAR10_CLASSES), names, labels, folder, pixels=pixels)
