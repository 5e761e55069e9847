"""A conversion shared among several processes, perhaps on several machines, that have nothing in common but a folder.

    part k of n     images k·N/n … (k+1)·N/n of the source, in a half-finished file of its own (beton_writer.py):
                    x.part0of4.beton.partial, .journal and, while it is written, .writing
    all complete    one process, whichever sees it first, appends them to x.beton and then removes them

No process waits for another. A part is complete when its journal, which is on the disk, names all of its images.
"""

import contextlib
import glob
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.errors import UserError
from pipeline.one_writer import BusyError, OneWriter
from pipeline.storage.beton_writer import flushed_rows
from pipeline.storage.conversion import Conversion, fill, images_of, open_writer, write_whole
from pipeline.storage.kept_images import Kept
from pipeline.storage.sources.source import Source, read_stamps
from pipeline.storage.store import SKIPPED, ImageBytes


class Part(NamedTuple):
    """Part `number`, counted from 0, of `of`."""

    number: int
    of: int

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def path(self, out: Path) -> Path:
        """What BetonWriter is to call this part of `out`; no file ever gets the name."""
        return out.with_suffix(f".part{self.number}of{self.of}.beton")

    def images(self, total: int) -> range:
        """Positions in the source of its images."""
        return range(self.number * total // self.of, (self.number + 1) * total // self.of)

    def identity(self, whole: dict) -> dict:
        """BetonWriter's, from that of the whole conversion."""
        return whole | {"part": str(self)}

    def all(self) -> list["Part"]:
        """It and the others."""
        return [Part(number, self.of) for number in range(self.of)]


def chosen_part(text: str, environment: Mapping[str, str]) -> Part | None:
    """The part that --part names, or else torchrun's environment; None for all in one. Raises UserError."""
    said, expected = f"--part {text}", "K/N with K from 0 to N - 1, such as 0/4, 1/4, 2/4 and 3/4"
    if not text and {"RANK", "WORLD_SIZE"} <= environment.keys():
        rank, world_size = environment["RANK"], environment["WORLD_SIZE"]
        text, said = f"{rank}/{world_size}", f"RANK is {rank!r} and WORLD_SIZE {world_size!r}"
        expected = "whole numbers, RANK from 0 to WORLD_SIZE - 1; torchrun sets them; else unset both"
    if not text:
        return None
    found = re.fullmatch(r"(\d+)/(\d+)", text, re.ASCII)
    part = Part(int(found[1]), int(found[2])) if found else None
    if part is None or part.number >= part.of:
        raise UserError(f"{said}: expected {expected}")
    return part if part.of > 1 else None


def require_images(source: Source, part: Part) -> None:
    """Raises UserError if there are fewer images than parts."""
    if part.of > len(source):
        split = f" for {source.split}" if source.split else ""
        raise UserError(f"{source.where} has {len(source)} images{split}, too few for {part.of} parts; choose fewer")


def part_of(source: Source, part: Part) -> Source:
    """The images of a part alone, with the classes of all."""
    images = part.images(len(source))
    cut = slice(images.start, images.stop)
    return replace(
        source,
        names=source.names[cut],
        labels=source.labels[cut],
        extents=None if source.extents is None else source.extents[cut],
        pixels=None if source.pixels is None else source.pixels[cut],
    )


def _rows_of_all(c: Conversion, part: Part) -> list[np.ndarray]:
    """What each part of the whole conversion has so far: (done,) ROW."""
    return [flushed_rows(p.path(c.out), len(p.images(len(c.source))), p.identity(c.identity)) for p in part.all()]


def _require_unchanged(part: Part, rows: list[np.ndarray], source: Source) -> None:
    """Raises UserError, naming the part to convert again, if an image is another one now."""
    changed = (np.concatenate([own["stamp"] for own in rows]) != read_stamps(source, len(source))).any(1)
    if changed.any():
        first = int(changed.argmax())
        where = next(p for p in part.all() if first in p.images(len(source)))
        raise UserError(
            f"{source.where / source.names[first]} has changed since it was converted; run --part {where} again"
        )


def _converted_images(part: Part, rows: list[np.ndarray], out: Path, start: int) -> Iterator[Kept]:
    """Images start … of the whole source, as their parts have them: what kept_images would give.

    Raises UserError if a part's bytes are not those that were written, by its own digests.
    """
    total = sum(map(len, rows))
    for p in part.all():
        images = p.images(total)
        with open(p.path(out).with_suffix(".beton.partial"), "rb") as file:
            for row in rows[p.number][max(start - images.start, 0) :]:
                stamp = tuple(row["stamp"].tolist())
                if row["how"] == SKIPPED:
                    yield f"left out of part {p}", stamp
                    continue
                how, mode, width, height, offset, size_bytes, digest, _ = row.tolist()
                data, sha256 = os.pread(file.fileno(), size_bytes, offset), bytes(digest)
                if hashlib.sha256(data).digest() != sha256:
                    raise UserError(f"{file.name} is damaged; remove it and run --part {p} again")
                yield ImageBytes(how, mode, height, width, size_bytes, sha256, data), stamp


def write_part(c: Conversion, part: Part) -> None:
    """Converts the images of one part of a whole conversion."""
    own = replace(c, source=part_of(c.source, part), out=part.path(c.out), identity=part.identity(c.identity))
    with images_of(own) as images, open_writer(own) as writer:
        # What the disk is still to take: what all parts lack, and then the file of all.
        left = 2 * len(c.source) - sum(map(len, _rows_of_all(c, part)))
        fill(own, writer, images, left if writer.done < len(own.source) else 0)
        writer.checkpoint()
    print(f"{c.out}: part {part} is complete, {len(own.source)} images")


def put_together(c: Conversion, part: Part, already_there: Callable[[], bool]) -> bool:
    """Makes the file of all parts; False if one of them is not complete, or another process does it."""
    rows = _rows_of_all(c, part)
    missing = [str(p.number) for p in part.all() if len(rows[p.number]) < len(p.images(len(c.source)))]
    if missing:
        if already_there():  # the process that was last has put them together and removed them
            return True
        print(
            f"{c.out}: of {part.of} parts, these are not complete with the same images, settings and Pillow:"
            f" {', '.join(missing)}; whoever completes the last one puts them together; run what is not running"
        )
        return False
    try:
        with OneWriter(_merging_path(c.out), f"{c.out}, out of its parts,"):
            if not already_there():
                _require_unchanged(part, rows, c.source)
                write_whole(c, partial(_converted_images, part, rows, c.out))
    except BusyError:
        print(f"{c.out}: all {part.of} parts are complete, and another process is putting them together")
        return False
    remove_parts(c.out)
    return True


def _merging_path(out: Path) -> Path:
    """The file that says which process puts the parts together (OneWriter)."""
    return out.with_suffix(".beton.merging")


def remove_parts(out: Path) -> None:
    """Those of a finished file, of whatever number they were, unless a process is at work on one."""
    for journal in out.parent.glob(f"{glob.escape(out.stem)}.part*of*.beton.journal"):
        with contextlib.suppress(UserError), OneWriter(journal.with_suffix(".writing"), str(journal)):
            journal.with_suffix(".partial").unlink(missing_ok=True)
            journal.unlink(missing_ok=True)
    if _merging_path(out).exists():  # a killed one's: whoever has it then removes it
        with contextlib.suppress(UserError), OneWriter(_merging_path(out), str(out)):
            pass
