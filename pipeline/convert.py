"""Converts a dataset into .beton files, each with its manifest: in parallel, resumable, checked.

    python pipeline/convert.py --source IMAGES/train --out data/mine/train.beton
    python pipeline/convert.py --source IMAGES --out data/mine            train/ and val/ of IMAGES, classes compared
    python pipeline/convert.py --source IMAGES --out data/mine --format webdataset        tar shards as well
    python pipeline/convert.py --verify --out data/mine/train.beton       reads a finished file again, all of it

JPEGs that need no resize are kept byte for byte. The result depends on the images and settings alone, not on
--workers. Stopped at any moment, the same command goes on where it stopped and ends with the same bytes.
"""

import collections
import contextlib
import ctypes
import errno
import hashlib
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import PIL
from tqdm import tqdm

from pipeline import beton, constants, shards, sources, store
from pipeline.beton_writer import BetonWriter
from pipeline.command import UserError, run_command

CHUNK_IMAGES = 32  # a worker's task
SAMPLED_IMAGES = 64  # stored beforehand, to predict the size of the file
_PR_SET_PDEATHSIG = 1  # prctl: the signal this process gets when its parent ends


@dataclass(frozen=True)
class ConvertConfig:
    """What to convert, to what, and how."""

    out: Path
    """A .beton file; or a folder, which gets train.beton and val.beton."""
    source: Path | None = None
    """A folder with one folder a class, or one with train/ and val/ of these; ImageNet's own tar files; CIFAR-10;
    VOC2007, Places205 or iNaturalist 2018 as downloaded."""
    split: Literal["", "train", "val"] = ""
    """Which split, where --source has several."""
    format: Literal["beton", "webdataset"] = "beton"
    """webdataset: the .beton, and beside it tar shards of the same JPEGs, for other programs and --loader dali."""
    shard_images: int = 5000
    """Images in one shard."""
    max_side: int = 500
    """Images with a longer side are resized to this many pixels and encoded again."""
    quality: int = 90
    """JPEG quality of images that are encoded again."""
    check: Literal["quick", "full"] = "quick"
    """How a JPEG is checked before it is kept: its markers and its start (0.2 ms), or decoding all of it (2 ms)."""
    workers: int = 0
    """Processes; 0 for one a core. The result does not depend on it."""
    skip_unreadable: bool = False
    """Leave out images that cannot be read, and list them in the manifest, instead of stopping at the first."""
    fresh: bool = False
    """Start again; a finished or half-finished file is removed first."""
    verify: bool = False
    """Read the finished file again and check every checksum and every image."""


# ---- worker processes ----


