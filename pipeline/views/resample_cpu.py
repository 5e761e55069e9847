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

import numpy as np

from pipeline.compiled import jit, kernel, unsigned
from pipeline.views.vector_cpu import COEFFICIENT_BITS, COLUMNS, HALF, LANES, ROWS, sum_pixels, sum_rows, widest_vectors

BICUBIC_SUPPORT, BILINEAR_SUPPORT = 2.0, 1.0


class ResampleScratch(NamedTuple):
    """Memory of one thread for crop-resizes of images up to the size it was made for. S: the view's padded side."""

    begin: np.ndarray  # int64 (S,): an output pixel's first input pixel,
    inputs: np.ndarray  # int64 (S,): its number of input pixels (taps),
    total: np.ndarray  # float64 (S,): the sum of its weights
    weights: np.ndarray  # float64: weight of tap k of output pixel i at k · (output pixels) + i
    block_begin: np.ndarray  # int64 (S / LANES,): a block's first input column,
    block_count: np.ndarray  # int64 (S / LANES,): how many it needs,
    block_start: np.ndarray  # int64 (S / LANES,): where its weights start
    block_weights: np.ndarray  # float64 (…, LANES): weight of an input column in each lane
    row_begin: np.ndarray  # int64 (side,): the first input row of an output row,
    row_count: np.ndarray  # int64 (side,): how many it needs
    row_weights: np.ndarray  # int32: as `weights`, in units of 2^-22
    real_rows: np.ndarray  # float64 (ROWS, 3 · longest side): the rows at work
    between: np.ndarray  # uint8: what the first of the two passes leaves


