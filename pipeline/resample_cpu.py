"""Crop, resize, flip on the CPU: the pixels of Pillow's `resize` exactly, for any box and any window of the result.

Pillow resizes 8-bit images in two passes, along rows and along columns, each with 22-bit fixed-point
coefficients and rounded to 8 bits (Pillow 13, ImagingResample). Both filters here are antialiased: their
support grows with the scale. Only the rows and columns of the wanted window are computed.

    usually          (h, w, 3) ─ along rows ─▶ (h, 3, side) ─ along columns ─▶ (3, side, side)
    height_first     (h, w, 3) ─ along columns ─▶ (side, w, 3) ─ along rows ─▶ (3, side, side)

The pass along rows computes LANES neighbouring pixels at once from all input pixels that any of them needs;
the weights of the others are zeros.
"""

from typing import NamedTuple

import numba
import numpy as np

from pipeline.vector_cpu import COEFFICIENT_BITS, COLUMNS, HALF, LANES, ROWS, sum_pixels, sum_rows

BICUBIC_SUPPORT, BILINEAR_SUPPORT = 2.0, 1.0


class ResampleScratch(NamedTuple):
    """Memory of one thread for crop-resizes of images up to the size it was made for. S: the view's padded side.

    width_first, width_count, width_start       int64 (S / LANES,): a block's first input column, how many it
                                                needs, where its weights start
    width_weights                               float64 (…, LANES): weight of an input column in each lane
    height_first, height_count, height_start    int64 (side,): the same of each output row
    height_weights                              int32 (…,)
    weights                                     float64: those of one pixel, not yet normalized
    real_rows                                   float64 (ROWS, 3 · longest side): the rows at work
    between                                     uint8: what the first of the two passes leaves
    """

    width_first: np.ndarray
    width_count: np.ndarray
    width_start: np.ndarray
    width_weights: np.ndarray
    height_first: np.ndarray
    height_count: np.ndarray
    height_start: np.ndarray
    height_weights: np.ndarray
    weights: np.ndarray
    real_rows: np.ndarray
    between: np.ndarray


