"""ImageNet's own tar files, read in place: the ids, names and classes are those of the unpacked folder.

root/ILSVRC2012_img_train.tar    a tar with one tar a class
root/ILSVRC2012_img_val.tar      images without classes; ILSVRC2012_devkit_t12.tar.gz beside it knows them
"""

import io
import re
import resource
import tarfile
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

from pipeline import constants
from pipeline.errors import BAD_BYTES, UserError
from pipeline.storage.sources.source import Source, file_bytes, open_file
from pipeline.storage.workers import WorkerDiedError, Workers

DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
TRUTH = "ILSVRC2012_validation_ground_truth.txt"
_VAL_IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")
_DEVKIT_FILE_BYTES = 64 << 20  # a hundred times the larger one of the two
_DEVKIT_S, _DEVKIT_MEMORY_BYTES = 5, 16 << 30  # of a process; it needs about a second, and 1 GB with all of SciPy

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
    left_out = Counter[str]()
    images = _class_tars(path, left_out) if split == "train" else _flat_val_tar(path, left_out)
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
    source = Source("imagenet tar", split, classes, list(names), np.array(labels), path, left_out=left_out)
    return replace(source, files=[path], extents=extents)


def tar_members(path: Path, start: int, end: int, left_out: Counter[str]) -> list[tarfile.TarInfo]:
    """The files of the tar that lies in bytes start … end of `path`; their offsets count from 0 of `path`.

    Links, and what else is neither a file nor a folder, is counted as left out. Raises UserError.
    """
    members = []
    try:
        with open_file(path) as file:
            file.seek(start)
            with tarfile.TarFile(fileobj=file) as tar:
                for member in tar:
                    if member.size < 0 or member.offset_data + member.size > end:
                        raise tarfile.ReadError("a member reaches past the end")
                    if member.issparse():
                        raise tarfile.ReadError(f"{member.name!r} is packed without its zeros, as a sparse file")
                    if member.isfile():
                        members.append(member)
                    elif not member.isdir():
                        left_out["links in tars"] += 1
                file.seek(tar.offset)  # where tarfile found no more: it also stops, silently, at what is no header
                if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError("the empty block at its end is missing")
    except UserError:
        raise
    except (*BAD_BYTES, tarfile.TarError) as error:
        raise UserError(f"{path} is not a tar file, or not all of it ({error}); download it again") from None
    return members


def _class_tars(path: Path, left_out: Counter[str]) -> _ByClass:
    """The images of the train tar."""
    images: _ByClass = {}
    for outer in tar_members(path, 0, path.stat().st_size, left_out):
        if outer.name.endswith(".tar"):
            inner = tar_members(path, outer.offset_data, outer.offset_data + outer.size, left_out)
            images[outer.name.removesuffix(".tar")] = [(m.name, m.offset_data, m.size) for m in inner]
        else:
            left_out["beside the classes"] += 1
    return images


def _flat_val_tar(path: Path, left_out: Counter[str]) -> _ByClass:
    """The images of the val tar."""
    devkit = path.parent / DEVKIT
    if not devkit.is_file():
        raise UserError(f"{path.name} does not say the class of its images; put {DEVKIT} beside it in {path.parent}")
    classes = val_classes(devkit)
    images: _ByClass = {}
    for member in tar_members(path, 0, path.stat().st_size, left_out):
        found = _VAL_IMAGE.fullmatch(Path(member.name).name)
        if found and 0 < int(found[1]) <= len(classes):
            images.setdefault(classes[int(found[1]) - 1], []).append((member.name, member.offset_data, member.size))
        else:
            left_out["beside the images"] += 1
    return images


def val_classes(devkit: Path) -> list[str]:
    """The class of each validation image, in the order of their numbers, from the devkit's two files.

    `devkit` is the tar or the folder in which these lie. Raises UserError for a devkit that is not whole, or without
    these files.
    """
    try:
        files = _devkit_files(devkit)
        with Workers(1) as worker:  # in a process of its own: SciPy can crash at a damaged file
            by_id = dict(next(worker.in_order(_ids_and_synsets, [(files["meta.mat"],)])))
        return [by_id[int(line)] for line in files[TRUTH].decode().split()]
    except WorkerDiedError:
        found = "its meta.mat"
    except UserError:
        raise
    except (*BAD_BYTES, OSError, tarfile.TarError, zlib.error) as error:
        found = " ".join(repr(error).split())
    raise UserError(f"{devkit} is not the devkit, or not all of it ({found}); download it again")


def _ids_and_synsets(meta: bytes) -> list[tuple[int, str]]:
    """In a worker, what meta.mat says. Raises ValueError."""
    from scipy.io import loadmat  # only here: half a second
    from scipy.io.matlab import MatReadError

    resource.setrlimit(resource.RLIMIT_CPU, (_DEVKIT_S, _DEVKIT_S))  # and it can read for ever
    resource.setrlimit(resource.RLIMIT_AS, (_DEVKIT_MEMORY_BYTES, _DEVKIT_MEMORY_BYTES))
    try:
        rows = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        return [(int(row["ILSVRC2012_ID"]), str(row["WNID"])) for row in rows]
    except (*BAD_BYTES, OSError, zlib.error, MatReadError, UnboundLocalError) as error:  # the last is SciPy's slip
        raise ValueError(f"its meta.mat: {error!r}") from None


def _devkit_files(devkit: Path) -> dict[str, bytes]:
    """The content of the two files, by name. Raises what tarfile, zlib and the disk raise, and ValueError."""
    if devkit.is_dir():
        return {name: file_bytes(devkit / name) for name in ("meta.mat", TRUTH)}
    files = {}
    with open_file(devkit) as packed, tarfile.open(fileobj=packed, mode="r:gz") as tar:
        for member in tar:
            if not 0 <= member.size <= _DEVKIT_FILE_BYTES:
                raise ValueError(f"{member.name!r} has {member.size} bytes")
            if Path(member.name).name in ("meta.mat", TRUTH) and (file := tar.extractfile(member)):
                files[Path(member.name).name] = file.read()
    return files
