"""Converts a dataset into .beton files, each with its manifest: in parallel, resumable, checked.

    python pipeline/convert.py --source IMAGES --out data/mine            train/ and val/ of IMAGES, else all as train
    python pipeline/convert.py --source IMAGES --out data/mine --holdout 0.1              a tenth of train becomes val
    python pipeline/convert.py --source IMAGES/train --out data/mine/train.beton
    python pipeline/convert.py --source IMAGES --out data/mine --format webdataset        tar shards as well
    python pipeline/convert.py --source X.beton                           an FFCV file of other origin, where it lies
    python pipeline/convert.py --source TARS                              WebDataset tars, for --loader dali
    python pipeline/convert.py --verify --out data/mine/train.beton       reads a finished file again and checks it

JPEGs that need no resize are kept byte for byte. Other formats are encoded again, of an animation the first frame. Of
images with more than 8 bits a value the upper 8 are kept; an image that would come out almost black is refused by name.

The result depends on the images and settings alone, not on --workers. After a stop at any moment, the same command
continues there and ends with the same bytes. If an image's size or time has changed since, the conversion starts again
at that image. What is not converted is counted in the last line and in the manifest.
"""

import contextlib
import errno
import hashlib
import shutil
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import PIL
from tqdm import tqdm

from pipeline.command import run_command
from pipeline.errors import UserError
from pipeline.storage import beton, shards, store
from pipeline.storage.adopt import Asked, adopt
from pipeline.storage.beton_writer import BetonWriter, remove_leftovers, state_sha256
from pipeline.storage.kept_images import keep_image, kept_images
from pipeline.storage.sources.selection import (
    hold_out,
    note_count,
    of_classes,
    of_imagenet,
    open_splits,
    require_fitting,
)
from pipeline.storage.sources.source import Source, image_places, read_stamps
from pipeline.storage.verify import note_shared_images, verify
from pipeline.storage.workers import Workers, out_of_memory

SAMPLED_IMAGES = 64  # stored beforehand, to predict the size of the file


@dataclass(frozen=True)
class ConvertConfig:
    """What to convert, to what, and how."""

    out: Path | None = None
    """The .beton file to write; or a folder, which gets train.beton and, if there is one, val.beton. Without it an FFCV
    file or WebDataset tars are used where they lie."""
    source: Path | None = None
    """The images: a folder of images, with one folder a class or without classes, or one with train/ and val/ (or
    validation/) of these; ImageNet's own tar files, Kaggle's folders, or val/ without class folders; CIFAR-10,
    CIFAR-100, STL-10, Tiny ImageNet, VOC2007, Places205 or iNaturalist 2018 as they are downloaded; Hugging Face's
    parquet files; WebDataset tars; an FFCV file, which is not copied: --out is then a link to it."""
    split: Literal["", "train", "val", "unlabelled"] = ""
    """Which split to convert, if --source has several."""
    unlabelled: bool = False
    """Take every image below --source, without labels, whatever the folders are."""
    classes: Path | None = None
    """A file that names the classes to convert, one at the beginning of each line; None: all of them."""
    holdout: float = 0
    """Make val.beton of images of train, for a dataset that has no val: a share of each class (0.1), or from 1 on a
    number of images (5000). 0: none is made."""
    seed: int = 0
    """Decides which images --holdout takes."""
    format: Literal["beton", "webdataset"] = "beton"
    """webdataset: the .beton, and beside it tar shards of the same JPEGs, for other programs and --loader dali."""
    shard_images: int = 5000
    """Images in one shard."""
    max_side: int | None = None
    """Images with a longer side are resized to this many pixels and encoded again. None: 500; but val of ImageNet, and
    of any of its classes, keeps its pixels, as evaluations of it are published of these."""
    quality: int = 90
    """JPEG quality of images that are encoded again."""
    check: Literal["quick", "full"] = "quick"
    """How a JPEG is checked before it is kept. quick: its markers and its first pixels (0.2 ms); full: all of it is
    decoded (2 ms)."""
    workers: int = 0
    """Worker processes; 0 for one a core. The result does not depend on it."""
    skip_unreadable: bool = False
    """Leave out images that cannot be read, and list them in the manifest, instead of stopping at the first."""
    fresh: bool = False
    """Start again: an existing file, finished or not, is removed first."""
    verify: bool = False
    """Read the finished file again and check the checksum of every image, and that it decodes."""


