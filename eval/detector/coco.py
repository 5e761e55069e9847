"""COCO's instances → records.

    coco/{annotations/instances_{train,val}2017.json, train2017/*.jpg, val2017/*.jpg}

Every value that is used is checked, and what is wrong is named with its place in the file.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from eval.detector.data import Record, Split, box_fits, is_side, require_images
from eval.detector.outlines import outline_fits
from pipeline.errors import UserError
from pipeline.spec import is_whole
from pipeline.storage.any_image import MAX_PIXELS
from train.curves import is_number

Check = tuple[Callable[[Any], bool], str]  # whether a value can be used, and what is expected


def _is_box(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(map(is_number, value))


ID: Check = (lambda value: is_whole(value, 0) and value < 1 << 63, "a whole number")
SIDE: Check = (is_side, "a number of px")
IMAGE: dict[str, Check] = {
    "id": ID,
    "height": SIDE,
    "width": SIDE,
    "file_name": (lambda value: isinstance(value, str) and len(value.splitlines()) == 1, "a file's name"),
}
CATEGORY: dict[str, Check] = {"id": ID, "name": (lambda value: isinstance(value, str), "text")}
OBJECT: dict[str, Check] = {
    "image_id": ID,
    "category_id": ID,
    "bbox": (_is_box, "[x, y, width, height] in px"),
    "segmentation": (lambda value: isinstance(value, list | dict), "polygons or run lengths"),
}


def open_coco(root: Path, part: str) -> Split:
    """COCO's `part`, such as "train2017"; categories are renumbered from 1 in the order of their ids.

    Raises UserError for a file that cannot be used, with the place of the first fault.
    """
    path = root / "annotations" / f"instances_{part}.json"
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} is missing; --data expects COCO's folder with annotations/ and {part}/") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a file of COCO instances ({error}); unpack it again") from None
    images = _rows(content, "images", IMAGE, path)
    categories = sorted(_rows(content, "categories", CATEGORY, path), key=lambda c: c["id"])
    objects = _rows(content, "annotations", OBJECT, path)
    label = {c["id"]: i for i, c in enumerate(categories, 1)}
    by_image: dict[int, list[dict]] = {image["id"]: [] for image in images}
    for which, rows, ids in (("images", images, by_image), ("categories", categories, label)):
        if len(ids) < len(rows):
            raise _unusable(path, which, "has an id twice")
    size = {image["id"]: (image["height"], image["width"]) for image in images}
    elsewhere = 0  # of images that are not listed: the file's list was shortened, its objects were not
    for number, entry in enumerate(objects):
        if entry["image_id"] not in size:
            elsewhere += 1
            continue
        known = entry["category_id"] in label
        fault = _fault(entry, *size[entry["image_id"]]) if known else "is of a category that is not listed"
        if fault:
            raise _unusable(path, f"annotations[{number}]", fault)
        by_image[entry["image_id"]].append(entry)
    if elsewhere == len(objects):
        raise _unusable(path, "annotations", "has no object of an image that is listed")
    if elsewhere:
        what = f"{elsewhere} of {len(objects)} objects left out, of images not listed"
        print(f"note: {path}: {what}; unpack it again unless the list was shortened on purpose", file=sys.stderr)
    records = [_record(root / part, image, by_image[image["id"]], label) for image in images]
    require_images(records, path)
    return Split(f"COCO {part}", [c["name"] for c in categories], records)


def _unusable(path: Path, place: str, what: str) -> UserError:
    return UserError(f"{path} is not a file of COCO instances ({place} {what}); unpack it again")


def _rows(content: Any, key: str, checks: dict[str, Check], path: Path) -> list[dict]:
    """The rows below a key of the file, each with all that is read of it. Raises UserError."""
    rows = content.get(key) if isinstance(content, dict) else None
    if not isinstance(rows, list) or not rows:
        raise _unusable(path, key, "is missing or lists nothing")
    for number, row in enumerate(rows):
        for name, (holds, expected) in checks.items():
            if not isinstance(row, dict) or not holds(row.get(name)):
                found = f"has {name} {row.get(name)!r:.60}" if isinstance(row, dict) else f"is {row!r:.60}"
                raise _unusable(path, f"{key}[{number}]", f"{found}, expected is {expected}")
    return rows


def _fault(entry: dict, height: int, width: int) -> str:
    """What is wrong with an object in an image of this size; "" for nothing."""
    x, y, across, down = entry["bbox"]
    if height * width > MAX_PIXELS:
        return f"is in an image of {width}×{height} px, which is not read"
    if entry.get("iscrowd", 0) not in (0, 1):
        return f"has iscrowd {entry['iscrowd']!r:.60}, expected is 0 or 1"
    boxed = box_fits((x, y, x + across, y + down), height, width)
    if boxed and outline_fits(_drawn(entry["segmentation"]), height, width):
        return ""
    return f"has a {'segmentation' if boxed else 'bbox'} that is not in an image of {width}×{height} px"


def _record(folder: Path, image: dict, objects: list[dict], label: dict[int, int]) -> Record:
    boxes = np.array([o["bbox"] for o in objects], np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return Record(
        folder / image["file_name"],
        image["id"],
        image["height"],
        image["width"],
        boxes,
        np.array([label[o["category_id"]] for o in objects], np.int64),
        np.array([o.get("iscrowd", 0) for o in objects], bool),
        [_drawn(o["segmentation"]) for o in objects],
    )


def _drawn(outline: list | dict) -> list | dict:
    """An outline without its polygons of fewer than three corners, which Detectron2 leaves out, too."""
    if isinstance(outline, dict):
        return outline
    return [polygon for polygon in outline if not (isinstance(polygon, list) and len(polygon) in (2, 4))]
