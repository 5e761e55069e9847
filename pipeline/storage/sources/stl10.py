"""STL-10 as downloaded: train, val (its test images) and 100,000 images without labels. Nothing is read at once.

root[/stl10_binary]/{train,test,unlabeled}_X.bin      (N, 3, 96, 96) bytes, in each colour column after column
root[/stl10_binary]/{train,test}_y.bin                a byte an image, 1 … 10
"""

from pathlib import Path

import numpy as np

from pipeline import constants
from pipeline.errors import UserError
from pipeline.storage.mapped import map_file
from pipeline.storage.sources.source import UNLABELLED, Source

_NAMES = {"train": "train", "val": "test", "unlabelled": "unlabeled"}  # as the files are called
_SIDE_PX = 96


def find(root: Path, split: str) -> Path | None:
    """The file of a split's pixels."""
    paths = (folder / f"{_NAMES[split]}_X.bin" for folder in (root / "stl10_binary", root))
    return next((path for path in paths if path.is_file()), None)


def read(root: Path, split: str, path: Path) -> Source:
    """The images of a split. Raises UserError for files of another size than the published, or other labels."""
    count, labelled = constants.STL10_IMAGES[split], split != "unlabelled"
    shape = (count, 3, _SIDE_PX, _SIDE_PX)
    _require_bytes(path, int(np.prod(shape)))
    pixels = np.asarray(map_file(path)).reshape(shape).transpose(0, 3, 2, 1)  # a view: still on disk
    labels, classes = np.zeros(count, np.int64), UNLABELLED
    if labelled:
        path_y = path.with_name(f"{_NAMES[split]}_y.bin")
        _require_bytes(path_y, count)
        labels, classes = np.fromfile(path_y, np.uint8).astype(np.int64) - 1, list(constants.STL10_CLASSES)
        if np.bincount(labels + 1, minlength=11).tolist() != [0] + [count // 10] * 10:
            raise UserError(f"{path_y} has not {count // 10} images of each of 10 classes; unpack STL-10 again")
    names = [f"{split}/{i:06d}" for i in range(count)]
    return Source("stl-10", split, classes, names, labels, path.parent, labelled=labelled, pixels=pixels)


def _require_bytes(path: Path, size_bytes: int) -> None:
    found = path.stat().st_size if path.is_file() else 0
    if found != size_bytes:
        raise UserError(f"{path} has {found} bytes, published are {size_bytes}; unpack STL-10 again")