def _how(config: ConvertConfig) -> store.How:
    return store.How(config.max_side or store.SIDE_PX, config.quality, decode_all=config.check == "full")


def _settings(source: Source, config: ConvertConfig) -> dict:
    held_out = {"holdout": config.holdout, "seed": config.seed}
    return {
        **{"max_side_px": config.max_side or store.SIDE_PX, "quality": config.quality, "check": config.check},
        **(held_out if config.holdout and source.split != "unlabelled" else {}),
    }


def _identity(source: Source, config: ConvertConfig) -> dict:
    """What decides the bytes of the result. The place of the source does not."""
    listing = hashlib.sha256("\n".join([*source.classes, "", *source.names]).encode("utf-8", "surrogateescape"))
    listing.update(source.labels.astype("<i8").tobytes())
    about = {"kind": source.kind, "listing_sha256": listing.hexdigest(), "pillow": PIL.__version__}
    return _settings(source, config) | about


def _already_there(out: Path, identity: dict, source: Source) -> bool:
    """Whether `out` is this conversion, finished. Raises UserError if it is another one's, or of other images."""
    if not out.exists():
        return False
    try:
        manifest = beton.open_beton(out).manifest
        found = manifest["identity"]
    except (UserError, KeyError) as error:
        raise UserError(f"{out} exists and is not in order ({error}); pass --fresh to replace it") from None
    for key in sorted({**found, **identity}, key="listing_sha256".__eq__):  # a setting says more than a digest
        if key != "pillow" and found.get(key) != identity.get(key):
            keep = f" (the default for ImageNet's val); pass --max-side {found.get(key)} to keep it, or"
            raise UserError(
                f"{out} exists with {key} {found.get(key)}, asked for is {identity.get(key)}"
                f"{keep if identity.get(key) == store.ANY_SIDE_PX else ';'} pass --fresh to replace it"
            )
    what = "pixels" if source.pixels is not None else "size and time"
    state = manifest.get("source", {}).get("state_sha256")
    if state is None:
        compared = f"names and settings; the {what} of its images were not yet noted when it was made"
    elif state == state_sha256(read_stamps(source, len(source))):
        compared = f"names, settings, and {what} of {len(source)} images"
    else:
        raise UserError(
            f"{out} exists, but images of {source.where} have changed since ({what} of {len(source)} compared);"
            " pass --fresh to convert them again"
        )
    remove_leftovers(out)
    print(f"{out} is already converted; nothing to do (compared: {compared})")
    return True


def _go_back_to_unchanged(source: Source, writer: BetonWriter) -> bool:
    """Keeps what was done before the first image that is another one now; whether there is such a one."""
    changed = (writer.stamps() != read_stamps(source, writer.done)).any(1)
    if changed.any():
        first = int(changed.argmax())
        print(f"note: {source.where / source.names[first]} has changed since it was converted", file=sys.stderr)
        writer.go_back(first)
    return bool(changed.any())


