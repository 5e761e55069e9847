"""ImageNet's own tar files, read in place: the ids, names and classes are those of the unpacked folder.

root/ILSVRC2012_img_train.tar    a tar with one tar a class
root/ILSVRC2012_img_val.tar      images without classes; ILSVRC2012_devkit_t12.tar.gz beside it knows them
"""

import io
import tarfile
import zlib
from pathlib import Path

import numpy as np

from pipeline import constants
from pipeline.errors import UserError
from pipeline.storage.sources.source import Source

DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
TRUTH = "ILSVRC2012_validation_ground_truth.txt"

_ByClass = dict[str, list[tuple[str, int, int]]]  # class → (name, offset, size) of each image in the outer file


def tar_name(split: str) -> str:
    """The file's name as ImageNet's owners give it."""
    return f"ILSVRC2012_img_{split}.tar"


def find(root: Path, split: str) -> Path | None:
    """The split's tar file."""
    path = root / tar_name(split)
    return path if path.is_file() else None


def read(root: Path, split: str, path: Path) -> Source:
    """Lists a tar file. Raises UserError for one that is not whole, and for the val tar without the devkit."""
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
    extents = np.stack([np.zeros(count), offsets, sizes], 1).astype(np.int64)
    return Source("imagenet tar", split, classes, list(names), np.array(labels), path, files=[path], extents=extents)


def tar_members(path: Path, start: int, end: int) -> list[tarfile.TarInfo]:
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
                file.seek(tar.offset)  # where tarfile found no more: it also stops, silently, at what is no header
                if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError("the empty block at its end is missing")
    except tarfile.ReadError as error:
        raise UserError(f"{path} is not a tar file, or not all of it ({error}); download it again") from None
    return [member for member in members if member.isfile()]


def _class_tars(path: Path) -> _ByClass:
    """The images of the train tar."""
    images: _ByClass = {}
    for outer in tar_members(path, 0, path.stat().st_size):
        inner = tar_members(path, outer.offset_data, outer.offset_data + outer.size)
        images[outer.name.removesuffix(".tar")] = [(m.name, m.offset_data, m.size) for m in inner]
    return images


def _flat_val_tar(path: Path) -> _ByClass:
    """The images of the val tar."""
    devkit = path.parent / DEVKIT
    if not devkit.is_file():
        raise UserError(f"{path.name} does not say the class of its images; put {DEVKIT} beside it in {path.parent}")
    classes = val_classes(devkit)
    images: _ByClass = {}
    for member in tar_members(path, 0, path.stat().st_size):
        number = int(Path(member.name).stem.rsplit("_", 1)[1])  # ILSVRC2012_val_00000001.JPEG
        images.setdefault(classes[number - 1], []).append((member.name, member.offset_data, member.size))
    return images


def val_classes(devkit: Path) -> list[str]:
    """The class of each validation image, in the order of their numbers, from the devkit's two files.

    `devkit` is the tar or the folder in which these lie. Raises UserError for a devkit that is not whole, or without
    these files.
    """
    from scipy.io import loadmat  # only here: half a second

    try:
        if devkit.is_dir():
            files = {name: (devkit / name).read_bytes() for name in ("meta.mat", TRUTH)}
        else:
            with tarfile.open(devkit, "r:gz") as tar:
                files = {Path(member.name).name: file.read() for member in tar if (file := tar.extractfile(member))}
        synsets = loadmat(io.BytesIO(files["meta.mat"]), squeeze_me=True)["synsets"]
        by_id = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
        return [by_id[int(line)] for line in files[TRUTH].decode().split()]
    except (OSError, EOFError, tarfile.ReadError, zlib.error, KeyError, ValueError) as error:
        raise UserError(f"{devkit} is not the devkit, or not all of it ({error!r}); download it again") from None
