"""What a source is: one split of a dataset as it lies on disk, and how its images and their stamps are read."""

import hashlib
import os
import stat
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pipeline.errors import UserError

SPLITS = ("train", "val", "unlabelled")  # the last: more images for pretraining, as STL-10 has them
UNLABELLED = ["unlabelled"]  # the classes of images without labels
MAX_LABEL = 10**6  # more classes than any dataset has: larger numbers are something else
MAX_IMAGE_BYTES = 2 << 30  # the largest image that is read has 180 million pixels of up to 8 bytes

Place = tuple[str, int, int]  # of an image: file, offset, size in bytes or -1 for all of the file

# By which a change of an image is noticed: size in bytes, and when its file was last written, ns; a tar's images have
# the time of the tar, pixels without a file part of their digest.
Stamp = tuple[int, int]
Read = Callable[[Place], tuple[bytes, Stamp]]


def open_file(path: str | Path) -> BinaryIO:
    """A file, open for reading. Raises OSError, and UserError for what may never end: a pipe, a socket or a device."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # or a pipe would wait for somebody who writes to it
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise UserError(f"{path} is not a file but a folder, a pipe, a socket or a device; remove it")
    return os.fdopen(fd, "rb")


def file_bytes(path: Path, most_bytes: int = 1 << 30) -> bytes:
    """All of a file. Raises OSError, and UserError for what is not a file, or larger than `most_bytes`."""
    with open_file(path) as file:
        size_bytes = os.fstat(file.fileno()).st_size
        if size_bytes > most_bytes:
            raise UserError(f"{path} has {size_bytes} bytes, expected are at most {most_bytes}; download it again")
        return file.read()


def text_lines(path: Path) -> list[str]:
    """The lines of a text file that are not empty. Raises OSError, and UserError for another kind of file."""
    try:
        return [line for line in file_bytes(path).decode("utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text file ({error}); download it again") from None


def read_image(place: Place) -> tuple[bytes, Stamp]:
    """The bytes of one image, and its stamp: that of before it was read, so a later change shows in it.

    Raises OSError, and UserError for what is not a file, or too large for an image.
    """
    path, offset, size = place
    with open_file(path) as file:
        about = os.fstat(file.fileno())
        size_bytes = about.st_size if size < 0 else size
        if size_bytes > MAX_IMAGE_BYTES:
            raise UserError(f"{path} has {size_bytes} bytes, an image has at most {MAX_IMAGE_BYTES}; remove it")
        file.seek(offset)
        return file.read(size_bytes), (size_bytes, about.st_mtime_ns)


@dataclass(frozen=True)
class Source:
    """N images of one split."""

    kind: str
    split: str
    classes: list[str]
    names: list[str]  # one an image, relative to `where`, "/" between the parts
    labels: np.ndarray  # (N,) int64, index into classes
    where: Path  # what names are relative to: a folder, or the one file that holds all images
    labelled: bool = True  # False: `classes` is UNLABELLED, and evaluations refuse it
    files: list[Path] = field(default_factory=list)  # that hold many images each, such as tars; empty for a folder
    extents: np.ndarray | None = None  # (N, 3) int64: which of `files`, offset and size there; None for a folder
    read: Read = read_image  # a function of a module, as it goes to other processes
    pixels: np.ndarray | None = None  # (N, H, W, 3) uint8 if the source holds raw pixels
    left_out: Counter[str] = field(default_factory=Counter)  # what lies there and is no image of it: suffix → how many

    def __len__(self) -> int:
        return len(self.names)


def numbered_classes(where: Path, labels: np.ndarray) -> list[str]:
    """ "0", "1", … for labels that are numbers without names, (N,) int64. Raises UserError for what is none."""
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high > MAX_LABEL:
        raise UserError(
            f"{where} has labels from {low} to {high}, and class numbers from 0 to at most {MAX_LABEL} are expected;"
            " write it again with these"
        )
    return [str(label) for label in range(high + 1)]


def image_places(source: Source, start: int, stop: int) -> list[Place]:
    """Where images start … stop - 1 are."""
    if source.extents is None:
        return [(os.path.join(source.where, name), 0, -1) for name in source.names[start:stop]]
    return [(str(source.files[file]), offset, size) for file, offset, size in source.extents[start:stop].tolist()]


def pixel_stamp(pixels: np.ndarray) -> Stamp:
    """The stamp of pixels without a file."""
    digest = hashlib.sha256(pixels.tobytes()).digest()
    return pixels.nbytes, int.from_bytes(digest[:8], "little", signed=True)


def read_stamps(source: Source, count: int) -> np.ndarray:
    """The stamps of the first `count` images as they are now, (count, 2) int64; -1 if there is no file.

    Each file is asked for once, by several threads: about ten seconds for ImageNet's 1.3 million on a local disk.
    """
    if source.pixels is not None:
        return np.array([pixel_stamp(pixels) for pixels in source.pixels[:count]], np.int64).reshape(-1, 2)
    if source.extents is not None:
        written_ns = np.array([_file_stamp(file)[1] for file in source.files], np.int64)
        return np.stack([source.extents[:count, 2], written_ns[source.extents[:count, 0]]], 1)
    with ThreadPoolExecutor(8) as pool:
        parts = pool.map(lambda first: _file_stamps(source, first, min(first + 1000, count)), range(0, count, 1000))
        return np.concatenate([np.empty((0, 2), np.int64), *parts])


def _file_stamps(source: Source, start: int, stop: int) -> np.ndarray:
    return np.array([_file_stamp(path) for path, _, _ in image_places(source, start, stop)], np.int64)


def _file_stamp(path: str | Path) -> Stamp:
    try:
        about = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return -1, -1
    return about.st_size, about.st_mtime_ns
