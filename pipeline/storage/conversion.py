"""One split of a dataset into one .beton, from where it was stopped to the finished file.

    images_of ─▶ fill: BetonWriter.append, image after image ─▶ write_whole: finish
    worker processes, or parts that are there already (parts.py)

An image whose stamp is another one than when it was converted is converted again, with all that follow it.
"""

import contextlib
import errno
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.errors import UserError
from pipeline.progress import progress, say_line
from pipeline.storage import beton, store
from pipeline.storage.beton_writer import BetonWriter
from pipeline.storage.kept_images import Kept, keep_image, kept_images
from pipeline.storage.sources.source import Source, image_places, read_stamps
from pipeline.storage.workers import Workers, out_of_memory

SAMPLED_IMAGES = 64  # stored beforehand, to predict the size of the file

Images = Callable[[int], Iterator[Kept]]  # those of a source from a position on


@dataclass(frozen=True)
class Conversion:
    """What becomes what, and how."""

    source: Source
    out: Path
    identity: dict  # what decides the bytes of the result (BetonWriter)
    settings: dict  # as the manifest shows them
    how: store.How
    workers: int
    skip_unreadable: bool
    fresh: bool


def go_back_to_unchanged(source: Source, writer: BetonWriter) -> bool:
    """Keeps what was done before the first image that is another one now; whether there is such a one."""
    changed = (writer.stamps() != read_stamps(source, writer.done)).any(1)
    if changed.any():
        first = int(changed.argmax())
        print(f"note: {source.where / source.names[first]} has changed since it was converted", file=sys.stderr)
        writer.go_back(first)
    return bool(changed.any())


def check_space(source: Source, folder: Path, how: store.How, left: int) -> None:
    """Predicts the size of `left` images from a few of the source. Raises UserError if the disk has no room for it."""
    chosen = np.unique(np.linspace(0, len(source) - 1, SAMPLED_IMAGES).astype(int))
    if source.pixels is not None:
        sizes = [source.pixels[0].nbytes]
    else:
        how = how._replace(decode_all=False)
        kept = [keep_image(image_places(source, i, i + 1)[0], source.read, how)[0] for i in chosen]
        sizes = [item.size_bytes for item in kept if not isinstance(item, str)] or [0]
    row_bytes = np.mean(sizes) * 1.05 + 200  # page ends, the tables, the journal and the file list
    needed = left * row_bytes + 3 * beton.PAGE_BYTES
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder} has {free / 1e9:.1f} GB free, about {needed / 1e9:.1f} GB are needed for {left} images;"
            " make room or choose another --out"
        )


def _append_all(c: Conversion, writer: BetonWriter, images: Images) -> None:
    source = c.source
    start_bytes, start_s = writer.bytes_written, time.monotonic()
    with progress(None, writer.path.name, len(source), unit="image", done=writer.done) as bar:
        for result, stamp in images(writer.done):
            if isinstance(result, str):
                where = source.where / source.names[writer.done]
                if not c.skip_unreadable:
                    raise UserError(
                        f"{where} is not a readable image ({result}); repair or remove it, or pass --skip-unreadable"
                    )
                say_line(f"skipped: {where} ({result})")
            writer.append(None if isinstance(result, str) else result, stamp)
            bar.update()
            if writer.done % 64 == 0:
                mb_per_s = (writer.bytes_written - start_bytes) / 1e6 / max(time.monotonic() - start_s, 1e-3)
                bar.set_postfix_str(f"{mb_per_s:.0f} MB/s", refresh=False)


def fill(c: Conversion, writer: BetonWriter, images: Images, left: int | None = None) -> None:
    """Appends everything from where the writer stands; `left` images are to find room, by default what is missing."""
    source, out = c.source, c.out
    go_back_to_unchanged(source, writer)
    if writer.done:
        print(f"{out.name}: continuing after {writer.done} of {len(source)} images", file=sys.stderr)
    if len(writer.skipped()) and not c.skip_unreadable:
        raise UserError(
            f"{source.where / source.names[writer.skipped()[0]]} was skipped before as unreadable;"
            " pass --skip-unreadable again, or --fresh"
        )
    check_space(source, out.parent, c.how, len(source) - writer.done if left is None else left)
    try:
        _append_all(c, writer, images)
        if go_back_to_unchanged(source, writer):
            raise UserError(f"{source.where} changed while it was converted; run again when that is over")
    except (KeyboardInterrupt, UserError, MemoryError, OSError):
        with contextlib.suppress(OSError):  # the disk may still take the rows of the images that it has
            writer.checkpoint()
            again = "the same command without --fresh" if c.fresh else "the same command"
            done = f"{writer.done} of {len(source)} images"
            print(f"{out.name}: stopped after {done}; {again} continues", file=sys.stderr)
        raise


@contextlib.contextmanager
def open_writer(c: Conversion) -> Iterator[BetonWriter]:
    """The half-finished file. Raises UserError in place of the errors of a disk and of short memory."""
    done = f"0 of {len(c.source)}"
    try:
        with BetonWriter(c.out, len(c.source), c.identity, fresh=c.fresh) as writer:
            try:
                yield writer
            finally:
                done = f"{writer.done} of {len(c.source)}"
    except OSError as error:
        if error.errno is None:  # not of the disk's: numba's, where memory is short
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what = "is full" if full else f"could not be read or written ({error.strerror or error})"
        raise UserError(
            f"{c.out.parent if full else error.filename or c.out.parent} {what} after {done} images;"
            f" {'make room' if full else 'repair that'} and run the same command again, it continues there"
        ) from error
    except MemoryError:
        raise out_of_memory(f"after {done} images") from None


@contextlib.contextmanager
def images_of(c: Conversion) -> Iterator[Images]:
    """The images, by worker processes. They are forked, so this comes before a writer, which has threads."""
    start_workers = contextlib.nullcontext() if c.source.pixels is not None else Workers(c.workers)
    with start_workers as workers:
        yield lambda start: kept_images(c.source, start, c.how, workers)


def write_whole(c: Conversion, images: Images) -> None:
    """All images, and the file's name."""
    with open_writer(c) as writer:
        fill(c, writer, images)
        manifest = writer.finish(c.source, c.settings)
    classes = f"{len(c.source.classes)} classes" if c.source.labelled else "without labels"
    stored = ", ".join(f"{count} {how}" for how, count in manifest["stored"].items() if count)
    left_out = ", ".join(f"{count} {what}" for what, count in manifest["left_out"].items())
    print(
        f"{c.out}: {manifest['images']} images, {classes}, {manifest['bytes'] / 1e6:.1f} MB"
        f" ({stored}, {len(manifest['skipped'])} skipped){f'; left out: {left_out}' if left_out else ''}"
    )