@jit
def row_pitch(side_px):
    """S, the columns that a row of a view occupies: whole blocks."""
    return -(-side_px // LANES) * LANES


@jit
def make_resample_scratch(max_height_px, max_width_px, side_px):
    """Scratch for images of at most this size and square views of side_px."""
    side, longest = row_pitch(side_px), max(max_height_px, max_width_px)
    # An output pixel has at most 4 · max(1, scale) + 3 taps, a block of LANES needs at most 11 · max(1, scale) + 3
    # columns and never more than there are; scale times the pixels computed is at most the input size.
    weights = 4 * longest + 7 * side
    return ResampleScratch(
        np.zeros(side, np.int64),
        np.zeros(side, np.int64),
        np.zeros(side, np.float64),
        np.zeros(weights, np.float64),
        np.zeros(side // LANES, np.int64),
        np.zeros(side // LANES, np.int64),
        np.zeros(side // LANES, np.int64),
        np.zeros((3 * longest + 2 * side, LANES), np.float64),
        np.zeros(side_px, np.int64),
        np.zeros(side_px, np.int64),
        np.zeros(weights, np.int32),
        np.zeros((ROWS, 3 * longest), np.float64),
        np.zeros(3 * side * (longest + ROWS), np.uint8),
    )


@kernel
def _fill_weights(start, n, box_px, resized_px, bicubic, s):
    """begin, inputs and weights of n output pixels from number `start` on of a resize box_px → resized_px.

    The filter is Keys' cubic with a = -0.5, or the triangle, in Pillow's order of operations; the weights are
    fixed-point, so whole numbers in units of 2^-22. Returns how many taps a pixel may have; beyond its own they are 0.
    """
    widest_vectors()
    scale = box_px / resized_px
    support = (BICUBIC_SUPPORT if bicubic else BILINEAR_SUPPORT) * max(scale, 1.0)
    inverse = 1.0 / max(scale, 1.0)
    taps = 2 * int(np.ceil(support)) + 1
    assert taps * n <= len(s.weights)
    for i in range(n):
        centre = (start + i + 0.5) * scale
        s.begin[i] = max(int(centre - support + 0.5), 0)
        s.inputs[i] = min(int(centre + support + 0.5), box_px) - s.begin[i]
        s.total[i] = 0.0
    # One tap of all pixels, then the next: the inner loop has no branch and no sum across lanes, so it is vector code.
    for k in range(taps):
        at = unsigned(k * n)
        for i in range(unsigned(n)):
            centre = (np.float64(start) + np.float64(i) + 0.5) * scale
            x = abs((np.float64(k + s.begin[i]) - centre + 0.5) * inverse)
            near = (1.5 * x - 2.5) * x * x + 1.0
            far = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
            cubic = near if x < 1.0 else (far if x < 2.0 else 0.0)
            triangle = 1.0 - x if x < 1.0 else 0.0
            weight = cubic if bicubic else triangle
            weight = weight if k < s.inputs[i] else 0.0
            s.weights[at + i] = weight
            s.total[i] += weight
    for k in range(taps):
        at = unsigned(k * n)
        for i in range(unsigned(n)):
            # To the nearest whole number, halves away from zero, as Pillow's normalize_coeffs_8bpc.
            fixed = s.weights[at + i] / (s.total[i] if s.total[i] != 0.0 else 1.0) * (1 << COEFFICIENT_BITS)
            s.weights[at + i] = np.int32(fixed + (-0.5 if fixed < 0 else 0.5))
    return taps


@kernel
def _prepare_rows(box_px, resized_px, window_px, bicubic, s):
    """Fills row_* for output rows window_px …; returns (first, one past the last input row needed, rows weighted)."""
    side = len(s.row_begin)
    start = max(window_px, 0)
    n = max(min(window_px + side, resized_px) - start, 0)
    for y in range(side):
        s.row_begin[y] = s.row_count[y] = 0
    if n == 0:
        return 0, 0, 0
    taps = _fill_weights(start, n, box_px, resized_px, bicubic, s)
    for i in range(taps * n):
        s.row_weights[i] = np.int32(s.weights[i])
    for i in range(n):
        s.row_begin[start - window_px + i], s.row_count[start - window_px + i] = s.begin[i], s.inputs[i]
    return s.begin[0], s.begin[n - 1] + s.inputs[n - 1], n


@kernel
def _prepare_blocks(side, box_px, resized_px, window_px, flip, bicubic, s):
    """Fills block_* for output columns window_px … window_px + side - 1, mirrored if `flip`."""
    start = max(window_px, 0)
    n = max(min(window_px + side, resized_px) - start, 0)
    for block in range(len(s.block_begin)):
        s.block_begin[block], s.block_count[block] = box_px, 0
    if n > 0:
        _fill_weights(start, n, box_px, resized_px, bicubic, s)
    # Which input columns a block of outputs needs, from the first to the last of any of its lanes.
    for i in range(n):
        x = start - window_px + i
        block = (side - 1 - x if flip else x) // LANES
        s.block_begin[block] = min(s.block_begin[block], s.begin[i])
        s.block_count[block] = max(s.block_count[block], s.begin[i] + s.inputs[i])  # for now, where the columns end
    used = 0
    for block in range(len(s.block_begin)):
        s.block_count[block] = max(s.block_count[block] - s.block_begin[block], 0)
        s.block_start[block] = used
        used += s.block_count[block]
    assert used <= len(s.block_weights)
    # Each lane's weights at the columns of its block; zeros where another lane alone needs the column.
    for k in range(used):
        for lane in range(LANES):
            s.block_weights[k, lane] = 0.0
    for i in range(n):
        x = start - window_px + i
        x = side - 1 - x if flip else x
        at = s.block_start[x // LANES] + s.begin[i] - s.block_begin[x // LANES]
        for k in range(s.inputs[i]):
            s.block_weights[at + k, x % LANES] = s.weights[k * n + i] / (1 << COEFFICIENT_BITS)


@kernel
def _resize_rows(source, at, row_size, n, w, s, out, out_row_size, out_channel_size):
    """The pass along rows: n rows of w RGB pixels, from source[at] on, row_size bytes apart.

    Row y, channel c goes to out[y · out_row_size + c · out_channel_size], whole blocks of LANES. Works ROWS rows
    at a time, so `out` must have ROWS - 1 rows to spare behind the n.
    """
    widest_vectors()
    for y in range(0, n, ROWS):
        for r in range(min(ROWS, n - y)):
            first = unsigned(at + (y + r) * row_size)
            for i in range(unsigned(3 * w)):
                s.real_rows[r, i] = source[first + i]
        for block in range(len(s.block_begin)):
            sum_pixels(
                s.real_rows.ctypes.data + s.block_begin[block] * 24,
                s.real_rows.shape[1],
                s.block_weights.ctypes.data + s.block_start[block] * (8 * LANES),
                s.block_count[block],
                out.ctypes.data + y * out_row_size + block * LANES,
                out_row_size,
                out_channel_size,
            )


@kernel
def _resize_columns(source, at, row_size, low, length, weights_size, window_px, s, out):
    """The pass along columns: rows of `length` bytes, row_size apart, row `low` at source[at] → out, flat."""
    for y in range(len(s.row_begin)):
        count, column = s.row_count[y], y + min(window_px, 0)
        first = at + (s.row_begin[y] - low if count else 0) * row_size
        values, weights = source.ctypes.data + first, s.row_weights.ctypes.data + 4 * column
        to = out.ctypes.data + y * length
        for x in range(0, length - COLUMNS + 1, COLUMNS):
            sum_rows(values + x, row_size, weights, weights_size, count, to + x)
        if length >= COLUMNS and length % COLUMNS:  # the rest, together with some of those before it
            sum_rows(values + length - COLUMNS, row_size, weights, weights_size, count, to + length - COLUMNS)
        if length < COLUMNS:
            for x in range(length):
                total = HALF
                for k in range(count):
                    total += source[first + k * row_size + x] * s.row_weights[column + k * weights_size]
                out[y * length + x] = min(max(total >> COEFFICIENT_BITS, 0), 255)


@jit
def height_first(box_height, box_width, resized_height, resized_width):
    """Pillow's choice: the pass along columns runs first if it takes away more than twice as many pixels.

    Since Pillow 13; older ones always begin with the rows. As each pass rounds and clips to 8 bits, the order
    shows: up to 15 of 255 at sharp edges.
    """
    lost = box_height - resized_height
    return lost > 0 and lost > 2 * (box_width - resized_width)


@kernel
def crop_resize_flip(image, box, resized, window, flip, bicubic, s, planes):
    """uint8 (h, w, 3), contiguous → planes, uint8 (3, …), rows of S pixels: box, resize, window, mirror.

    box is (top, left, height, width), resized (height, width), window (top, left); ViewParams says what they mean.
    Zeros outside the resized box and in the S - side columns behind the view. Each plane has room for
    side + ROWS - 1 rows; what lies behind the view is undefined.
    """
    top, left, height, width = np.int64(box[0]), np.int64(box[1]), np.int64(box[2]), np.int64(box[3])
    side, pitch = len(s.row_begin), LANES * len(s.block_begin)
    assert min(top, left) >= 0 and min(height, width) > 0
    assert top + height <= image.shape[0] and left + width <= image.shape[1]
    assert 3 * max(height, width) <= s.real_rows.shape[1] and planes.shape[1] >= (side + ROWS - 1) * pitch
    _prepare_blocks(side, width, resized[1], window[1], flip, bicubic, s)
    # Of the rows only those from `low` to `high` are needed by the window; the other ones are not resized.
    low, high, rows = _prepare_rows(height, resized[0], window[0], bicubic, s)
    pixels, row_size = image.reshape(-1), 3 * image.shape[1]
    at, zero = top * row_size + 3 * left, np.int64(0)  # a literal 0 would compile functions a second time
    if height_first(height, width, resized[0], resized[1]):
        _resize_columns(pixels, at, row_size, zero, 3 * width, rows, window[0], s, s.between)
        _resize_rows(s.between, zero, 3 * width, side, width, s, planes.reshape(-1), pitch, planes.shape[1])
    else:
        _resize_rows(pixels, at + low * row_size, row_size, high - low, width, s, s.between, 3 * pitch, pitch)
        for c in range(3):
            _resize_columns(s.between, c * pitch, 3 * pitch, low, pitch, rows, window[0], s, planes[c])


@kernel
def resized_image(image, height, width, bicubic):
    """The whole image (h, w, 3) at another size, uint8 (height, width, 3), in memory of its own."""
    side = np.int64(max(height, width))
    scratch, pitch = make_resample_scratch(image.shape[0], image.shape[1], side), row_pitch(side)
    planes, zero = np.empty((3, (side + ROWS - 1) * pitch), np.uint8), np.int32(0)
    box = zero, zero, np.int32(image.shape[0]), np.int32(image.shape[1])
    crop_resize_flip(image, box, (height, width), (zero, zero), False, bicubic, scratch, planes)
    out = np.empty((np.int64(height), np.int64(width), 3), np.uint8)
    for y in range(height):
        for x in range(width):
            for c in range(3):
                out[y, x, c] = planes[c, y * pitch + x]
    return out
