"""Pillow's GaussianBlur on the CPU, bit for bit: three box passes along rows, then three along columns.

The box has a fractional radius: whole pixels with the inner weight, one more at each end with the edge weight,
24-bit fixed point. Edges are repeated outwards, and every pass rounds to 8 bits (Pillow 13, ImagingBoxBlur).
Up to a sigma of 2.4 the box reaches two pixels at most and its pass is a plain sum; wider boxes run along a line.
"""

import math
from typing import NamedTuple

import numba
import numpy as np

PASSES = 3


class BlurScratch(NamedTuple):
    """spare: uint8 (2, H, W), one colour. lines: uint32 (4, 5, 3 · (W + 4)), rows of three colours, each with two
    more pixels at either end: three rings of five rows, and two rows to work on."""

    spare: np.ndarray
    lines: np.ndarray


def make_blur_scratch(side_px: int) -> BlurScratch:
    """Scratch for square views of side_px."""
    return BlurScratch(np.zeros((2, side_px, side_px), np.uint8), np.zeros((4, 5, 3 * (side_px + 4)), np.uint32))


@numba.njit(cache=True, nogil=True)
def box_weights(sigma_px):
    """(radius, inner weight, edge weight) of the box that Pillow runs three times for a Gaussian; in float32.

    Gwosdek et al. 2011, "Theoretical foundations of Gaussian convolution by extended box filtering".
    """
    one, two, three, six = np.float32(1), np.float32(2), np.float32(3), np.float32(6)
    variance = np.float32(sigma_px) * np.float32(sigma_px) / np.float32(PASSES)
    length = np.float32(math.sqrt(12.0 * np.float64(variance) + 1.0))
    whole = np.float32(math.floor((np.float64(length) - 1.0) / 2.0))
    part = (two * whole + one) * (whole * (whole + one) - three * variance)
    part /= six * (variance - (whole + one) * (whole + one))
    real = whole + part
    radius = np.int64(real)
    inner = np.int64(np.float32(1 << 24) / (real * two + one))
    edge = ((1 << 24) - (2 * radius + 1) * inner) // 2
    return radius, inner, edge


@numba.njit(cache=True, nogil=True)
def _box(values, radius, inner, edge, out):
    """One pass of a box of any size along a line, its ends repeated outwards."""
    last = len(values) - 1
    total = np.int64(0)
    for k in range(-radius - 1, radius):
        total += values[min(max(k, 0), last)]
    for x in range(len(values)):
        left, right = max(x - radius - 1, 0), min(x + radius + 1, last)
        total += np.int64(values[min(x + radius, last)]) - values[left]
        bulk = total * inner + (np.int64(values[left]) + values[right]) * edge
        out[x] = np.uint8((bulk + (1 << 23)) >> 24)


@numba.njit(cache=True, nogil=True)
def _blur_wide(plane, pitch, side, radius, inner, edge, spare):
    """Boxes of any size on one colour, rows of `pitch` pixels, in place."""
    one, two = spare[0], spare[1]
    for y in range(side):
        _box(plane[y * pitch : y * pitch + side], radius, inner, edge, one[y])
        _box(one[y], radius, inner, edge, two[y])
        _box(two[y], radius, inner, edge, one[y])
    for x in range(side):
        _box(one[:, x], radius, inner, edge, two[:, x])
        _box(two[:, x], radius, inner, edge, one[:, x])
        _box(one[:, x], radius, inner, edge, two[:, x])
    for y in range(side):
        plane[y * pitch : y * pitch + side] = two[y]


@numba.njit(cache=True, nogil=True)
def _box_of_3(before, here, after, inner, edge, out):
    """One value and its two neighbours, uint32, for a box of radius 0 and a bit."""
    for x in range(len(out)):
        bulk = here[x] * inner + (before[x] + after[x]) * edge
        out[x] = np.uint32(bulk + np.uint32(1 << 23)) >> np.uint32(24)


@numba.njit(cache=True, nogil=True)
def _box_of_5(before2, before, here, after, after2, inner, edge, out):
    """One value and its four neighbours, uint32, for a box of radius 1 and a bit."""
    for x in range(len(out)):
        bulk = (before[x] + here[x] + after[x]) * inner + (before2[x] + after2[x]) * edge
        out[x] = np.uint32(bulk + np.uint32(1 << 23)) >> np.uint32(24)


@numba.njit(cache=True, nogil=True)
def _blur_along(line, side, radius, inner, edge, out):
    """One pass along a line of three colours, whose ends it first repeats outwards."""
    span = len(line) // 3
    for start in range(0, 3 * span, span):
        end = start + side
        line[start] = line[start + 1] = line[start + 2]
        line[end + 2] = line[end + 3] = line[end + 1]
    n = len(line) - 4
    here, to = line[2 : n + 2], out[2 : n + 2]
    if radius == 0:
        _box_of_3(line[1 : n + 1], here, line[3 : n + 3], inner, edge, to)
    else:
        _box_of_5(line[:n], line[1 : n + 1], here, line[3 : n + 3], line[4 : n + 4], inner, edge, to)


@numba.njit(cache=True, nogil=True)
def _blur_down(ring, y, last, radius, inner, edge, out):
    """One pass for row y of those whose k-th is ring[k % 5]; rows 0 and `last` count as repeated outwards."""
    here, before, after = ring[y % 5], ring[max(y - 1, 0) % 5], ring[min(y + 1, last) % 5]
    if radius == 0:
        _box_of_3(before, here, after, inner, edge, out)
    else:
        _box_of_5(ring[max(y - 2, 0) % 5], before, here, after, ring[min(y + 2, last) % 5], inner, edge, out)


@numba.njit(cache=True, nogil=True)
def _blur_narrow(planes, pitch, side, radius, inner, edge, lines):
    """Boxes that reach two pixels at most: all six passes in one go down the rows.

    A row goes through its three passes along the row into ring 0 and waits there until the first pass along the
    columns has the rows around it, whose result waits in ring 1 for the second, and so on: five rows a ring.
    """
    reach, last, span = radius + 1, side - 1, lines.shape[2] // 3
    one, two = lines[3, 0], lines[3, 1]
    for y in range(side + 3 * reach):
        if y < side:
            for c in range(3):
                values, to = planes[c, y * pitch :], one[c * span + 2 :]
                for x in range(side):
                    to[x] = values[x]
            _blur_along(one, side, radius, inner, edge, two)
            _blur_along(two, side, radius, inner, edge, one)
            _blur_along(one, side, radius, inner, edge, lines[0, y % 5])
        for ring in range(3):
            row = y - (ring + 1) * reach
            if 0 <= row < side:
                out = lines[ring + 1, row % 5] if ring < 2 else one
                _blur_down(lines[ring], row, last, radius, inner, edge, out)
        done = y - 3 * reach
        if done >= 0:
            for c in range(3):
                values, to = one[c * span + 2 :], planes[c, done * pitch :]
                for x in range(side):
                    to[x] = values[x]


@numba.njit(cache=True, nogil=True)
def apply_blur(planes, pitch, side, sigma_px, scratch):
    """GaussianBlur(sigma_px) of a view in planes (3, …), rows of `pitch` pixels, in place; sigma_px > 0."""
    radius, inner, edge = box_weights(sigma_px)
    if radius <= 1:
        _blur_narrow(planes, pitch, side, radius, np.uint32(inner), np.uint32(edge), scratch.lines)
    else:
        for c in range(3):
            _blur_wide(planes[c], pitch, side, radius, inner, edge, scratch.spare)
