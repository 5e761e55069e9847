"""Reads a finished dataset whole, a .beton or shards, and checks every image: its checksum, and that it decodes."""

import hashlib
import itertools
from collections.abc import Generator
from pathlib import Path

import numpy as np

from pipeline.errors import UserError
from pipeline.progress import progress
from pipeline.storage.beton import MODE_RAW, Beton, Stored, file_rows, files_path
from pipeline.storage.workers import CHUNK_IMAGES, Workers

DAMAGED = "damaged"  # in `x.files.tsv`: known to be so when the file was adopted


def verify(stored: Stored, workers: int = 0) -> None:
    """Checks all images in `workers` processes. Raises UserError that names the first bad ones."""
    rows, path = file_rows(stored), stored.path
    if [row[1] for row in rows] != stored.labels.astype(str).tolist():
        raise UserError(f"{files_path(path)} lists other images than {path.name} has; convert again")
    bad, known = [], 0
    checked = check_images(stored, np.arange(len(stored)), workers)
    watched = progress(checked, "verify " + path.name, len(rows), unit="image")
    for row, (sha256, problem) in zip(rows, watched, strict=True):
        if sha256 != row[3]:
            bad.append((row[4], "its bytes have changed"))
        elif row[2] == DAMAGED:
            known += 1
        elif problem:
            bad.append((row[4], problem))
    if bad:
        names = "; ".join(f"{name}: {problem}" for name, problem in bad[:3])
        advice = "convert again, with --check full --fresh"
        if "adopted" in stored.manifest:  # never to be removed: it may be the only copy
            advice = "get a good copy of the file from where it came from"
        elif not isinstance(stored, Beton):  # tars that are there are not packed again
            advice = f"remove {path.name} and its tars, and convert again"
        raise UserError(f"{path} has {len(bad)} bad images of {len(rows)} ({names}); {advice}")
    as_before = f", but for {known} that were damaged when it was adopted" if known else ""
    print(f"{path}: all {len(rows)} images are in order{as_before}")


def note_shared_images(train: Beton, val: Beton) -> None:
    """Says how many images of val are also in train, byte for byte as they are stored."""
    in_train = {row[3] for row in file_rows(train)}
    shared = [row[4] for row in file_rows(val) if row[3] in in_train]
    if shared:
        print(
            f"note: {len(shared)} of {len(val)} images of {val.path} are in {train.path.name} too ({shared[0]} first)"
        )


def check_images(stored: Stored, order: np.ndarray, workers: int) -> Generator[tuple[str, str]]:
    """For each image, in this order of ids: the sha256 of its bytes, and what is wrong with them, "" if nothing is."""
    files = [stored.file_of(sample)[0] for sample in order]
    columns = (stored.offsets, stored.sizes_bytes, stored.modes, stored.heights, stored.widths)
    samples = list(zip(files, *(column[order].tolist() for column in columns), strict=True))
    _check(np.zeros(3, np.uint8), MODE_RAW, 1, 1)  # loads the compiled decoder once, before the workers fork
    chunks = ((samples[first : first + CHUNK_IMAGES],) for first in range(0, len(samples), CHUNK_IMAGES))
    with Workers(workers) as processes:
        yield from itertools.chain.from_iterable(processes.in_order(_check_chunk, chunks))


def _check_chunk(samples: list[tuple[Path, int, int, int, int, int]]) -> list[tuple[str, str]]:
    """In a worker, check_images of some (file, offset, size, mode, height, width)."""
    return [_check(np.fromfile(path, np.uint8, size, offset=at), *about) for path, at, size, *about in samples]


def _check(data: np.ndarray, mode: int, height: int, width: int) -> tuple[str, str]:
    from pipeline.storage import decode  # with numba, which takes half a second to load

    handle, out = decode.make_handle(), np.empty(height * width * 3, np.uint8)
    status = decode.decode_rgb(handle, data, 0, len(data), mode, height, width, out)
    decode.free_handle(handle)
    return hashlib.sha256(data.data).hexdigest(), decode.STATUS_TEXT[status] if status else ""