def _start_worker(forked_by: int) -> None:
    """Leaves Ctrl-C to the process that wanted this one, and ends with it, however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")  # Pillow's, about damaged metadata of images that are fine
    if not forked_by:  # made by a fork server, which itself lives as long as its children
        threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != forked_by:
        os._exit(1)


def _end_with(process) -> None:
    process.join()
    os._exit(1)


@contextlib.contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Worker processes. Forked, they start at once with all that is loaded and compiled here.

    Where other threads run, as torch's do, a fork could inherit their locks: then a fork server starts them.
    """
    forked = threading.active_count() == 1 and "torch" not in sys.modules
    context = multiprocessing.get_context("fork" if forked else "forkserver")
    if not forked:
        context.set_forkserver_preload(["__main__", "pipeline.convert"])
    # Ctrl-C waits until the workers, who inherit that it is blocked, are there; it is not lost meanwhile.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    pool = ProcessPoolExecutor(workers, context, _start_worker, (os.getpid() if forked else 0,))
    try:
        try:
            pool.submit(os.getpid).result()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        yield pool
    except BrokenProcessPool:
        raise UserError(
            "a worker process died, of too little memory perhaps; run the same command again, with fewer --workers:"
            " it goes on where it stopped"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(workers: int, task: Callable, arguments: Iterable[tuple]) -> Iterator:
    """The items of task(*argument), a list each, in the order of the arguments; a few lists a worker ahead."""
    workers = workers or len(os.sched_getaffinity(0))
    ahead = collections.deque()
    with _pool(workers) as pool:
        for argument in arguments:
            ahead.append(pool.submit(task, *argument))
            if len(ahead) >= 4 * workers:
                yield from ahead.popleft().result()
        while ahead:
            yield from ahead.popleft().result()


def _store_chunk(
    places: list[sources.Place], max_side: int, quality: int, decode_all: bool
) -> list[store.Stored | str]:
    """What is stored of some images; of one that is unreadable, the reason.

    The bytes of those that are kept stay behind: the parent has the kernel copy them from file to file.
    """
    results = []
    for place in places:
        try:
            stored = store.store_image(sources.read_place(place), max_side, quality, decode_all)
            results.append(stored._replace(data=b"") if stored.how == store.KEPT else stored)
        except store.Unreadable as error:
            results.append(str(error))
        except OSError as error:
            raise UserError(
                f"{place[0]} cannot be read from the disk ({error.strerror}); mend that and run again"
            ) from None
    return results


def _verify_chunk(path: Path, rows: list[tuple]) -> list[str]:
    """For some samples (offset, size, mode, height, width, sha256) what is wrong with each, "" where nothing is."""
    from pipeline import decode  # with numba, which takes half a second to load

    handle, problems = decode.make_handle(), []
    with open(path, "rb") as file:
        for offset, size, mode, height, width, sha256 in rows:
            file.seek(offset)
            data = np.frombuffer(file.read(size), np.uint8)
            if hashlib.sha256(data).hexdigest() != sha256:
                problems.append("its bytes have changed")
                continue
            out = np.empty(height * width * 3, np.uint8)
            status = decode.decode_rgb(handle, data, 0, len(data), mode, height, width, out)
            problems.append(decode.STATUS_TEXT[status] if status else "")
    decode.free_handle(handle)
    return problems


# ---- one conversion ----


def _stored_images(source: sources.Source, start: int, config: ConvertConfig) -> Iterator[store.Stored | str]:
    """What is stored of images start …, in order."""
    if source.pixels is not None:
        return (store.store_raw(pixels) for pixels in source.pixels[start:])
    chunks = (
        (
            sources.image_places(source, first, min(first + CHUNK_IMAGES, len(source))),
            *(config.max_side, config.quality, config.check == "full"),
        )
        for first in range(start, len(source), CHUNK_IMAGES)
    )
    return _in_order(config.workers, _store_chunk, chunks)


def _settings(config: ConvertConfig) -> dict:
    return {"max_side_px": config.max_side, "quality": config.quality, "check": config.check}


def _identity(source: sources.Source, config: ConvertConfig) -> dict:
    """What decides the bytes of the result. The place of the source does not."""
    listing = hashlib.sha256("\n".join([*source.classes, "", *source.names]).encode("utf-8", "surrogateescape"))
    listing.update(source.labels.astype("<i8").tobytes())
    return {**_settings(config), "kind": source.kind, "listing_sha256": listing.hexdigest(), "pillow": PIL.__version__}


def _already_there(out: Path, identity: dict) -> bool:
    """Whether `out` is this conversion, finished. Raises UserError where it is another one's result."""
    if not out.exists():
        return False
    try:
        found = beton.open_beton(out).manifest["identity"]
    except (UserError, KeyError) as error:
        raise UserError(f"{out} exists and is not in order ({error}); pass --fresh to replace it") from None
    for key in identity.keys() - {"pillow"}:
        if found.get(key) != identity[key]:
            raise UserError(
                f"{out} exists with {key} {found.get(key)}, asked for is {identity[key]}; pass --fresh to replace it"
            )
    return True


def _check_space(source: sources.Source, writer: BetonWriter, config: ConvertConfig) -> None:
    """Predicts the size of the result from a few images. Raises UserError where the disk has no room for it."""
    chosen = np.unique(np.linspace(0, len(source) - 1, SAMPLED_IMAGES).astype(int))
    if source.pixels is not None:
        sizes = [source.pixels[0].nbytes]
    else:
        places = [sources.image_places(source, i, i + 1)[0] for i in chosen]
        stored = _store_chunk(places, config.max_side, config.quality, False)
        sizes = [item.size_bytes for item in stored if not isinstance(item, str)] or [0]
    row_bytes = np.mean(sizes) * 1.05 + 200  # page ends, the tables, the journal and the file list
    needed = (len(source) - writer.done) * row_bytes + 3 * beton.PAGE_BYTES
    free = shutil.disk_usage(writer.path.parent).free
    if needed > free:
        raise UserError(
            f"{writer.path.parent} has {free / 1e9:.1f} GB free, about {needed / 1e9:.1f} GB are needed for"
            f" {len(source) - writer.done} images; make room or choose another --out"
        )


def _append_all(source: sources.Source, writer: BetonWriter, config: ConvertConfig) -> None:
    start_bytes = writer.bytes_written
    bar = tqdm(total=len(source), initial=writer.done, unit="img", desc=writer.path.name, smoothing=0.05)
    with bar, contextlib.closing(_stored_images(source, writer.done, config)) as results:
        for result in results:
            if isinstance(result, str):
                where = source.where / source.names[writer.done]
                if not config.skip_unreadable:
                    raise UserError(
                        f"{where} is not a readable image ({result}); mend or remove it, or pass --skip-unreadable"
                    )
                bar.write(f"skipped: {where} ({result})", file=sys.stderr)
                writer.append(None)
            else:
                writer.append(
                    result, None if result.data else sources.image_places(source, writer.done, writer.done + 1)[0]
                )
            bar.update()
            if writer.done % 64 == 0:
                elapsed = bar.format_dict["elapsed"]
                bar.set_postfix_str(f"{(writer.bytes_written - start_bytes) / 1e6 / elapsed:.0f} MB/s", refresh=False)


def convert(source: sources.Source, out: Path, config: ConvertConfig) -> None:
    """One split into one file. Raises UserError for an unreadable image, a full disk, a file of another conversion."""
    identity = _identity(source, config)
    out.parent.mkdir(parents=True, exist_ok=True)
    if not config.fresh and _already_there(out, identity):
        print(f"{out} is already converted; nothing to do")
        return
    writer = BetonWriter(out, len(source), identity, config.fresh)
    try:
        if writer.done:
            print(f"{out.name}: going on after {writer.done} of {len(source)} images", file=sys.stderr)
        if len(writer.skipped()) and not config.skip_unreadable:
            raise UserError(
                f"{source.where / source.names[writer.skipped()[0]]} was skipped before as unreadable;"
                " pass --skip-unreadable again, or --fresh"
            )
        _check_space(source, writer, config)
        try:
            _append_all(source, writer, config)
        except (KeyboardInterrupt, UserError):
            writer.checkpoint()
            again = "the same command without --fresh" if config.fresh else "the same command"
            print(f"{out.name}: stopped after {writer.done} of {len(source)} images; {again} goes on", file=sys.stderr)
            raise
        manifest = writer.finish(source, _settings(config))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"{out.parent} is full after {writer.done} of {len(source)} images; make room and run the same command"
            " again, it goes on there"
        ) from None
    finally:
        writer.close()
    stored = ", ".join(f"{count} {how}" for how, count in manifest["stored"].items() if count)
    left_out = ", ".join(f"{count} {what}" for what, count in manifest["left_out"].items())
    print(
        f"{out}: {manifest['images']} images, {len(source.classes)} classes, {manifest['bytes'] / 1e6:.1f} MB"
        f" ({stored}, {len(manifest['skipped'])} skipped){f'; left out: {left_out}' if left_out else ''}"
    )