def _check_space(source: Source, writer: BetonWriter, config: ConvertConfig) -> None:
    """Predicts the size of the result from a few images. Raises UserError if the disk has no room for it."""
    chosen = np.unique(np.linspace(0, len(source) - 1, SAMPLED_IMAGES).astype(int))
    if source.pixels is not None:
        sizes = [source.pixels[0].nbytes]
    else:
        how = _how(config)._replace(decode_all=False)
        kept = [keep_image(image_places(source, i, i + 1)[0], source.read, how)[0] for i in chosen]
        sizes = [item.size_bytes for item in kept if not isinstance(item, str)] or [0]
    row_bytes = np.mean(sizes) * 1.05 + 200  # page ends, the tables, the journal and the file list
    needed = (len(source) - writer.done) * row_bytes + 3 * beton.PAGE_BYTES
    free = shutil.disk_usage(writer.path.parent).free
    if needed > free:
        raise UserError(
            f"{writer.path.parent} has {free / 1e9:.1f} GB free, about {needed / 1e9:.1f} GB are needed for"
            f" {len(source) - writer.done} images; make room or choose another --out"
        )


def _append_all(source: Source, writer: BetonWriter, config: ConvertConfig, workers: Workers | None) -> None:
    start_bytes, start_s = writer.bytes_written, time.monotonic()
    bar = tqdm(total=len(source), initial=writer.done, unit="img", desc=writer.path.name, smoothing=0.05)
    with bar:
        for result, stamp in kept_images(source, writer.done, _how(config), workers):
            if isinstance(result, str):
                where = source.where / source.names[writer.done]
                if not config.skip_unreadable:
                    raise UserError(
                        f"{where} is not a readable image ({result}); repair or remove it, or pass --skip-unreadable"
                    )
                bar.write(f"skipped: {where} ({result})", file=sys.stderr)
            writer.append(None if isinstance(result, str) else result, stamp)
            bar.update()
            if writer.done % 64 == 0:
                mb_per_s = (writer.bytes_written - start_bytes) / 1e6 / max(time.monotonic() - start_s, 1e-3)
                bar.set_postfix_str(f"{mb_per_s:.0f} MB/s", refresh=False)


def _fill(source: Source, writer: BetonWriter, config: ConvertConfig, workers: Workers | None) -> dict:
    """Everything from where the writer stands to the finished file. Returns the manifest."""
    out = writer.path
    _go_back_to_unchanged(source, writer)
    if writer.done:
        print(f"{out.name}: continuing after {writer.done} of {len(source)} images", file=sys.stderr)
    if len(writer.skipped()) and not config.skip_unreadable:
        raise UserError(
            f"{source.where / source.names[writer.skipped()[0]]} was skipped before as unreadable;"
            " pass --skip-unreadable again, or --fresh"
        )
    _check_space(source, writer, config)
    try:
        _append_all(source, writer, config, workers)
        if _go_back_to_unchanged(source, writer):
            raise UserError(f"{source.where} changed while it was converted; run again when that is over")
    except (KeyboardInterrupt, UserError, MemoryError):
        writer.checkpoint()
        again = "the same command without --fresh" if config.fresh else "the same command"
        print(f"{out.name}: stopped after {writer.done} of {len(source)} images; {again} continues", file=sys.stderr)
        raise
    return writer.finish(source, _settings(source, config))


def convert(source: Source, out: Path, config: ConvertConfig) -> None:
    """One split into one file. Raises UserError for an unreadable image, a full disk, a file of another conversion."""
    if config.max_side is None and of_imagenet(source) and "val" in (source.split, out.stem, source.where.name):
        config = replace(config, max_side=store.ANY_SIDE_PX)
    identity = _identity(source, config)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out.parent} cannot be made ({error.strerror}); give another folder with --out") from None
    if not config.fresh and _already_there(out, identity, source):
        return
    # The workers first: they are forked, which a process with threads must not be, and the writer has two.
    start_workers = contextlib.nullcontext() if source.pixels is not None else Workers(config.workers)
    with start_workers as workers, BetonWriter(out, len(source), identity, fresh=config.fresh) as writer:
        try:
            manifest = _fill(source, writer, config, workers)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError(
                f"{out.parent} is full after {writer.done} of {len(source)} images; make room and run the same command"
                " again, it continues there"
            ) from None
        except MemoryError:
            raise out_of_memory(f"after {writer.done} of {len(source)} images") from None
    classes = f"{len(source.classes)} classes" if source.labelled else "without labels"
    stored = ", ".join(f"{count} {how}" for how, count in manifest["stored"].items() if count)
    left_out = ", ".join(f"{count} {what}" for what, count in manifest["left_out"].items())
    print(
        f"{out}: {manifest['images']} images, {classes}, {manifest['bytes'] / 1e6:.1f} MB"
        f" ({stored}, {len(manifest['skipped'])} skipped){f'; left out: {left_out}' if left_out else ''}"
    )


