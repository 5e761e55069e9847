"""Images with objects: records, PASCAL VOC's files, training samples, and ground truth in COCO's own form.

    VOCdevkit/VOC2007/{ImageSets/Main/{trainval,test}.txt, Annotations/*.xml, JPEGImages/*.jpg}, VOC2012 likewise

VOC is trained on with its difficult objects and judged without them; COCO (coco.py) is trained on without its crowds
and without images that have no object, and judged with all of its images, as Detectron2 does both.
"""

import hashlib
import json
import os
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.utils.data
from PIL import Image

from eval.detector.outlines import outline_mask
from eval.voc import CLASSES as VOC_CLASSES
from eval.voc import read_annotation
from pipeline.errors import BAD_BYTES, UserError
from pipeline.spec import is_whole
from pipeline.storage.any_image import FORMATS, MAX_PIXELS


@dataclass(frozen=True)
class Record:
    """One image and its n objects.

    boxes     (n, 4) float32, x1 y1 x2 y2 in px from 0, the ends exclusive
    labels    (n,) int64, 1 … K; 0 is the background
    ignored   (n,) bool: VOC's difficult objects, COCO's crowds; a detection of one is neither right nor wrong
    outlines  n segmentations in COCO's forms, polygons or run lengths; None where the dataset has none
    """

    path: Path
    image_id: int
    height: int
    width: int
    boxes: np.ndarray
    labels: np.ndarray
    ignored: np.ndarray
    outlines: list | None = None


