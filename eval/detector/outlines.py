"""COCO's outlines of an object, polygons or run lengths: checked, and as masks.

pycocotools draws them in C, which believes whatever it is given: a corner at 1e9 or runs of more pixels than the image
has end the process, and a polygon of four numbers is taken for a box. So everything is checked before it sees it.

    polygons       [[x1, y1, x2, y2, x3, y3, …], …], px
    run lengths    {"size": [height, width], "counts": …}: how many pixels lie outside, inside, outside …, column by
                   column, as a list or in COCO's own text
"""

import math

import numpy as np


def outline_fits(outline: object, height: int, width: int) -> bool:
    """Whether this is an outline in an image of this size, which at most by an image's side leaves it."""
    if isinstance(outline, list):
        return bool(outline) and all(_polygon_fits(polygon, height, width) for polygon in outline)
    if not isinstance(outline, dict) or repr(outline.get("size")) != repr([height, width]):  # 2.0 is no 2 to C
        return False
    counts = outline.get("counts")
    runs = _unpacked(counts) if isinstance(counts, str) else counts
    if not isinstance(runs, list) or not all(type(run) is int and run >= 0 for run in runs):
        return False
    return sum(runs) == height * width


def _polygon_fits(polygon: object, height: int, width: int) -> bool:
    """By sums and extremes, which are quick: COCO has 50 million numbers."""
    if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
        return False
    xs, ys = polygon[::2], polygon[1::2]
    try:
        finite = math.isfinite(sum(polygon))  # NaN shows in no minimum
        return finite and -width <= min(xs) <= max(xs) <= 2 * width and -height <= min(ys) <= max(ys) <= 2 * height
    except (TypeError, OverflowError):  # text, lists; numbers that no float can hold
        return False


def _unpacked(text: str) -> list[int] | None:
    """The runs in COCO's text, of which each letter has 5 bits, lowest first; None where it is none.

    From the fourth on they are differences from the run before the last one.
    """
    runs: list[int] = []
    value = shift = 0
    for letter in text:
        bits = ord(letter) - 48
        if not 0 <= bits < 64 or shift > 30:
            return None
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:  # more follows
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    return runs if shift == 0 else None


def outline_mask(outline, height: int, width: int) -> np.ndarray:
    """An outline that fits → (H, W) uint8 of 0 and 1."""
    from pycocotools import mask

    if isinstance(outline, list):  # polygons
        return mask.decode(mask.merge(mask.frPyObjects(outline, height, width)))
    packed = isinstance(outline["counts"], str | bytes)
    return mask.decode(outline if packed else mask.frPyObjects(outline, height, width))
