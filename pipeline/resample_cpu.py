"""Crop, resize, flip on the CPU: the pixels of Pillow's `resize` exactly, for any box and any window of the result.

Pillow resizes 8-bit images in two passes, along rows and along columns, each with 22-bit fixed-point
coefficients and rounded to 8 bits (Pillow 13, ImagingResample). Both filters here are antialiased: their
support grows with the scale. Only the rows and columns of the wanted window are computed.
"""

from typing import NamedTuple

import numba
import numpy as np

COEFFICIENT_BITS = 22
HALF = 1 << (COEFFICIENT_BITS - 1)
BICUBIC_SUPPORT, BILINEAR_SUPPORT = 2.0, 1.0


class ResampleScratch(NamedTuple):
    """Memory of one thread for crop-resizes of images up to a size it was made for.

    first, taps          int32 (2, side): first input pixel and number of taps of each output column, row
    coefficients         int32 (2, side · taps): their coefficients, packed one after another
    start                int32 (2, side): where those of each output column, row start
    between              uint8 (side · 3 · longest): what the first of the two passes leaves
    """

    first: np.ndarray
    taps: np.ndarray
    start: np.ndarray
    coefficients: np.ndarray
    between: np.ndarray


def make_resample_scratch(max_height_px: int, max_width_px: int, side_px: int) -> ResampleScratch:
    """Scratch for images of at most this size and views of (side_px, side_px)."""
    index = (2, side_px)
    # An output pixel has at most 4 · max(1, scale) + 3 taps, and scale · (columns computed) <= input size.
    coefficients = 4 * max(max_height_px, max_width_px) + 8 * side_px
    return ResampleScratch(
        np.zeros(index, np.int32),
        np.zeros(index, np.int32),
        np.zeros(index, np.int32),
        np.zeros((2, coefficients), np.int32),
        np.zeros(side_px * 3 * max(max_height_px, max_width_px), np.uint8),
    )


@numba.njit(cache=True, nogil=True)
def _bicubic(x):
    """Keys' cubic with a = -0.5, Pillow's order of operations."""
    x = abs(x)
    if x < 1.0:
        return (1.5 * x - 2.5) * x * x + 1.0
    if x < 2.0:
        return (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    return 0.0


@numba.njit(cache=True, nogil=True)
def _bilinear(x):
    return max(1.0 - abs(x), 0.0)


@numba.njit(cache=True, nogil=True)
def fill_coefficients(box_px, resized_px, offset_px, bicubic, reverse, first, taps, start, coefficients):
    """Coefficients of the output pixels offset_px … offset_px + len(first) - 1 of a resize box_px → resized_px.

    An output pixel outside the resized range has no taps. `reverse` stores them last to first: a mirrored view.
    Returns (first input pixel used, one past the last), (0, 0) where none is.
    """
    scale = box_px / resized_px
    filter_scale = max(scale, 1.0)
    support = (BICUBIC_SUPPORT if bicubic else BILINEAR_SUPPORT) * filter_scale
    inverse = 1.0 / filter_scale
    side = len(first)
    used, low, high = 0, box_px, 0
    weights = 0.0
    for i in range(side):
        out = offset_px + i
        at = side - 1 - i if reverse else i
        start[at] = used
        if out < 0 or out >= resized_px:
            first[at], taps[at] = 0, 0
            continue
        centre = (out + 0.5) * scale
        begin = max(int(centre - support + 0.5), 0)
        count = min(int(centre + support + 0.5), box_px) - begin
        weights = 0.0
        for k in range(count):
            x = (k + begin - centre + 0.5) * inverse
            weights += _bicubic(x) if bicubic else _bilinear(x)
        for k in range(count):
            x = (k + begin - centre + 0.5) * inverse
            weight = _bicubic(x) if bicubic else _bilinear(x)
            if weights != 0.0:
                weight /= weights
            fixed = weight * (1 << COEFFICIENT_BITS)
            coefficients[used + k] = int(fixed - 0.5) if fixed < 0 else int(fixed + 0.5)
        first[at], taps[at] = begin, count
        used += count
        low, high = min(low, begin), max(high, begin + count)
    return (low, high) if high > low else (0, 0)


@numba.njit(cache=True, nogil=True)
def height_first(box_height, box_width, resized_height, resized_width):
    """Pillow's choice: the pass along columns runs first where it shrinks more than twice as many pixels away.

    Since Pillow 13; older ones always begin with the rows. As each pass rounds and clips to 8 bits, the order
    shows: up to 15 of 255 at sharp edges.
    """
    lost = box_height - resized_height
    return lost > 0 and lost > 2 * (box_width - resized_width)


@numba.njit(cache=True, nogil=True)
def _clip8(fixed):
    return np.uint8(min(max(fixed >> COEFFICIENT_BITS, 0), 255))


@numba.njit(cache=True, nogil=True)
def _resize_width(source, first, taps, start, coefficients, out):
    """(n, w, 3) → (n, len(first), 3)"""
    for y in range(source.shape[0]):
        for x in range(len(first)):
            for c in range(3):
                total = HALF
                for k in range(taps[x]):
                    total += source[y, first[x] + k, c] * coefficients[start[x] + k]
                out[y, x, c] = _clip8(total)


@numba.njit(cache=True, nogil=True)
def _resize_height(source, low, first, taps, start, coefficients, out):
    """(n, w, 3), whose first row is number `low` → (len(first), w, 3)"""
    for y in range(len(first)):
        for x in range(source.shape[1]):
            for c in range(3):
                total = HALF
                for k in range(taps[y]):
                    total += source[first[y] + k - low, x, c] * coefficients[start[y] + k]
                out[y, x, c] = _clip8(total)


@numba.njit(cache=True, nogil=True)
def crop_resize_flip(image, box, resized, window, flip, bicubic, scratch, planes):
    """uint8 (h, w, 3) → planes, uint8 (3, side, side): box, resize, window, mirror. Outside the resized box: zeros.

    box is (top, left, height, width), resized (height, width), window (top, left); ViewParams says what they mean.
    """
    top, left, height, width = np.int64(box[0]), np.int64(box[1]), np.int64(box[2]), np.int64(box[3])
    side = planes.shape[1]
    assert min(top, left) >= 0 and min(height, width) > 0
    assert top + height <= image.shape[0] and left + width <= image.shape[1]
    assert 4 * max(height, width) + 8 * side <= scratch.coefficients.shape[1]
    assert 3 * side * max(height, width) <= len(scratch.between) and side == scratch.first.shape[1]
    first, taps, start, coefficients = scratch.first, scratch.taps, scratch.start, scratch.coefficients
    fill_coefficients(width, resized[1], window[1], bicubic, flip, first[0], taps[0], start[0], coefficients[0])
    low, high = fill_coefficients(
        height, resized[0], window[0], bicubic, False, first[1], taps[1], start[1], coefficients[1]
    )
    view = planes.transpose((1, 2, 0))
    if height_first(height, width, resized[0], resized[1]):
        between = scratch.between[: side * width * 3].reshape((side, width, 3))
        crop = image[top : top + height, left : left + width]
        _resize_height(crop, 0, first[1], taps[1], start[1], coefficients[1], between)
        _resize_width(between, first[0], taps[0], start[0], coefficients[0], view)
    else:
        between = scratch.between[: (high - low) * side * 3].reshape((high - low, side, 3))
        crop = image[top + low : top + high, left : left + width]
        _resize_width(crop, first[0], taps[0], start[0], coefficients[0], between)
        _resize_height(between, low, first[1], taps[1], start[1], coefficients[1], view)