def verify(path: Path, workers: int = 0) -> None:
    """Reads a finished file whole: checksums and decodes. Raises UserError that names the first bad images."""
    opened = beton.open_beton(path)
    rows = beton.file_rows(opened)
    if len(rows) != len(opened) or [row[1] for row in rows] != opened.labels.astype(str).tolist():
        raise UserError(f"{beton.files_path(path)} lists other images than {path.name} has; convert again")
    columns = (opened.offsets, opened.sizes_bytes, opened.modes, opened.heights, opened.widths)
    samples = list(zip(*(column.tolist() for column in columns), [row[3] for row in rows], strict=True))
    _verify_chunk(path, samples[:1])  # loads the compiled decoder once, before the workers fork
    chunks = ((path, samples[first : first + CHUNK_IMAGES]) for first in range(0, len(samples), CHUNK_IMAGES))
    checked = tqdm(_in_order(workers, _verify_chunk, chunks), total=len(rows), unit="img", desc=f"verify {path.name}")
    bad = [(rows[i][4], problem) for i, problem in enumerate(checked) if problem]
    if bad:
        names = "; ".join(f"{name}: {problem}" for name, problem in bad[:3])
        raise UserError(
            f"{path} has {len(bad)} bad images of {len(rows)} ({names}); convert again, with --check full --fresh"
        )
    print(f"{path}: all {len(rows)} images are in order")


