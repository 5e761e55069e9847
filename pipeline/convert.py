r"""Converts a dataset into .beton files, each with its manifest: in parallel, resumable, checked.

    python pipeline/convert.py --source IMAGES/train --out data/mine/train.beton
    python pipeline/convert.py --source IMAGES --out data/mine            train/ and val/ of IMAGES, classes compared
    python pipeline/convert.py --source IMAGES --out data/mine --format webdataset        tar shards as well
    python pipeline/convert.py --verify --out data/mine/train.beton       reads a finished file again and checks it

JPEGs that need no resize are kept byte for byte. Other formats are encoded again, of an animation the first frame. Of
images with more than 8 bits a value the upper 8 are kept; an image that would come out almost black is refused by name.

The result depends on the images and settings alone, not on --workers. After a stop at any moment, the same command
continues there and ends with the same bytes. If an image's size or time has changed since, the conversion starts again
at that image. What is not converted is counted in the last line and in the manifest.

Several processes or machines that see the same folders share a conversion, each with a part of the images:

    torchrun --nnodes=4 --nproc-per-node=1 … pipeline/convert.py --source IMAGES --out DIR      on each of four machines
    python pipeline/convert.py --source IMAGES --out DIR --part 0/4         … to --part 3/4, in any order, at any time
    sbatch --array=0-3 --wrap "python … --part \$SLURM_ARRAY_TASK_ID/\$SLURM_ARRAY_TASK_COUNT"

Each part is kept beside --out until all are complete, and each can be stopped and continued. The process that finds all
complete appends them to one file, with the bytes that one process would have written, and removes them; so the disk
needs room for all images twice. If that process is stopped too, any part's command continues. torchrun's agents leave
five minutes after their own process has ended, so that a longer end may have to be continued in this way.
"""

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import PIL
from tqdm import tqdm

from pipeline import constants
from pipeline.command import run_command
from pipeline.errors import UserError
from pipeline.one_writer import BusyError
from pipeline.storage import beton, parts, shards, store
from pipeline.storage.beton_writer import remove_leftovers, state_sha256
from pipeline.storage.conversion import Conversion, images_of, write_whole
from pipeline.storage.sources.open import open_source, split_names
from pipeline.storage.sources.source import Source, read_stamps
from pipeline.storage.verify import verify


@dataclass(frozen=True)
class ConvertConfig:
    """What to convert, to what, and how."""

    out: Path
    """The .beton file to write; or a folder, which gets train.beton and val.beton."""
    source: Path | None = None
    """The images: a folder with one folder a class, or one with train/ and val/ (or validation/) of these; ImageNet's
    own tar files; CIFAR-10, VOC2007, Places205 or iNaturalist 2018 as they are downloaded."""
    split: Literal["", "train", "val", "unlabelled"] = ""
    """Which split to convert, if --source has several."""
    format: Literal["beton", "webdataset"] = "beton"
    """webdataset: the .beton, and beside it tar shards of the same JPEGs, for other programs and --loader dali."""
    shard_images: int = 5000
    """Images in one shard."""
    max_side: int = 500
    """Images with a longer side are resized to this many pixels and encoded again."""
    quality: int = 90
    """JPEG quality of images that are encoded again."""
    check: Literal["quick", "full"] = "quick"
    """How a JPEG is checked before it is kept. quick: its markers and its first pixels (0.2 ms); full: all of it is
    decoded (2 ms)."""
    workers: int = 0
    """Worker processes; 0 for one a core. The result does not depend on it."""
    skip_unreadable: bool = False
    """Leave out images that cannot be read, and list them in the manifest, instead of stopping at the first."""
    part: str = ""
    """K/N: convert part K, counted from 0, of N parts; other processes convert the others (see above)."""
    fresh: bool = False
    """Start again: an existing file, finished or not, is removed first."""
    verify: bool = False
    """Read the finished file again and check the checksum of every image, and that it decodes."""


def _how(config: ConvertConfig) -> store.How:
    return store.How(config.max_side, config.quality, decode_all=config.check == "full")


def _settings(config: ConvertConfig) -> dict:
    return {"max_side_px": config.max_side, "quality": config.quality, "check": config.check}


