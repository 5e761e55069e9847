"""Parquet files as Hugging Face's datasets have them: a row is an image file's bytes, its path and its label.

    root/*.parquet    root/data/*.parquet    root/<split>/*.parquet    root/data/<split>/*.parquet    one file

A split is a word in the name of a file (train-00000-of-00014.parquet) or of its folder; test stands for val where there
is no validation. Where no file has one, all are train. Order: files by name, rows as they lie there.

    images    the column with `bytes` inside (or of plain bytes), of several the one called image or img
    labels    a ClassLabel, whose names are in the schema; else whole numbers or texts in a column of a usual name

Listing reads schemas, labels and paths, and never an image. A worker keeps one row group, of which it uses its own
chunks of images: there must be memory for as many groups as workers.
"""

import contextlib
import functools
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline.errors import BAD_BYTES, UserError
from pipeline.storage.sources.source import UNLABELLED, Place, Source, Stamp, open_file

# Words in the names of files and folders, as Hugging Face reads them; of val's the first that is there counts.
_WORDS = {
    "train": ("train", "training"),
    "val": ("validation", "valid", "val", "dev", "test", "eval"),
    "unlabelled": ("unlabelled", "unlabeled", "unsupervised"),
}
_ALL_WORDS = [word for words in _WORDS.values() for word in words]
_LABELS = ("label", "labels", "fine_label", "cls", "class", "target")
_MOST_ROWS = 10**8  # in one file
_SHARD = re.compile(r"(.*)-(\d+)-of-(\d+)(?:-[0-9a-f]{16})?")  # older files have a digest at the end


class _Columns(NamedTuple):
    """Where in a row things are, with a dot before a part of a column; "" for what there is not."""

    image: str
    path: str
    label: str
    names: tuple[str, ...]  # the classes, if the schema names them


def find(root: Path, split: str) -> Path | None:
    """Where the files are: root, which may be one of them, or data/ in it."""
    return next((base for base in (root, root / "data") if _files(base, split)[0]), None)


def read(root: Path, split: str, base: Path) -> Source:
    """Lists a split. Raises UserError for missing or damaged files, unclear columns, labels that are no class."""
    files, left_out = _files(base, split)
    _require_all_shards(files)
    columns = _columns(files[0])
    names: list[str] = []
    values: list[int | str | None] = []
    extents = []
    for number, path in enumerate(files):
        if _columns(path) != columns:
            raise UserError(f"{path} has other columns or classes than {files[0]}; convert them apart")
        _require_images(path, columns)
        paths = _values(path, columns.path)
        bases = (os.path.basename(found or "") for found in paths)
        names += [f"{path.stem}/{row:07d}/{name or f'{row:07d}'}" for row, name in enumerate(bases)]
        values += _values(path, columns.label)
        rows, size_bytes = np.arange(len(paths)), path.stat().st_size
        extents.append(np.stack([np.full_like(rows, number), rows, np.full_like(rows, size_bytes)], 1))
    if not names:
        raise UserError(f"{base} has no rows; download its files again")
    classes, index = _classes(base, columns)
    labels = np.array([index.get(value, -1) for value in values], np.int64)
    if (labels < 0).any():
        first = int(labels.argmin())
        raise UserError(
            f"{base} has the label {values[first]!r} at {names[first]}, which is none of its {len(classes)} classes;"
            " convert another split alone with --split, or mend the labels"
        )
    return Source(
        "parquet",
        split,
        classes,
        names,
        labels,
        root,
        labelled=bool(columns.label),
        files=files,
        extents=np.concatenate(extents),
        read=read_row,
        left_out=left_out,
    )


def read_row(place: Place) -> tuple[bytes, Stamp]:
    """The image in a row, and size and time of its file; `place` is (file, row, size of the file)."""
    path, row, _ = place
    about = os.stat(path)
    stamp = about.st_size, about.st_mtime_ns
    with _reading(f"{path}, row {row},"):
        ends = _opened(path, stamp)[2]
        group = int(np.searchsorted(ends, row, "right"))
        content = _row_group(path, stamp, group)[row - int(ends[group])].as_py()  # counted from the group's end
    if content is None:
        raise _no_bytes(path)
    return content, stamp


# ---- which files, which columns ----


