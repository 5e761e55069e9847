"""Datasets of other programs, used where they lie: every image is read once and checked, and nothing is copied.

    x.beton, FFCV's         ─▶ x.manifest.json, x.files.tsv                      for every loader
    *.tar, WebDataset's     ─▶ x.shards.json, x.shards.npy, x.files.tsv          for --loader dali

They are written last, and only if all is well. "adopted" in the manifest has the name, size and time of each file that
it describes: after a change it must be made again. FFCV neither names its images nor its classes: here they are
000000000, 000000001, … and "0", "1", …
"""

import contextlib
import hashlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.disk import write_whole
from pipeline.errors import UserError
from pipeline.progress import progress
from pipeline.storage import beton, shards, store
from pipeline.storage.ffcv_file import MODE_JPEG, read_tables
from pipeline.storage.kept_images import kept_images
from pipeline.storage.sources.open import open_source, split_names
from pipeline.storage.sources.selection import require_fitting
from pipeline.storage.sources.source import UNLABELLED, Source, numbered_classes
from pipeline.storage.verify import DAMAGED, check_images
from pipeline.storage.workers import Workers


class Asked(NamedTuple):
    """How to do it."""

    workers: int
    skip_unreadable: bool
    fresh: bool
    unfit: list[str]  # flags that were given and choose or change images, which only a conversion does


def adopt(source: Path, out: Path | None, split: str, asked: Asked) -> list[Path]:
    """Makes usable what is used where it lies; [] if it is to be converted. Returns what to open."""
    if source.suffix in (".beton", ".ffcv") and source.is_file():
        _require_whole(source, asked, "")
        return [adopt_ffcv(source, out, split, asked)]
    if out is not None:
        return []
    sources = [open_source(source, name) for name in ([split] if split else split_names(source) or [""])]
    require_fitting(sources)
    if sources[0].kind != "webdataset":
        raise UserError(
            f"--out is missing: the .beton that {source} is converted to, or a folder for it; only an FFCV file and"
            " WebDataset tars are used where they lie"
        )
    _require_whole(source, asked, ", or give --out to convert it")
    return [adopt_tars(one, asked) for one in sources]


def _require_whole(source: Path, asked: Asked, otherwise: str) -> None:
    if asked.unfit:
        flags = ", ".join(asked.unfit)
        raise UserError(f"{source} is used where it lies, whole and as it is; leave out {flags}{otherwise}")


def _state(files: list[Path]) -> list[list]:
    """By which a change is noticed: name, size in bytes and time in ns of each file."""
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _is_done(manifest: Path, opened: Callable[[], beton.Stored], files: list[Path], fresh: bool) -> bool:
    """Whether the dataset is there, of these files as they are. Raises UserError if they have changed since."""
    if not manifest.exists():
        return False
    try:
        dataset = opened()
    except UserError as error:
        if not fresh:
            raise UserError(f"{error}; or pass --fresh to make {manifest.name} again") from None
        return False
    before = dataset.manifest.get("adopted")
    if before is None:
        print(f"{dataset.path} is already converted; nothing to do")
        return True
    if fresh:
        return False
    if before != _state(files):
        raise UserError(
            f"{manifest} is of other files, or they have changed since (size or time); pass --fresh to make it again"
        )
    print(f"{dataset.path} is already adopted; nothing to do (compared: size and time)")
    return True


def _require_place(path: Path, other: Path) -> None:
    """Before minutes of reading. `other` is the dataset that would have the same x.files.tsv."""
    if not os.access(next(place for place in path.absolute().parents if place.exists()), os.W_OK):
        raise UserError(f"{path.parent} cannot be written to; give --out a name in another folder")
    if other.exists():
        raise UserError(f"{other} is there, whose {beton.files_path(other).name} would be replaced; move one of them")


def _publish(contents: dict[Path, bytes], link: Path | None = None, target: Path | None = None) -> None:
    """Writes these files, the manifest last, and the link before. After an error or Ctrl-C none of them is there."""
    *_, manifest = contents
    try:
        manifest.parent.mkdir(parents=True, exist_ok=True)
        manifest.unlink(missing_ok=True)  # an old one, from here on of other files
        if link is not None and target is not None:
            link.unlink(missing_ok=True)
            link.symlink_to(target.resolve())
        for path, content in contents.items():
            write_whole(path, content)
    except BaseException:
        for path in (*contents, *([link] if link else [])):
            path.unlink(missing_ok=True)
        raise