def _identity(source: Source, config: ConvertConfig) -> dict:
    """What decides the bytes of the result. The place of the source does not."""
    listing = hashlib.sha256("\n".join([*source.classes, "", *source.names]).encode("utf-8", "surrogateescape"))
    listing.update(source.labels.astype("<i8").tobytes())
    return {**_settings(config), "kind": source.kind, "listing_sha256": listing.hexdigest(), "pillow": PIL.__version__}


def _already_there(out: Path, identity: dict, source: Source) -> bool:
    """Whether `out` is this conversion, finished. Raises UserError if it is another one's, or of other images."""
    if not out.exists():
        return False
    try:
        manifest = beton.open_beton(out).manifest
        found = manifest["identity"]
    except (UserError, KeyError) as error:
        raise UserError(f"{out} exists and is not in order ({error}); pass --fresh to replace it") from None
    for key in identity.keys() - {"pillow"}:
        if found.get(key) != identity[key]:
            raise UserError(
                f"{out} exists with {key} {found.get(key)}, asked for is {identity[key]}; pass --fresh to replace it"
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
    parts.remove_parts(out)
    print(f"{out} is already converted; nothing to do (compared: {compared})")
    return True


def convert(source: Source, out: Path, config: ConvertConfig) -> bool:
    """One split into one file, or a part of it; whether the file is there.

    Raises UserError for an unreadable image, a full disk, a file of another conversion.
    """
    part, identity = parts.chosen_part(config.part, os.environ), _identity(source, config)
    out.parent.mkdir(parents=True, exist_ok=True)
    if not config.fresh and _already_there(out, identity, source):
        return True
    conversion = Conversion(
        source=source,
        out=out,
        identity=identity,
        settings=_settings(config),
        how=_how(config),
        workers=config.workers,
        skip_unreadable=config.skip_unreadable,
        fresh=config.fresh,
    )
    if part:
        parts.write_part(conversion, part)
        return parts.put_together(conversion, part, lambda: _already_there(out, identity, source))
    with images_of(conversion) as images:
        write_whole(conversion, images)
    parts.remove_parts(out)
    return True


# ---- the command ----


def _jobs(config: ConvertConfig) -> list[tuple[Source, Path]]:
    """The conversions asked for. Splits of one dataset must have the same classes, checked before any starts."""
    if config.source is None:
        return []
    if config.out.suffix == ".beton":
        return [(open_source(config.source, config.split), config.out)]
    splits = [config.split] if config.split else split_names(config.source)
    if not splits:
        raise UserError(
            f"{config.source} has no train/ or val/; give --out a file name that ends with .beton, not {config.out}"
        )
    opened = [open_source(config.source, split) for split in splits]
    for other in opened[1:]:
        beton.require_same_classes(str(opened[0].where), opened[0].classes, str(other.where), other.classes)
    return [(source, config.out / f"{source.split}.beton") for source in opened]


def _note_count(source: Source) -> None:
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
    part = parts.chosen_part(config.part, os.environ)
    if part and config.fresh:
        raise UserError(
            f"--fresh with --part {part}: one part would remove what others made; remove {config.out} and what lies"
            " beside it, or choose another --out"
        )
    if config.shard_images < 1:
        raise UserError(f"--shard-images {config.shard_images}: expected 1 or more")
    tqdm.monitor_interval = 0  # its thread would keep the workers from being forked
    jobs, outs = _jobs(config), []
    for source, out in jobs:
        _note_count(source)
        if not convert(source, out, config):
            continue  # the process that puts its parts together does the rest
        if config.format == "webdataset":
            try:
                shards.pack_shards(beton.open_beton(out), config.shard_images)
            except BusyError as error:
                if not part:
                    raise
                print(f"note: {error}")
                continue
        outs.append(out)
    if config.verify:
        if not jobs:
            outs = sorted(config.out.glob("*.beton")) if config.out.is_dir() else [config.out]
            if not outs:
                raise UserError(f"{config.out} has no .beton file to verify")
        for out in outs:
            verify(beton.open_beton(out), config.workers)
            if config.format == "webdataset":
                verify(shards.open_shards(out.with_suffix(shards.SUFFIX)), config.workers)


if __name__ == "__main__":
    run_command(ConvertConfig, main)
