r"""Converts a dataset into .beton files, each with its manifest: in parallel, resumable, checked.

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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import PIL

from pipeline.command import run_command
from pipeline.errors import UserError, system_errors
from pipeline.one_writer import BusyError
from pipeline.storage import beton, parts, shards, store
from pipeline.storage.adopt import Asked, adopt
from pipeline.storage.beton_writer import remove_leftovers, state_sha256
from pipeline.storage.conversion import Conversion, images_of, write_whole
from pipeline.storage.sources.selection import (
    hold_out,
    note_count,
    of_classes,
    of_imagenet,
    open_splits,
    require_fitting,
)
from pipeline.storage.sources.source import Source, read_stamps
from pipeline.storage.verify import note_shared_images, verify


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
    """A file that names the classes to convert, one at the beginning of each line, or all in one line; None: all of
    them."""
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
    part: str = ""
    """K/N: convert part K, counted from 0, of N parts; other processes convert the others (see above)."""
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
    parts.remove_parts(out)
    print(f"{out} is already converted; nothing to do (compared: {compared})")
    return True


def convert(source: Source, out: Path, config: ConvertConfig) -> bool:
    """One split into one file, or a part of it; whether the file is there.

    Raises UserError for an unreadable image, a full disk, a file of another conversion.
    """
    if config.max_side is None and of_imagenet(source) and "val" in (source.split, out.stem, source.where.name):
        config = replace(config, max_side=store.ANY_SIDE_PX)
    part, identity = parts.chosen_part(config.part, os.environ), _identity(source, config)
    with system_errors(str(out.parent), "give another folder with --out"):
        out.parent.mkdir(parents=True, exist_ok=True)
    if not config.fresh and _already_there(out, identity, source):
        return True
    conversion = Conversion(
        source=source,
        out=out,
        identity=identity,
        settings=_settings(source, config),
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


@system_errors("the converter", "repair that and run the same command again")
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
    part = parts.chosen_part(config.part, os.environ)
    if part and config.fresh:
        raise UserError(
            f"--fresh with --part {part}: one part would remove what others made; remove {config.out} and what lies"
            " beside it, or choose another --out"
        )
    if config.shard_images < 1:
        raise UserError(f"--shard-images {config.shard_images}: expected 1 or more")
    if not (0 <= config.holdout < 1 or (config.holdout > 0 and config.holdout % 1 == 0)):
        raise UserError(f"--holdout {config.holdout:g}: expected a share below 1, or a whole number of images")
    if config.holdout and config.out is not None and config.out.suffix == ".beton":
        raise UserError(f"--holdout makes train.beton and val.beton; give --out a folder, not {config.out}")
    choosing = {
        "--classes": config.classes,
        "--holdout": config.holdout,
        "--unlabelled": config.unlabelled,
        "--max-side": config.max_side,
        "--part, or torchrun": part,
    }
    unfit = [flag for flag, value in choosing.items() if value]
    asked = Asked(config.workers, config.skip_unreadable, config.fresh, unfit)
    outs = adopt(config.source, config.out, config.split, asked) if config.source else []
    for out in outs:
        if config.format == "webdataset" and out.suffix == ".beton":
            shards.pack_shards(beton.open_beton(out), config.shard_images)
    jobs = [] if outs else _jobs(config)
    if part:
        for source, _ in jobs:  # a val with too few images is refused before hours of train
            parts.require_images(source, part)
    for source, out in jobs:
        note_count(source)
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
    if config.holdout and len(outs) == 2:
        note_shared_images(*map(beton.open_beton, outs))
    if config.verify:
        if not (outs or jobs) and config.out is not None:
            outs = sorted(config.out.glob("*.beton")) if config.out.is_dir() else [config.out]
            if not outs:
                raise UserError(f"{config.out} has no .beton file to verify")
        for out in outs:
            verify(shards.open_stored(out), config.workers)
            if config.format == "webdataset" and out.suffix == ".beton":
                verify(shards.open_shards(out.with_suffix(shards.SUFFIX)), config.workers)


if __name__ == "__main__":
    run_command(ConvertConfig, main)
