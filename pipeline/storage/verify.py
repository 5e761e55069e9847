"""Reads a finished dataset whole, a .beton or shards, and checks every image: its checksum, and that it decodes."""

import hashlib
import itertools
from pathlib import Path

import numpy as np
from tqdm import tqdm

from pipeline.errors import UserError
from pipeline.storage.beton import Beton, Stored, file_rows, files_path
from pipeline.storage.workers import CHUNK_IMAGES, Workers


def verify(stored: Stored, workers: int = 0) -> None:
    """Checks all images in `workers` processes. Raises UserError that names the first bad ones."""
    rows, path = file_rows(stored), stored.path
    if len(rows) != len(stored) or [row[1] for row in rows] != stored.labels.astype(str).tolist():
        raise UserError(f"{files_path(path)} lists other images than {path.name} has; convert again")
    files = [stored.file_of(sample)[0] for sample in range(len(stored))]
    columns = (stored.offsets, stored.sizes_bytes, stored.modes, stored.heights, stored.widths)
    samples = list(zip(files, *(column.tolist() for column in columns), [row[3] for row in rows], strict=True))
    _verify_chunk(samples[:1])  # loads the compiled decoder once, before the workers fork
    chunks = ((samples[first : first + CHUNK_IMAGES],) for first in range(0, len(samples), CHUNK_IMAGES))
    with Workers(workers) as processes:
        problems = itertools.chain.from_iterable(processes.in_order(_verify_chunk, chunks))
        checked = tqdm(problems, total=len(rows), unit="img", desc=f"verify {path.name}")
        bad = [(rows[i][4], problem) for i, problem in enumerate(checked) if problem]
    if bad:
        names = "; ".join(f"{name}: {problem}" for name, problem in bad[:3])
        advice = "convert again, with --check full --fresh"
        if not isinstance(stored, Beton):  # tars that are there are not packed again
            advice = f"remove {path.name} and its tars, and convert again"
        raise UserError(f"{path} has {len(bad)} bad images of {len(rows)} ({names}); {advice}")
    print(f"{path}: all {len(rows)} images are in order")


def note_shared_images(train: Beton, val: Beton) -> None:
    """Says how many images of val are also in train, byte for byte as they are stored."""
    in_train = {row[3] for row in file_rows(train)}
    shared = [row[4] for row in file_rows(val) if row[3] in in_train]
    if shared:
        print(
            f"note: {len(shared)} of {len(val)} images of {val.path} are in {train.path.name} too ({shared[0]} first)"
        )


def _verify_chunk(samples: list[tuple[Path, int, int, int, int, int, str]]) -> list[str]:
    """For each (file, offset, size, mode, height, width, sha256) what is wrong with it, "" if nothing is."""
    from pipeline.storage import decode  # with numba, which takes half a second to load

    handle, problems = decode.make_handle(), []
    for path, offset, size, mode, height, width, sha256 in samples:
        data = np.fromfile(path, np.uint8, size, offset=offset)
        if hashlib.sha256(data.data).hexdigest() != sha256:
            problems.append("its bytes have changed")
            continue
        out = np.empty(height * width * 3, np.uint8)
        status = decode.decode_rgb(handle, data, 0, len(data), mode, height, width, out)
        problems.append(decode.STATUS_TEXT[status] if status else "")
    decode.free_handle(handle)
    return problems
