"""WebDataset tars: files of one name are a sample, an image and its label. They are read in place.

    root/*.tar, or one .tar          one split, unless the names have words: imagenet-train-000000.tar, …-val-…
    root/{train,val}/*.tar           also validation/, valid/, and test/ where nothing else is val

A sample's key is the path up to the first dot of the base name, the rest is what each of its files is:

    dir/0001.jpg, .png, .webp …      the image: one
    dir/0001.cls                     a class number or name; else
    dir/0001.json                    the first of FIELDS that is a number or a text; else
    dir/0001.txt                     a number or a class name; if most texts differ they are captions, no labels

Numbers are named by a classes.txt or classnames.txt beside the tars, if it has as many lines. ImageNet's own tars are
another kind (imagenet_tars.py).
"""

import functools
import json
import os
import re
import sys
from collections import Counter
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from pipeline.errors import UserError
from pipeline.storage.sources.folders import NOT_DATA, SUFFIXES
from pipeline.storage.sources.imagenet_tars import tar_members
from pipeline.storage.sources.source import SPLITS, UNLABELLED, Source, numbered_classes, open_file, text_lines

FIELDS = ("label", "cls", "class", "class_id", "target", "label_name")
_WORDS = {  # the first group that a name has
    "train": [{"train", "training"}],
    "val": [{"val", "valid", "validation"}, {"test"}],
    "unlabelled": [{"unlabelled", "unlabeled"}],
}
_TARS, _GZIPPED = (".tar",), (".tar.gz", ".tgz")
_IMAGENETS_OWN = re.compile(r"ILSVRC|n\d{8}\.tar")
_MEMBER = re.compile(r"((?:.*/)?[^/.]+)\.([^/]+)", re.DOTALL)
_NUMBER = re.compile(r"[+-]?\d{1,100}")

_Label = tuple[str, str] | None  # the file's suffix, and the text


class _Tar(NamedTuple):
    names: list[str]  # of the images, one a sample
    extents: list[tuple[int, int]]  # offset and size
    labels: list[_Label]
    left_out: Counter[str]


def find(root: Path, split: str) -> Path | None:
    """The folder of a split's tars."""
    tars = shards(root, split)
    return tars[0].parent if tars else None


def shards(root: Path, split: str) -> list[Path]:
    """The tars of a split, by name; with "" all those of a folder, or the one file, whatever their names."""
    if root.is_file():
        tars = [root] if root.name.endswith(_TARS + _GZIPPED) else []
    else:
        tars = _tars(root)
    if not split or (root.is_file() and not tars):
        return tars
    for words in _WORDS[split]:
        found = [tar for tar in tars if words & set(re.split("[^a-z]+", tar.name.lower()))]
        folders = [] if tars else [root / entry.name for entry in os.scandir(root) if entry.name.lower() in words]
        found += [tar for folder in sorted(folders) if folder.is_dir() for tar in _tars(folder)]
        if found:
            return found
    return []


def _tars(folder: Path) -> list[Path]:
    """The tars of a folder that is one of tars: without images or folders beside them."""
    tars = []
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name.lower()
            if name[0] == "." or entry.name in NOT_DATA:
                continue
            if entry.is_dir() or name.endswith(SUFFIXES) or _IMAGENETS_OWN.match(entry.name):
                return []
            if name.endswith(_TARS + _GZIPPED):
                tars.append(folder / entry.name)
    return sorted(tars)


def read(root: Path, split: str, folder: Path) -> Source:
    """Lists a split. Raises UserError for a tar that is not whole, and for samples without one image and one label."""
    files = shards(root, split) or shards(root, "")
    tars = [_listed(tar) for tar in files]
    names = [f"{path.name}/{name}" for path, tar in zip(files, tars, strict=True) for name in tar.names]
    if not names:
        raise UserError(
            f"{folder} has no images in its tars ({files[0].name} first); WebDataset's samples are expected"
        )
    labels = [label for tar in tars for label in tar.labels]
    others = [_listed(tar) for other in SPLITS if other != split for tar in shards(root, other)]
    where, left_out = files[0].parent, sum((tar.left_out for tar in tars), Counter())
    used = {*files, *(tar for other in SPLITS for tar in shards(root, other))}
    if unused := [tar.name for tar in shards(root, "") if tar not in used]:
        left_out[f"unused tars ({unused[0]} first)"] = len(unused)
    classes, numbers = _classes({where, root}, names, labels, [label for tar in others for label in tar.labels])
    return Source(
        kind="webdataset",
        split=split,
        classes=classes,
        names=names,
        labels=numbers,
        where=where,
        labelled=classes is not UNLABELLED,
        files=files,
        extents=np.array([(i, *extent) for i, tar in enumerate(tars) for extent in tar.extents], np.int64),
        left_out=left_out,
    )


