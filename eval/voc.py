"""Which of PASCAL VOC 2007's 20 classes an image shows, from the annotation beside it.

    VOCdevkit/VOC2007/Annotations/000005.xml         <object><name>chair</name><difficult>0</difficult>…

A class of an image is present where one of its objects is not difficult, ignored where all of them are, else absent:
the 1, 0 and -1 of VOC's own <class>_<split>.txt, by which the classification task is judged.
"""

import xml.etree.ElementTree
from pathlib import Path, PurePosixPath

import numpy as np

from pipeline.errors import UserError
from pipeline.storage.sources.voc2007 import voc_root

CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog"),
    *("horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
PRESENT, ABSENT, IGNORED = 1, 0, -1


def voc_targets(folder: Path, file_names: list[str]) -> np.ndarray:
    """The targets of the images with these file names, (N, 20) int8: PRESENT, ABSENT or IGNORED.

    `folder` is VOC2007, or holds it or VOCdevkit. Raises UserError for an annotation that cannot be used.
    """
    root = voc_root(folder)
    if root is None:
        raise UserError(
            f"no VOC2007 in {folder}: ImageSets/Main is missing; unpack VOCtrainval_06-Nov-2007.tar and "
            "VOCtest_06-Nov-2007.tar there"
        )
    return np.stack([image_targets(root / "Annotations" / f"{PurePosixPath(name).stem}.xml") for name in file_names])


def image_targets(path: Path) -> np.ndarray:
    """The (20,) int8 targets of one annotation. Raises UserError for one that cannot be used."""
    try:
        objects = xml.etree.ElementTree.parse(path).findall("object")
    except (OSError, xml.etree.ElementTree.ParseError) as error:
        raise UserError(f"{path} cannot be read as a VOC annotation ({error}); unpack the archive again") from None
    if not objects:
        raise UserError(f"{path} has no <object>, at least one is expected; unpack the archive again")
    targets = np.full(len(CLASSES), ABSENT, np.int8)
    for entry in objects:
        name, difficult = (entry.findtext(tag, "").strip() for tag in ("name", "difficult"))
        if name not in CLASSES:
            raise UserError(f"{path} has an object of class {name!r}, which is none of VOC2007's 20; is it VOC2007?")
        c = CLASSES.index(name)
        if difficult != "1":
            targets[c] = PRESENT
        elif targets[c] == ABSENT:
            targets[c] = IGNORED
    return targets
