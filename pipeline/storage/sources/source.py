"""What a source is: one split of a dataset as it lies on disk, and how its images and their stamps are read."""

import hashlib
import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pipeline.errors import UserError

SPLITS = ("train", "val", "unlabelled")  # the last: more images for pretraining, as STL-10 has them
UNLABELLED = ["unlabelled"]  # the classes of images without labels
MAX_LABEL = 10**6  # more classes than any dataset has: larger numbers are something else

Place = tuple[str, int, int]  # of an image: file, offset, size in bytes or -1 for all of the file

# By which a change of an image is noticed: size in bytes, and when its file was last written, ns; a tar's images have
# the time of the tar, pixels without a file part of their digest.
Stamp = tuple[int, int]
Read = Callable[[Place], tuple[bytes, Stamp]]


def read_image(place: Place) -> tuple[bytes, Stamp]:
    """The bytes of one image, and its stamp: that of before it was read, so a later change shows in it."""
    path, offset, size = place
    with open(path, "rb") as file:
        about = os.fstat(file.fileno())
        file.seek(offset)
        return file.read(size), (about.st_size if size < 0 else size, about.st_mtime_ns)


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
        written_ns = np.array([file.stat().st_mtime_ns for file in source.files], np.int64)
        return np.stack([source.extents[:count, 2], written_ns[source.extents[:count, 0]]], 1)
    with ThreadPoolExecutor(8) as pool:
        parts = pool.map(lambda first: _file_stamps(source, first, min(first + 1000, count)), range(0, count, 1000))
        return np.concatenate([np.empty((0, 2), np.int64), *parts])


def _file_stamps(source: Source, start: int, stop: int) -> np.ndarray:
    found = []
    for path, _, _ in image_places(source, start, stop):
        try:
            about = os.stat(path)
            found.append((about.st_size, about.st_mtime_ns))
        except FileNotFoundError:
            found.append((-1, -1))
    return np.array(found, np.int64)