def _file_list(rows: Iterable[tuple]) -> bytes:
    """`x.files.tsv` of (label, how it is stored, sha256, name) of each sample."""
    lines = ("\t".join(map(str, (sample, *row))) for sample, row in enumerate(rows))
    return ("\n".join(["sample\tlabel\tstored\tsha256\tfile", *lines]) + "\n").encode("utf-8", "surrogateescape")


def _as_json(manifest: dict) -> bytes:
    return (json.dumps(manifest, indent=1) + "\n").encode()


# ---- FFCV ----


def adopt_ffcv(path: Path, out: Path | None, split: str, asked: Asked) -> Path:
    """A dataset of an FFCV file: itself, or the link `out` to it. Returns the path to open.

    Raises UserError for a file that is not whole, labels that are none, and an image that cannot be decoded.
    """
    out = _ffcv_out(path, out, split, asked.fresh)
    if _is_done(beton.manifest_path(out), lambda: beton.open_beton(out), [path], asked.fresh):
        return out
    _require_place(out, out.with_suffix(shards.SUFFIX))
    state, tables = _state([path]), read_tables(path)
    classes = UNLABELLED if tables.label is None else numbered_classes(path, tables.labels)
    stored = beton.mapped_beton(path, tables, {"classes": classes})
    digests, damaged = _check_all(stored, asked)
    if _state([path]) != state:
        raise UserError(f"{path} changed while it was read; run again when that is over")
    how = np.where(stored.modes == MODE_JPEG, store.HOW[store.KEPT], store.HOW[store.RAW]).astype(object)
    how[damaged] = DAMAGED
    rows = zip(stored.labels.tolist(), how, digests, [f"{i:09d}" for i in range(len(stored))], strict=True)
    files = _file_list(rows)
    counts = np.bincount(stored.labels, minlength=len(classes)).tolist()
    manifest = {
        "format_version": beton.FORMAT_VERSION,
        "images": len(stored),
        "bytes": len(stored.data),
        "classes": classes,
        **({} if tables.label is not None else {"labelled": False}),
        "images_by_class": dict(zip(classes, counts, strict=True)),
        "source": {"kind": "ffcv", "split": split, "images": len(stored)},
        "fields": tables.fields,
        "label_field": tables.label,
        "adopted": state,
        "stored": {name: int((how == name).sum()) for name in ("kept", "raw", DAMAGED)},
        "damaged": [f"{sample:09d}" for sample in damaged],
        "tables_sha256": beton.tables_sha256(tables.head, tables.samples, tables.allocations),
        "files_sha256": hashlib.sha256(files).hexdigest(),
    }
    link = None if out.exists() and out.samefile(path) else out
    _publish({beton.files_path(out): files, beton.manifest_path(out): _as_json(manifest)}, link, path)
    print(
        f"{out}: {len(stored)} images from field {tables.fields[0]!r}, {len(damaged)} of them damaged,"
        + (" without labels" if tables.label is None else f" {len(classes)} classes from field {tables.label!r}")
        + "; used where it lies, nothing was copied"
    )
    return out


def _ffcv_out(path: Path, out: Path | None, split: str, fresh: bool) -> Path:
    """The dataset's path. Raises UserError if another file is there."""
    if out is None:
        out = path
    elif out.suffix != ".beton" and split:
        out = out / f"{split}.beton"
    if out.suffix != ".beton":
        raise UserError(f"{out} does not end in .beton; give --out NAME.beton, which becomes a link to {path}")
    if os.path.lexists(out) and not (out.exists() and out.samefile(path)) and not (fresh and out.is_symlink()):
        raise UserError(f"{out} exists and is not a link to {path}; choose another --out")
    converted = out != path and path.suffix == ".beton" and beton.manifest_path(path).exists()
    if converted and "adopted" not in beton.open_beton(path).manifest:
        raise UserError(f"{path} is already converted; give it to --data as it is, without a link")
    return out