def _files(base: Path, split: str) -> tuple[list[Path], Counter[str]]:
    """A split's files, and what lies beside them: by names alone."""
    by_word = _files_by_word(base)
    if not any(by_word.get(word) for word in _ALL_WORDS):
        return (by_word.get("", []) if split == "train" else []), Counter()
    used = {name: [w for w in words if by_word.get(w)] for name, words in _WORDS.items()}
    used["val"] = used["val"][:1]  # not test beside validation
    files = [path for word in used[split] for path in by_word[word]]
    taken = {word for words in used.values() for word in words}
    beside = {word: len(paths) for word, paths in by_word.items() if word not in taken}
    return files, Counter({f"{word}.parquet beside the splits": count for word, count in beside.items()})


def _files_by_word(base: Path) -> dict[str, list[Path]]:
    """Parquet files by the word that says their split, "" for none."""
    by_word: dict[str, list[Path]] = {}
    folders = [base / word for word in _ALL_WORDS if (base / word).is_dir()]
    if base.is_file():
        found = [base] if base.suffix == ".parquet" else []
    else:
        found = sorted(path for path in base.glob("*.parquet") if path.name[0] not in "._")
        inside = [path for folder in folders for path in sorted(folder.glob("*.parquet")) if path.name[0] not in "._"]
        if found and not inside:  # tables beside folders of images, such as metadata.parquet, are no dataset
            others = [entry for entry in os.scandir(base) if entry.is_dir() and entry.name[0] != "."]
            found = [] if folders else [path for path in found if _word(path.stem) or not others]
        found = [path for path in found + inside if not path.with_suffix(".tar").exists()]  # img2dataset's tables
    for path in found:
        by_word.setdefault(_word(path.stem) or (path.parent.name if path.parent in folders else ""), []).append(path)
    return by_word


def _word(name: str) -> str:
    return next((part for part in re.split(r"[^a-z]+", name.lower()) if part in _ALL_WORDS), "")


def _require_all_shards(files: list[Path]) -> None:
    """Raises UserError where "…-00003-of-00014" says that there are more files."""
    numbered: dict[tuple[Path, str, int], set[int]] = {}
    for path in files:
        if found := _SHARD.fullmatch(path.stem):
            numbered.setdefault((path.parent, found[1], int(found[3])), set()).add(int(found[2]))
    for (folder, name, count), numbers in numbered.items():
        if lacking := sorted(set(range(count)) - numbers):
            raise UserError(
                f"{folder} lacks {len(lacking)} of the {count} files {name}-… ({lacking[0]:05d} first); download them"
            )