@dataclass(frozen=True)
class Split:
    """The images of a split, and what they are called."""

    name: str
    classes: list[str]
    records: list[Record]

    def __len__(self) -> int:
        return len(self.records)

    def truth(self) -> dict:
        """The ground truth as pycocotools reads it; ignored objects are its crowds."""
        images = [{"id": r.image_id, "height": r.height, "width": r.width} for r in self.records]
        objects: list[dict] = []
        for r in self.records:
            for i, (x1, y1, x2, y2) in enumerate(r.boxes.tolist()):
                entry: dict[str, object] = {"id": len(objects) + 1, "image_id": r.image_id}
                entry |= {"category_id": int(r.labels[i]), "iscrowd": int(r.ignored[i])}
                entry |= {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)}
                if r.outlines:
                    entry["segmentation"] = r.outlines[i]
                objects.append(entry)
        categories = [{"id": i, "name": name} for i, name in enumerate(self.classes, 1)]
        return {"info": {}, "images": images, "annotations": objects, "categories": categories}

    def sha256(self) -> str:
        """The digest of the ground truth and of the images' names and sizes in bytes; their pixels are too many."""
        files = [(r.path.name, r.path.stat().st_size) for r in self.records]
        content = json.dumps([self.truth(), files], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()


def is_side(value: Any) -> bool:
    """Whether this can be an image's height or width, in px."""
    return is_whole(value) and value <= MAX_PIXELS


def box_fits(corners: Sequence[float], height: int, width: int) -> bool:
    """Whether x1 y1 x2 y2, in px, are a box that at most by an image's side leaves it; it may have no area."""
    x1, y1, x2, y2 = corners  # of NaN every comparison is false
    return -width <= x1 <= x2 <= 2 * width and -height <= y1 <= y2 <= 2 * height


def require_images(records: list[Record], where: Path) -> None:
    """Raises UserError where a record's image is not there; `where` is what lists them."""
    missing = [r.path for r in records if not os.path.isfile(r.path)]  # Path's raises an error for some names
    if missing:
        raise UserError(
            f"{missing[0]} is missing, one of {len(missing)} of the {len(records)} images that {where} lists; "
            "unpack the dataset's images again"
        )


# ---- PASCAL VOC ----


def open_voc(root: Path, years_and_sets: list[tuple[str, str]]) -> Split:
    """Several parts of VOC, such as [("VOC2007", "trainval")], as one split. Raises UserError."""
    records: list[Record] = []
    for year, part in years_and_sets:
        folder = root / year
        listing = folder / "ImageSets" / "Main" / f"{part}.txt"
        if not listing.is_file():
            raise UserError(f"{listing} is missing; --data expects the folder VOCdevkit with {year} inside")
        try:
            names = listing.read_text("utf-8", "surrogateescape").split()
        except OSError as error:
            raise UserError(f"{listing} cannot be read ({error.strerror}); unpack {year} again") from None
        if not names or len(set(names)) < len(names):
            what = "an image twice" if names else "no image"
            raise UserError(f"{listing} lists {what}; unpack {year} again")
        found = [_voc_record(folder, name, len(records) + i) for i, name in enumerate(names, 1)]
        require_images(found, listing)
        records += found
    return Split("+".join(f"{year} {part}" for year, part in years_and_sets), list(VOC_CLASSES), records)


def _voc_record(folder: Path, name: str, image_id: int) -> Record:
    path = folder / "Annotations" / f"{name}.xml"
    root, objects = read_annotation(path)
    try:
        height, width = (int(root.findtext(f"size/{side}", "")) for side in ("height", "width"))
        if not (is_side(height) and is_side(width)):
            raise ValueError(f"an image of {width}×{height} px")
        corners = [_voc_corners(found.element, height, width) for found in objects]
    except ValueError as error:
        raise UserError(f"{path} is not an annotation of PASCAL VOC ({error}); unpack {folder.name} again") from None
    return Record(
        path=folder / "JPEGImages" / f"{name}.jpg",
        image_id=image_id,
        height=height,
        width=width,
        boxes=np.array(corners, np.float32) - np.array([1, 1, 0, 0], np.float32),  # VOC counts from 1, ends inclusive
        labels=np.array([1 + found.label for found in objects], np.int64),
        ignored=np.array([found.difficult for found in objects]),
    )


def _voc_corners(element: ET.Element, height: int, width: int) -> list[float]:
    """xmin ymin xmax ymax of an object. Raises ValueError."""
    x1, y1, x2, y2 = (float(element.findtext(f"bndbox/{end}", "")) for end in ("xmin", "ymin", "xmax", "ymax"))
    if not box_fits((x1 - 1, y1 - 1, x2, y2), height, width):
        raise ValueError(f"a box from {x1:g}, {y1:g} to {x2:g}, {y2:g} in an image of {width}×{height} px")
    return [x1, y1, x2, y2]


# ---- samples ----


class DetectionImages(torch.utils.data.Dataset):
    """(epoch, position) → image (3, H, W) float32 in [0, 1], and its target as torchvision's detectors take it.

    `keep_ignored` says whether ignored objects are trained on. An epoch flips half of the images, a function of
    seed, epoch and position; epoch −1 flips none. An image that cannot be used comes back as the UserError that says
    why: raised in a DataLoader's process it would reach the user as a traceback.
    """

    def __init__(self, records: list[Record], *, masks: bool, keep_ignored: bool, seed: int):
        self.records, self.masks, self.keep_ignored, self.seed = records, masks, keep_ignored, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, dict[str, torch.Tensor]] | UserError:
        epoch, position = key
        r = self.records[position]
        try:
            pixels = read_image(r)
        except UserError as error:
            return error
        sides = r.boxes[:, 2:] > r.boxes[:, :2]
        used = sides.all(1) & (self.keep_ignored | ~r.ignored)
        boxes = r.boxes[used].copy()
        masks = np.zeros((0, r.height, r.width), np.uint8)
        if self.masks and used.any():
            assert r.outlines is not None, "only COCO, whose objects have outlines, is trained on with masks"
            masks = np.stack([outline_mask(r.outlines[i], r.height, r.width) for i in np.flatnonzero(used)])
        if epoch >= 0 and np.random.default_rng((self.seed, epoch, position)).random() < 0.5:
            pixels, masks = pixels[:, ::-1], masks[:, :, ::-1]
            boxes[:, [0, 2]] = r.width - boxes[:, [2, 0]]
        image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1).float() / 255
        target = {"boxes": torch.from_numpy(boxes), "labels": torch.from_numpy(r.labels[used])}
        if self.masks:
            target["masks"] = torch.from_numpy(np.ascontiguousarray(masks))
        return image, target


def read_image(record: Record) -> np.ndarray:
    """(H, W, 3) uint8. Raises UserError where the file is damaged or not the image its annotation tells of."""
    try:
        with Image.open(record.path, formats=FORMATS) as image:
            side_px = image.width, image.height
            pixels = np.array(image.convert("RGB")) if side_px == (record.width, record.height) else None
    except (*BAD_BYTES, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{record.path} cannot be read ({error}); unpack the dataset's images again") from None
    if pixels is None:
        raise UserError(
            f"{record.path} has {side_px[0]}×{side_px[1]} px, its annotation says "
            f"{record.width}×{record.height}; unpack the dataset again"
        )
    return pixels