def _check_all(stored: beton.Beton, asked: Asked) -> tuple[list[str], list[int]]:
    """The sha256 of each image, and which are damaged; in the order of the file, read once."""
    digests, damaged = [""] * len(stored), []
    order = np.argsort(stored.offsets)
    with contextlib.closing(check_images(stored, order, asked.workers)) as checked:
        results = progress(checked, stored.path.name, len(stored), unit="image")
        for sample, (digests[sample], problem) in zip(order.tolist(), results, strict=True):
            if problem and not asked.skip_unreadable:
                raise UserError(
                    f"image {sample} of {stored.path} cannot be decoded: {problem}; get a good copy of the file, or"
                    " pass --skip-unreadable and train with --on-bad-image substitute"
                )
            if problem:
                damaged.append(sample)
                print(f"damaged: image {sample} of {stored.path} ({problem})", file=sys.stderr)
    if len(damaged) == len(stored):
        raise UserError(
            f"none of the {len(stored)} images of {stored.path} can be decoded; get a good copy of the file"
        )
    return digests, sorted(damaged)


# ---- tars ----


def adopt_tars(source: Source, asked: Asked) -> Path:
    """The shards' manifest of a split's WebDataset tars, beside them. Its path is the --data of a loader.

    Raises UserError for an image that cannot be read, and for one that is not a JPEG as a .beton keeps it.
    """
    folder = source.files[0].parent
    name = source.split or (source.files[0].stem if len(source.files) == 1 else folder.resolve().name)
    path = folder / f"{name}{shards.SUFFIX}"
    if _is_done(path, lambda: shards.open_shards(path), source.files, asked.fresh):
        return path
    _require_place(path, folder / f"{name}.beton")
    state, how = _state(source.files), store.How(store.ANY_SIDE_PX, 90, decode_all=True)
    index, rows, skipped = np.zeros(len(source), shards.ROW), [], []
    with Workers(asked.workers) as workers, contextlib.closing(kept_images(source, 0, how, workers)) as kept:
        for i, (image, _) in enumerate(progress(kept, path.name, len(source), unit="image")):
            if isinstance(image, str):
                if not asked.skip_unreadable:
                    raise UserError(
                        f"{folder / source.names[i]} is not a readable image ({image}); repair it, or pass"
                        " --skip-unreadable"
                    )
                skipped.append(i)
                continue
            if image.how != store.KEPT:
                raise UserError(
                    f"{folder / source.names[i]} is not an upright greyscale or RGB JPEG, and only those can be read"
                    " where they lie; give --out to convert it"
                )
            shard, offset, size = source.extents[i]  # type: ignore[index]
            index[i] = (shard, offset, size, image.height, image.width, source.labels[i])
            rows.append((source.labels[i], "kept", image.sha256.hex(), source.names[i]))
    if len(skipped) == len(source):
        raise UserError(f"none of the {len(source)} images of {folder} can be read; nothing was written")
    if _state(source.files) != state:
        raise UserError(f"{folder} changed while it was read; run again when that is over")
    buffer, files = io.BytesIO(), _file_list(rows)
    np.save(buffer, np.delete(index, skipped))
    index_sha256 = hashlib.sha256(buffer.getbuffer()).hexdigest()
    manifest = {
        "format_version": shards.FORMAT_VERSION,
        "images": len(source) - len(skipped),
        "classes": source.classes,
        **({} if source.labelled else {"labelled": False}),
        "tars": [file.name for file in source.files],
        "shard_bytes": [size for _, size, _ in state],
        "source": {"kind": source.kind, "split": source.split, "images": len(source)},
        "left_out": dict(sorted(source.left_out.items())),
        "skipped": [source.names[i] for i in skipped],
        "adopted": state,
        "tables_sha256": index_sha256,  # where a .beton's would be: of sizes, labels and places
        "index_sha256": index_sha256,
        "files_sha256": hashlib.sha256(files).hexdigest(),
    }
    index_path = path.with_name(f"{name}.shards.npy")
    _publish({index_path: buffer.getvalue(), beton.files_path(path): files, path: _as_json(manifest)})
    classes = f"{len(source.classes)} classes" if source.labelled else "without labels"
    left_out = ", ".join(f"{count} {what}" for what, count in sorted(source.left_out.items()))
    print(
        f"{path}: {manifest['images']} images, {classes}, {len(skipped)} skipped, in {len(state)} tars"
        f"{f'; left out: {left_out}' if left_out else ''}; used where they lie (--loader dali), nothing was copied"
    )
    return path