# ---- the command ----


def _jobs(config: ConvertConfig) -> list[tuple[sources.Source, Path]]:
    """The conversions asked for. Splits of one dataset must have the same classes, checked before any starts."""
    if config.source is None:
        return []
    if config.out.suffix == ".beton":
        return [(sources.open_source(config.source, config.split), config.out)]
    splits = [config.split] if config.split else sources.split_names(config.source)
    if not splits:
        raise UserError(
            f"{config.source} has no train/ or val/; give --out a file name that ends with .beton, not {config.out}"
        )
    opened = [sources.open_source(config.source, split) for split in splits]
    for other in opened[1:]:
        beton.require_same_classes(str(opened[0].where), opened[0].classes, str(other.where), other.classes)
    return [(source, config.out / f"{source.split}.beton") for source in opened]


def _note_count(source: sources.Source) -> None:
    """ImageNet with missing images converts, but not silently."""
    known = (constants.IMAGENET_TRAIN_IMAGES, constants.IMAGENET_VAL_IMAGES)
    imagenet = len(source.classes) == constants.IMAGENET_CLASSES and re.fullmatch(r"n\d{8}", source.classes[0])
    if imagenet and len(source) not in known:
        print(f"note: {source.where} has {len(source)} images; ImageNet has {known[0]} (train) and {known[1]} (val)")


def main(config: ConvertConfig) -> None:
    """Converts, then verifies, what is asked for."""
    if config.source is None and not config.verify:
        raise UserError("nothing to do: give --source to convert, or --verify to check what --out has")
    if not 1 <= config.max_side <= 65535 or not 1 <= config.quality <= 100 or config.workers < 0:
        raise UserError(
            f"--max-side {config.max_side} --quality {config.quality} --workers {config.workers}:"
            " expected 1 … 65535, 1 … 100 and 0 or more"
        )
    if config.shard_images < 1:
        raise UserError(f"--shard-images {config.shard_images}: expected 1 or more")
    tqdm.monitor_interval = 0  # its thread would keep the workers from being forked
    jobs = _jobs(config)
    for source, out in jobs:
        _note_count(source)
        convert(source, out, config)
        if config.format == "webdataset":
            shards.pack_shards(beton.open_beton(out), config.shard_images)
    if config.verify:
        outs = [out for _, out in jobs] or (
            [config.out] if not config.out.is_dir() else sorted(config.out.glob("*.beton"))
        )
        if not outs:
            raise UserError(f"{config.out} has no .beton file to verify")
        for out in outs:
            verify(out, config.workers)
            if config.format == "webdataset":
                shards.verify_shards(out.with_suffix(shards.SUFFIX))


if __name__ == "__main__":
    run_command(ConvertConfig, main)