# ---- the command ----


def _jobs(config: ConvertConfig) -> list[tuple[Source, Path]]:
    """The conversions asked for. Splits of one dataset must have the same classes, checked before any starts."""
    if config.source is None or config.out is None:
        return []
    one_file = config.out.suffix == ".beton"
    sources = open_splits(config.source, config.split, one_file=one_file, unlabelled=config.unlabelled)
    if config.classes:
        sources = [of_classes(source, config.classes) for source in sources]
    if config.holdout:
        from pipeline.choices.subsets import held_out_subset  # with numba, which takes half a second to load

        sources = hold_out(sources, lambda labels: held_out_subset(config.seed, labels, config.holdout))
    require_fitting(sources)
    return [(source, config.out if one_file else config.out / f"{source.split}.beton") for source in sources]


def main(config: ConvertConfig) -> None:
    """Converts, then verifies, what is asked for."""
    if config.source is None and (not config.verify or config.out is None):
        raise UserError("nothing to do: give --source to convert, or --verify to check what --out has")
    max_side = store.SIDE_PX if config.max_side is None else config.max_side
    if not 1 <= max_side <= store.ANY_SIDE_PX or not 1 <= config.quality <= 100 or config.workers < 0:
        raise UserError(
            f"--max-side {max_side} --quality {config.quality} --workers {config.workers}:"
            " expected 1 … 65535, 1 … 100 and 0 or more"
        )
    if config.shard_images < 1:
        raise UserError(f"--shard-images {config.shard_images}: expected 1 or more")
    if not (0 <= config.holdout < 1 or (config.holdout > 0 and config.holdout % 1 == 0)):
        raise UserError(f"--holdout {config.holdout:g}: expected a share below 1, or a whole number of images")
    if config.holdout and config.out is not None and config.out.suffix == ".beton":
        raise UserError(f"--holdout makes train.beton and val.beton; give --out a folder, not {config.out}")
    tqdm.monitor_interval = 0  # its thread would keep the workers from being forked
    choosing = {
        "--classes": config.classes,
        "--holdout": config.holdout,
        "--unlabelled": config.unlabelled,
        "--max-side": config.max_side,
    }
    unfit = [flag for flag, value in choosing.items() if value]
    asked = Asked(config.workers, config.skip_unreadable, config.fresh, unfit)
    outs = adopt(config.source, config.out, config.split, asked) if config.source else []
    for out in outs:
        if config.format == "webdataset" and out.suffix == ".beton":
            shards.pack_shards(beton.open_beton(out), config.shard_images)
    jobs = [] if outs else _jobs(config)
    for source, out in jobs:
        note_count(source)
        convert(source, out, config)
        if config.format == "webdataset":
            shards.pack_shards(beton.open_beton(out), config.shard_images)
    if config.holdout and config.out is not None and jobs:
        note_shared_images(*(beton.open_beton(config.out / f"{split}.beton") for split in ("train", "val")))
    if config.verify:
        outs += [out for _, out in jobs]
        if not outs and config.out is not None:
            outs = sorted(config.out.glob("*.beton")) if config.out.is_dir() else [config.out]
        if not outs:
            raise UserError(f"{config.out} has no .beton file to verify")
        for out in outs:
            verify(shards.open_stored(out), config.workers)
            if config.format == "webdataset" and out.suffix == ".beton":
                verify(shards.open_shards(out.with_suffix(shards.SUFFIX)), config.workers)


if __name__ == "__main__":
    run_command(ConvertConfig, main)