def _columns(path: Path) -> _Columns:
    """Raises UserError where it is not clear which columns are meant."""
    schema, types = _schema(path), _arrow().types
    parts = {f.name: {part.name: part.type for part in f.type} if types.is_struct(f.type) else {} for f in schema}
    images = {name: f"{name}.bytes" for name, inside in parts.items() if _is_bytes(inside.get("bytes"))}
    images = images or {f.name: f.name for f in schema if _is_bytes(f.type)}
    image = _the_one(path, "image bytes", list(images), ("image", "img"))
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
        named = {
            name: tuple(os.fspath(text) for text in feature["names"])  # fails if one is no text
            for name, feature in features.items()
            if name in parts and isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except BAD_BYTES as error:
        raise UserError(
            f"{path} has a description of its columns (huggingface) that cannot be read ({error!r}); download it again"
        ) from None
    of_labels = [f.name for f in schema if _is_label(f.type)]
    candidates = [name for name in named if name in of_labels] or [name for name in of_labels if name in _LABELS]
    label = _the_one(path, "labels", candidates, ("label", "labels", "fine_label")) if candidates else ""
    with_path = _is_text(parts[image].get("path"))
    return _Columns(images[image], f"{image}.path" if with_path else "", label, named.get(label, ()))


def _is_bytes(kind: Any) -> bool:
    return kind is not None and (_arrow().types.is_binary(kind) or _arrow().types.is_large_binary(kind))


def _is_text(kind: Any) -> bool:
    return kind is not None and (_arrow().types.is_string(kind) or _arrow().types.is_large_string(kind))


def _is_label(kind: Any) -> bool:
    kind = kind.value_type if _arrow().types.is_dictionary(kind) else kind
    return _arrow().types.is_integer(kind) or _is_text(kind)


def _the_one(path: Path, what: str, columns: list[str], preferred: tuple[str, ...]) -> str:
    chosen = columns if len(columns) == 1 else [name for name in preferred if name in columns]
    if chosen:
        return chosen[0]
    found = f"the columns {', '.join(columns)}, any of which could hold {what}" if columns else f"no column of {what}"
    every = ", ".join(_schema(path).names)
    raise UserError(f"{path} has {found} (all: {every}); write it again with one, called {preferred[0]}")


def _classes(base: Path, columns: _Columns) -> tuple[list[str], dict[int | str | None, int]]:
    """The classes, and what in the column of labels stands for each. Of values without names, those of all splits."""
    if not columns.label:
        print(f"note: no column of {base}'s files has labels, so its images are unlabelled", file=sys.stderr)
        return UNLABELLED, {None: 0}
    if columns.names:  # ImageNet has two kinds of "crane"
        count = Counter(columns.names)
        distinct = [f"{name} ({i})" if count[name] > 1 else name for i, name in enumerate(columns.names)]
        return distinct, {i: i for i in range(len(distinct))}
    files = [path for split in _WORDS for path in _files(base, split)[0] if _columns(path).label == columns.label]
    values = {value for path in files for value in _values(path, columns.label)}
    if len({type(value) for value in values if value is not None}) > 1:
        raise UserError(f"{base} has labels that are numbers in one file and texts in another; write them alike")
    known = sorted(value for value in values if value is not None and (isinstance(value, str) or value >= 0))
    return [str(value) for value in known], {value: i for i, value in enumerate(known)}


# ---- what is in a file ----


def _arrow() -> Any:
    """pyarrow, which only this kind of dataset needs."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError("parquet files are read by pyarrow, which is not installed; pip install pyarrow") from None
    return pyarrow


@contextlib.contextmanager
def _reading(what: str) -> Iterator[None]:
    """What pyarrow says of a damaged file, as a UserError."""
    try:
        yield
    except UserError:
        raise
    except (_arrow().ArrowException, *BAD_BYTES, OSError) as error:
        found = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{what} cannot be read ({found}); download it again (in a git clone: git lfs pull)") from None


def _open(path: str | Path) -> Any:
    """Without threads of pyarrow's own: the converter's workers are forked."""
    with _reading(str(path)):
        open_file(path).close()  # fails if it is a pipe
        file = _arrow().parquet.ParquetFile(path, pre_buffer=False)
        rows = sum(file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups))
        if not rows == file.metadata.num_rows <= _MOST_ROWS:
            raise ValueError(f"it counts {file.metadata.num_rows} rows, its groups have {rows}")
        return file


def _schema(path: Path) -> Any:
    with _reading(str(path)):
        return _open(path).schema_arrow


def _values(path: Path, leaf: str) -> list[Any]:
    """All values of a column, or of a part of one; None for each row if `leaf` is empty."""
    file = _open(path)
    if not leaf:
        return [None] * file.metadata.num_rows
    with _reading(str(path)):
        return file.read(columns=[leaf], use_threads=False).flatten().column(0).to_pylist()


def _require_images(path: Path, columns: _Columns) -> None:
    """Raises UserError where the file counts images without bytes."""
    with _reading(str(path)):
        about = _open(path).metadata
        for group in range(about.num_row_groups):
            chunks = [about.row_group(group).column(i) for i in range(about.num_columns)]
            if any(c.path_in_schema == columns.image and c.statistics and c.statistics.null_count for c in chunks):
                raise _no_bytes(path)


def _no_bytes(path: str | Path) -> UserError:
    return UserError(
        f"{path} has the paths of images and not their bytes; give --source the folder that has these images, or write"
        " the file again with the images embedded"
    )


@functools.lru_cache(maxsize=1)
def _opened(path: str, stamp: Stamp) -> tuple[Any, str, np.ndarray]:
    """An open file, its column of images, and the row after each of its row groups; `stamp` tells another file."""
    file = _open(path)
    sizes = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
    return file, _columns(Path(path)).image, np.cumsum(sizes)


@functools.lru_cache(maxsize=1)
def _row_group(path: str, stamp: Stamp, group: int) -> Any:
    """The images of one row group."""
    file, leaf, _ = _opened(path, stamp)
    return file.read_row_group(group, columns=[leaf], use_threads=False).flatten().column(0)