@numba.njit(cache=True, nogil=True)
def row_pitch(side_px):
    """S, the columns that a row of a view occupies: whole blocks."""
    return -(-side_px // LANES) * LANES


def make_resample_scratch(max_height_px: int, max_width_px: int, side_px: int) -> ResampleScratch:
    """Scratch for images of at most this size and square views of side_px."""
    side, longest = row_pitch(side_px), max(max_height_px, max_width_px)
    blocks = [np.zeros(side // LANES, np.int64) for _ in range(3)]
    rows = [np.zeros(side_px, np.int64) for _ in range(3)]
    # A block of LANES pixels needs at most 11 · max(1, scale) + 3 columns and never more than the image has; an
    # output row has at most 4 · max(1, scale) + 3 taps. Scale times the pixels computed is at most the input size.
    return ResampleScratch(
        *blocks,
        np.zeros((3 * longest + 2 * side, LANES), np.float64),
        *rows,
        np.zeros(5 * longest + 8 * side, np.int32),
        np.zeros(longest, np.float64),
        np.zeros((ROWS, 3 * longest), np.float64),
        np.zeros(3 * side * (longest + ROWS), np.uint8),
    )


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _support(out, box_px, resized_px, bicubic):
    """(first input pixel, one past the last) under the filter of one output pixel; none outside the resized range."""
    if out < 0 or out >= resized_px:
        return 0, 0
    scale = box_px / resized_px
    support = (BICUBIC_SUPPORT if bicubic else BILINEAR_SUPPORT) * max(scale, 1.0)
    centre = (out + 0.5) * scale
    return max(int(centre - support + 0.5), 0), min(int(centre + support + 0.5), box_px)


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _fill_weights(out, begin, end, box_px, resized_px, bicubic, weights):
    """weights[k] = fixed-point weight, a whole number, of input pixel begin + k for one output pixel.

    The filter is Keys' cubic with a = -0.5, or the triangle, in Pillow's order of operations.
    """
    scale = box_px / resized_px
    inverse = 1.0 / max(scale, 1.0)
    centre = (out + 0.5) * scale
    total = 0.0
    for k in range(end - begin):
        x = abs((k + begin - centre + 0.5) * inverse)
        if bicubic:
            near = (1.5 * x - 2.5) * x * x + 1.0
            far = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
            weights[k] = near if x < 1.0 else (far if x < 2.0 else 0.0)
        else:
            weights[k] = max(1.0 - x, 0.0)
        total += weights[k]
    total = total if total != 0.0 else 1.0
    for k in range(end - begin):
        fixed = weights[k] / total * (1 << COEFFICIENT_BITS)
        weights[k] = int(fixed + (-0.5 if fixed < 0 else 0.5))


@numba.njit(cache=True, nogil=True)
def _prepare_height(box_px, resized_px, offset_px, bicubic, s):
    """Fills the scratch for output rows offset_px …; returns (first, one past the last) input row needed."""
    used, low, high = 0, box_px, 0
    for y in range(len(s.height_first)):
        begin, end = _support(offset_px + y, box_px, resized_px, bicubic)
        _fill_weights(offset_px + y, begin, end, box_px, resized_px, bicubic, s.weights)
        assert used + end - begin <= len(s.height_weights)
        for k in range(end - begin):
            s.height_weights[used + k] = int(s.weights[k])
        s.height_first[y], s.height_count[y], s.height_start[y] = begin, end - begin, used
        used += end - begin
        if end > begin:
            low, high = min(low, begin), max(high, end)
    return (low, high) if high > low else (0, 0)


@numba.njit(cache=True, nogil=True)
def _prepare_width(side, box_px, resized_px, offset_px, flip, bicubic, s):
    """Fills the scratch for output columns offset_px … offset_px + side - 1, mirrored if `flip`."""
    used = 0
    for block in range(len(s.width_first)):
        low, high = box_px, 0
        for x in range(block * LANES, min((block + 1) * LANES, side)):
            begin, end = _support(offset_px + (side - 1 - x if flip else x), box_px, resized_px, bicubic)
            if end > begin:
                low, high = min(low, begin), max(high, end)
        count = max(high - low, 0)
        assert used + count <= len(s.width_weights)
        s.width_weights[used : used + count] = 0.0
        s.width_first[block], s.width_count[block], s.width_start[block] = (low if count else 0), count, used
        for x in range(block * LANES, min((block + 1) * LANES, side)):
            out = offset_px + (side - 1 - x if flip else x)
            begin, end = _support(out, box_px, resized_px, bicubic)
            _fill_weights(out, begin, end, box_px, resized_px, bicubic, s.weights)
            for k in range(end - begin):
                s.width_weights[used + begin - low + k, x % LANES] = s.weights[k] / (1 << COEFFICIENT_BITS)
        used += count


@numba.njit(cache=True, nogil=True)
def _resize_rows(source, at, row_size, n, w, s, out, out_row_size, out_channel_size):
    """The pass along rows: n rows of w RGB pixels, from source[at] on, row_size bytes apart.

    Row y, channel c goes to out[y · out_row_size + c · out_channel_size], whole blocks of LANES. Works ROWS rows
    at a time, so `out` must have ROWS - 1 rows to spare behind the n.
    """
    for y in range(0, n, ROWS):
        for r in range(min(ROWS, n - y)):
            row, real = source[at + (y + r) * row_size :], s.real_rows[r]
            for i in range(3 * w):
                real[i] = row[i]
        for block in range(len(s.width_first)):
            sum_pixels(
                s.real_rows.ctypes.data + s.width_first[block] * 24,
                s.real_rows.shape[1],
                s.width_weights.ctypes.data + s.width_start[block] * (8 * LANES),
                s.width_count[block],
                out.ctypes.data + y * out_row_size + block * LANES,
                out_row_size,
                out_channel_size,
            )


@numba.njit(cache=True, nogil=True)
def _resize_columns(source, at, row_size, low, length, s, out):
    """The pass along columns: rows of `length` bytes, row_size apart, row `low` at source[at] → out, flat."""
    for y in range(len(s.height_first)):
        first, count, start = at + (s.height_first[y] - low) * row_size, s.height_count[y], s.height_start[y]
        values, weights = source.ctypes.data + first, s.height_weights.ctypes.data + 4 * start
        to = out.ctypes.data + y * length
        for x in range(0, length - COLUMNS + 1, COLUMNS):
            sum_rows(values + x, row_size, weights, count, to + x)
        if length >= COLUMNS and length % COLUMNS:  # the rest, together with some of those before it
            sum_rows(values + length - COLUMNS, row_size, weights, count, to + length - COLUMNS)
        if length < COLUMNS:
            for x in range(length):
                total = HALF
                for k in range(count):
                    total += source[first + k * row_size + x] * s.height_weights[start + k]
                out[y * length + x] = min(max(total >> COEFFICIENT_BITS, 0), 255)


@numba.njit(cache=True, nogil=True)
def height_first(box_height, box_width, resized_height, resized_width):
    """Pillow's choice: the pass along columns runs first where it takes away more than twice as many pixels.

    Since Pillow 13; older ones always begin with the rows. As each pass rounds and clips to 8 bits, the order
    shows: up to 15 of 255 at sharp edges.
    """
    lost = box_height - resized_height
    return lost > 0 and lost > 2 * (box_width - resized_width)


@numba.njit(cache=True, nogil=True)
def crop_resize_flip(image, box, resized, window, flip, bicubic, s, planes):
    """uint8 (h, w, 3), contiguous → planes, uint8 (3, …), rows of S pixels: box, resize, window, mirror.

    box is (top, left, height, width), resized (height, width), window (top, left); ViewParams says what they mean.
    Zeros outside the resized box and in the S - side columns behind the view. Each plane has room for
    side + ROWS - 1 rows; what lies behind the view is undefined.
    """
    top, left, height, width = np.int64(box[0]), np.int64(box[1]), np.int64(box[2]), np.int64(box[3])
    side, pitch = len(s.height_first), LANES * len(s.width_first)
    assert min(top, left) >= 0 and min(height, width) > 0
    assert top + height <= image.shape[0] and left + width <= image.shape[1]
    assert max(height, width) <= len(s.weights) and planes.shape[1] >= (side + ROWS - 1) * pitch
    _prepare_width(side, width, resized[1], window[1], flip, bicubic, s)
    low, high = _prepare_height(height, resized[0], window[0], bicubic, s)
    pixels, row_size = image.reshape(-1), 3 * image.shape[1]
    at = top * row_size + 3 * left
    if height_first(height, width, resized[0], resized[1]):
        _resize_columns(pixels, at, row_size, 0, 3 * width, s, s.between)
        _resize_rows(s.between, 0, 3 * width, side, width, s, planes, pitch, planes.shape[1])
    else:
        _resize_rows(pixels, at + low * row_size, row_size, high - low, width, s, s.between, 3 * pitch, pitch)
        for c in range(3):
            _resize_columns(s.between, c * pitch, 3 * pitch, low, pitch, s, planes[c])