def _listed(path: Path) -> _Tar:
    about = path.stat()
    return _read_tar(path, about.st_size, about.st_mtime_ns)


@functools.cache  # a split asks for the labels of the others, too
def _read_tar(path: Path, size: int, _: int) -> _Tar:
    with open_file(path) as file:
        if file.read(2) == b"\x1f\x8b":
            raise UserError(f"{path} is compressed with gzip; decompress it (gunzip) to read single images from it")
        listed = _Tar([], [], [], Counter())
        for key, parts in _samples(path, size, listed.left_out).items():
            images = [suffix for suffix in parts if f".{suffix.lower()}" in SUFFIXES]
            if len(images) != 1:
                raise UserError(
                    f"{path} has a sample {key!r} with {len(images)} images (its files: {', '.join(sorted(parts))});"
                    " one image a sample is expected"
                )
            try:
                label = _label(file, parts)
            except (ValueError, RecursionError) as error:  # no text, or no JSON
                raise UserError(
                    f"{path} has a label of {key!r} that cannot be read ({error}); write it again"
                ) from None
            listed.names.append(f"{key}.{images[0]}")
            listed.extents.append(parts[images[0]])
            listed.labels.append(label)
            listed.left_out.update(f".{s}" for s in parts if s != images[0] and (label is None or s != label[0]))
    return listed


def _samples(path: Path, size: int, left_out: Counter[str]) -> dict[str, dict[str, tuple[int, int]]]:
    """Key → suffix → offset and size, in the order of the tar."""
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    for member in tar_members(path, 0, size, left_out):
        found = _MEMBER.fullmatch(member.name.removeprefix("./"))
        if found is None:
            left_out["hidden or without suffix"] += 1
            continue
        if "\t" in member.name or "\n" in member.name:  # these part the columns and lines of x.files.tsv
            raise UserError(f"{path} has a tab or a line break in the name {member.name!r}; rename it")
        parts, suffix = samples.setdefault(found[1], {}), found[2]
        if suffix in parts:
            raise UserError(f"{path} has {member.name} twice; each key must be of one sample")
        parts[suffix] = (member.offset_data, member.size)
    return samples


def _label(file: BinaryIO, parts: dict[str, tuple[int, int]]) -> _Label:
    """Of one sample, by the rule at the head of this file; None if it has none. Raises ValueError."""
    for suffix in ("cls", "json", "txt"):
        if suffix in parts:
            file.seek(parts[suffix][0])
            text = file.read(parts[suffix][1]).decode().strip()
            if suffix != "json":
                return suffix, text
            about = json.loads(text)
            for value in [about.get(field) for field in FIELDS] if isinstance(about, dict) else []:
                if isinstance(value, float) and value.is_integer():
                    value = int(value)
                if isinstance(value, (int, str)) and not isinstance(value, bool):
                    return suffix, str(value).strip()
    return None


def _classes(
    folders: set[Path], names: list[str], own: list[_Label], others: list[_Label]
) -> tuple[list[str], np.ndarray]:
    """The classes of a split and the label of each of its images; numbers count over all splits."""
    given = [label for label in (*own, *others) if label]
    texts = [text for _, text in given]
    numbers = all(_NUMBER.fullmatch(text) for text in texts)
    captions = all(suffix == "txt" for suffix, _ in given) and not numbers and 2 * len(set(texts)) > len(texts)
    if captions:
        print(f"note: {names[0]} …: most of the texts differ, so they are captions and not labels", file=sys.stderr)
    if captions or not given:
        return UNLABELLED, np.zeros(len(own), np.int64)
    for name, label in zip(names, own, strict=True):
        if label is None or not label[1] or label[0] != given[0][0]:
            raise UserError(
                f"{min(folders)} has samples with a label in .{given[0][0]} and samples without it ({name} first);"
                " each needs its own"
            )
    own_texts = [label[1] for label in own if label]
    if numbers:
        classes = numbered_classes(min(folders), np.array([int(text) for text in texts]))
        return _named(folders, classes), np.array([int(text) for text in own_texts], np.int64)
    found = sorted(set(own_texts))
    index = {text: label for label, text in enumerate(found)}
    return found, np.array([index[text] for text in own_texts], np.int64)


def _named(folders: set[Path], numbers: list[str]) -> list[str]:
    """The names of the classes, if a file beside the tars has them."""
    for path in sorted(folder / name for folder in folders for name in ("classes.txt", "classnames.txt")):
        if path.is_file():
            lines = text_lines(path)
            if len(lines) == len(numbers) == len(set(lines)):
                return lines
            print(f"note: {path} has {len(set(lines))} names for {len(numbers)} classes: not used", file=sys.stderr)
    return numbers
