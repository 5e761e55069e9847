"""PASCAL VOC's annotations: which of its 20 classes an image shows, and where.

    VOCdevkit/VOC2007/Annotations/000005.xml         <object><name>chair</name><difficult>0</difficult>…

For classification (eval/svm.py) a class of an image is present where one of its objects is not difficult, ignored
where all of them are, else absent: the 1, 0 and -1 of VOC's own <class>_<split>.txt, by which the task is judged.
Detection (eval/detector/data.py) reads the boxes from the same objects.
"""

import xml.etree.ElementTree as ET
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from pipeline.errors import UserError
from pipeline.storage.sources.voc2007 import voc_root

CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog"),
    *("horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
PRESENT, ABSENT, IGNORED = 1, 0, -1


class VocObject(NamedTuple):
    """One object: its class's position in CLASSES, whether VOC calls it difficult, and its element."""

    label: int
    difficult: bool
    element: ET.Element


def read_annotation(path: Path) -> tuple[ET.Element, list[VocObject]]:
    """The root element of an annotation, and its objects. Raises UserError for one that cannot be used."""
    again = f"unpack the annotations of {path.parent.parent.name} again"
    try:
        root = ET.parse(path).getroot()
    except FileNotFoundError:
        raise UserError(f"{path} is missing; {again}") from None
    except (OSError, ET.ParseError, LookupError, ValueError) as error:  # the last two for an encoding
        raise UserError(f"{path} is not an annotation of PASCAL VOC ({error}); {again}") from None
    objects = []
    for element in root.findall("object"):
        name, difficult = (element.findtext(tag, "").strip() for tag in ("name", "difficult"))
        if name not in CLASSES:
            raise UserError(f"{path} has an object of class {name!r:.60}, none of VOC's 20; is it VOC's file?")
        if difficult not in ("0", "1", ""):
            raise UserError(f"{path} has an object with difficult {difficult!r:.60}, expected is 0 or 1; {again}")
        objects.append(VocObject(CLASSES.index(name), difficult == "1", element))
    if not objects:
        raise UserError(f"{path} has no object, every image of VOC has at least one; {again}")
    return root, objects


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
    targets = np.full(len(CLASSES), ABSENT, np.int8)
    _, objects = read_annotation(path)
    for found in objects:
        if not found.difficult:
            targets[found.label] = PRESENT
        elif targets[found.label] == ABSENT:
            targets[found.label] = IGNORED
    return targets
