"""The tables of any FFCV file: which fields it has, and where its images lie.

    header          24 bytes: version, fields, page size, samples, where the allocation table is
    descriptors     1041 bytes a field: type, name, arguments
    samples         one row each, a C struct of the fields' entries
    pages           of any power of two; a sample's data never cross the border of a page
    allocations     24 bytes each, in any order: sample, where, how many bytes; of images and of other fields' data

Whatever the names and order of the fields, the image and the label are found by their type numbers.

Source of the layout: ffcv 1.0.2, `types.py`, `writer.py`, `memory_allocator.py`, `fields/`.
"""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.errors import UserError

FFCV_VERSION = 2
MODE_JPEG, MODE_RAW = 0, 1

HEADER = np.dtype(
    [("version", "<u2"), ("fields", "<u2"), ("page_bytes", "<u4"), ("samples", "<u8"), ("allocations", "<u8")],
    align=True,
)
DESCRIPTOR = np.dtype([("type", "<u1"), ("name", "<u1", 16), ("arguments", "<u1", 1024)], align=True)
ALLOCATION = np.dtype([("sample", "<u8"), ("offset", "<u8"), ("bytes", "<u8")])
IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("offset", "<u8")])
_VARIABLE = np.dtype([("offset", "<u8"), ("bytes", "<u8")])
# By type number: float, integer, image, bytes, array, JSON, tensor.
ENTRIES = (np.dtype("<f8"), np.dtype("<i8"), IMAGE, _VARIABLE, np.dtype("<u8"), _VARIABLE, np.dtype("<u8"))
TYPE_LABEL, TYPE_IMAGE = 1, 2
_LABELS, _IMAGES = {"label", "labels", "target", "class", "y"}, {"image", "images"}  # which of several


class Tables(NamedTuple):
    """All of a file but the data of its N samples."""

    head: bytes  # header and descriptors
    samples: np.ndarray  # (N,) of whatever fields
    allocations: np.ndarray  # of ALLOCATION
    fields: list[str]  # their names, the image's first
    label: str | None  # the name of the label's field
    images: np.ndarray  # (N,) of IMAGE
    labels: np.ndarray  # (N,) int64, zeros if there is no such field
    sizes_bytes: np.ndarray  # (N,) int64, of the images


def _rows(path: Path, rows: np.dtype, count: int, offset: int) -> np.ndarray:
    file_bytes, end = path.stat().st_size, offset + count * rows.itemsize
    if end > file_bytes:
        raise UserError(
            f"{path} is cut short or no FFCV file: it has {file_bytes} bytes, its tables reach to {end}; copy it again"
        )
    return np.fromfile(path, rows, count, offset=offset)


def _only(path: Path, names: list[str], preferred: set[str], what: str) -> str | None:
    """Of the fields of one type the one that is meant, None if there is none."""
    named = [name for name in names if name.lower() in preferred] if len(names) > 1 else names
    if len(named) != 1 and names:
        raise UserError(
            f"{path} has {len(names)} {what} fields ({', '.join(names)}), and one of the name"
            f" {' or '.join(sorted(preferred))} is expected; write the file again with that name"
        )
    return named[0] if named else None


def read_tables(path: Path) -> Tables:
    """Raises UserError for a file that is not FFCV's, of another version, cut short, damaged, or without images."""
    header = _rows(path, HEADER, 1, 0)[0]
    if header["version"] != FFCV_VERSION:
        raise UserError(
            f"{path} begins with the version number {header['version']}, files of FFCV 1 with {FFCV_VERSION}: it is"
            " damaged, or another program's; write it again with FFCV 1.0"
        )
    descriptors = _rows(path, DESCRIPTOR, int(header["fields"]), HEADER.itemsize)
    names = [re.sub(rb"[^ -~]", b"?", row.tobytes().split(b"\0")[0]).decode() for row in descriptors["name"]]
    types = descriptors["type"].tolist()
    for name, number in zip(names, types, strict=True):
        if number >= len(ENTRIES):
            raise UserError(f"{path} has a field {name!r} that is none of FFCV 1's own types; write it without")
    image = _only(path, [name for name, t in zip(names, types, strict=True) if t == TYPE_IMAGE], _IMAGES, "image")
    label = _only(path, [name for name, t in zip(names, types, strict=True) if t == TYPE_LABEL], _LABELS, "integer")
    if image is None or len(set(names)) < len(names):
        raise UserError(
            f"{path} has the fields {', '.join(names)}; one RGBImageField, each with its own name, expected"
        )
    samples_at = HEADER.itemsize + descriptors.nbytes
    layout = np.dtype([("", ENTRIES[number]) for number in types], align=True)  # fields f0, f1, …
    samples = _rows(path, layout, int(header["samples"]), samples_at)
    at, file_bytes = int(header["allocations"]), path.stat().st_size
    if (
        not samples_at + samples.nbytes <= at < file_bytes
        or (file_bytes - at) % ALLOCATION.itemsize
        or not len(samples)
    ):
        raise UserError(
            f"{path} was not finished or is cut short: for {len(samples)} samples its last table is at byte {at} of"
            f" {file_bytes}; copy it again, or write it again"
        )
    allocations = np.fromfile(path, ALLOCATION, offset=at)
    images = samples[f"f{names.index(image)}"]
    sizes = _image_sizes(path, images, allocations, samples_at + samples.nbytes, at)
    labels = np.zeros(len(samples), np.int64) if label is None else samples[f"f{names.index(label)}"].astype(np.int64)
    head = header.tobytes() + descriptors.tobytes()
    fields = [image, *(name for name in names if name != image)]
    return Tables(head, samples, allocations, fields, label, images, labels, sizes)


def _image_sizes(path: Path, images: np.ndarray, allocations: np.ndarray, start: int, end: int) -> np.ndarray:
    """The bytes of each image, found by its address. No two allocations may share a byte, all lie in start … end."""
    used = allocations[allocations["bytes"] > 0]
    used = used[np.argsort(used["offset"])]
    offsets, sizes = used["offset"], used["bytes"]
    sound = len(used) and offsets[0] >= start and (offsets <= end).all() and (sizes <= end - offsets).all()
    sound = sound and (offsets[:-1] + sizes[:-1] <= offsets[1:]).all()
    if sound:
        rows = np.searchsorted(offsets, images["offset"]).clip(max=len(used) - 1)
        sound = (
            np.array_equal(offsets[rows], images["offset"])
            and len(np.unique(rows)) == len(images)
            and (images["mode"] <= MODE_RAW).all()
            and (images["width"] > 0).all()
            and (images["height"] > 0).all()
        )
    if not sound:
        raise UserError(f"{path} is cut short or has a damaged sample table; copy it again, or write it again")
    return sizes[rows].astype(np.int64)
