"""Pillow's GaussianBlur on the CPU, bit for bit: three box passes along rows, then three along columns.

The box has a fractional radius: whole pixels with the inner weight, one more at each end with the edge weight,
24-bit fixed point. Edges are repeated outwards, and every pass rounds to 8 bits (Pillow 13, ImagingBoxBlur).
Up to a sigma of 2.4 the box reaches two pixels at most and its pass is a plain sum; wider boxes run along a line.
"""

import math
from typing import NamedTuple

import numpy as np

from pipeline.compiled import inlined, jit, kernel, unsigned
from pipeline.views.vector_cpu import widest_vectors

PASSES = 3


class BlurScratch(NamedTuple):
    """Memory of one thread for square views.

    spare   uint8 (2 · H · W,): one colour, twice
    lines   uint32 (17 · 3 · (W + 4),): lines of three colours, each with two more pixels at either end: three rings
            of five lines, and two lines to work on
    """

    spare: np.ndarray
    lines: np.ndarray


@jit
def make_blur_scratch(side_px):
    """Scratch for square views of side_px."""
    return BlurScratch(np.zeros(2 * side_px * side_px, np.uint8), np.zeros(17 * 3 * (side_px + 4), np.uint32))


@jit
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


@kernel
def _box(m, start, out, step, n, radius, inner, edge):
    """One pass of a box of any size along n values of m, `step` apart from m[start] on, to m[out] …; ends repeated."""
    # A running sum of the 2 · radius + 1 inner pixels: one comes, one goes.
    last = n - 1
    total = np.int64(0)
    for k in range(-radius - 1, radius):
        total += m[start + min(max(k, 0), last) * step]
    for x in range(n):
        left = np.int64(m[start + max(x - radius - 1, 0) * step])
        right = np.int64(m[start + min(x + radius + 1, last) * step])
        total += np.int64(m[start + min(x + radius, last) * step]) - left
        m[out + x * step] = np.uint8((total * inner + (left + right) * edge + (1 << 23)) >> 24)


@kernel
def _blur_wide(plane, pitch, side, radius, inner, edge, spare):
    """Boxes of any size on one colour, rows of `pitch` pixels, in place; `spare` holds two pictures."""
    other = side * side
    for y in range(side):
        for x in range(side):
            spare[y * side + x] = plane[y * pitch + x]
    for axis in range(2):
        step, line = (1, side) if axis == 0 else (side, 1)
        for k in range(side):
            for turn in range(PASSES):  # to and fro between the two: an odd number ends in the second
                start = k * line + (turn % 2) * other
                _box(spare, start, k * line + (1 - turn % 2) * other, step, side, radius, inner, edge)
        for i in range(other):
            spare[i] = spare[other + i]
    for y in range(side):
        for x in range(side):
            plane[y * pitch + x] = spare[y * side + x]


@kernel
def _box_of_3(m, before, here, after, out, n, inner, edge):
    """For a box of radius 0 and a bit: n values of m, uint32, from out on, each from one value and its two neighbours.

    All lines lie in one array and are given by where they start: slices would cost as much as the sums.
    """
    widest_vectors()
    before, here, after, out = unsigned(before), unsigned(here), unsigned(after), unsigned(out)
    for x in range(unsigned(n)):
        bulk = m[here + x] * inner + (m[before + x] + m[after + x]) * edge
        m[out + x] = np.uint32(bulk + np.uint32(1 << 23)) >> np.uint32(24)


@kernel
def _box_of_5(m, before2, before, here, after, after2, out, n, inner, edge):
    """The same for a box of radius 1 and a bit: from one value and its four neighbours."""
    widest_vectors()
    before2, before, here = unsigned(before2), unsigned(before), unsigned(here)
    after, after2, out = unsigned(after), unsigned(after2), unsigned(out)
    for x in range(unsigned(n)):
        bulk = (m[before + x] + m[here + x] + m[after + x]) * inner + (m[before2 + x] + m[after2 + x]) * edge
        m[out + x] = np.uint32(bulk + np.uint32(1 << 23)) >> np.uint32(24)


@inlined
def _blur_along(m, line, side, radius, inner, edge, out):
    """One pass along the line of three colours at m[line], whose ends it first repeats outwards, to m[out]."""
    for c in range(3):
        start = line + c * (side + 4)
        end = start + side
        m[start] = m[start + 1] = m[start + 2]
        m[end + 2] = m[end + 3] = m[end + 1]
    n = 3 * (side + 4) - 4
    if radius == 0:
        _box_of_3(m, line + 1, line + 2, line + 3, out + 2, n, inner, edge)
    else:
        _box_of_5(m, line, line + 1, line + 2, line + 3, line + 4, out + 2, n, inner, edge)


@inlined
def _blur_down(m, ring, y, last, length, radius, inner, edge, out):
    """One pass for row y of those whose k-th lies at m[ring + k % 5 · length]; rows 0 and `last` are repeated."""
    here = ring + y % 5 * length
    before, after = ring + max(y - 1, 0) % 5 * length, ring + min(y + 1, last) % 5 * length
    if radius == 0:
        _box_of_3(m, before, here, after, out, length, inner, edge)
    else:
        before2, after2 = ring + max(y - 2, 0) % 5 * length, ring + min(y + 2, last) % 5 * length
        _box_of_5(m, before2, before, here, after, after2, out, length, inner, edge)


@inlined
def _blur_narrow(planes, pitch, side, radius, inner, edge, m):
    """Boxes that reach two pixels at most: all six passes in one go down the rows.

    A row goes through its three passes along the row into ring 0 and waits there until the first pass along the
    columns has the rows around it, whose result waits in ring 1 for the second, and so on: five rows a ring.
    """
    widest_vectors()
    reach, last, length = radius + 1, side - 1, 3 * (side + 4)
    one, two = 15 * length, 16 * length  # behind the three rings
    for y in range(side + 3 * reach):  # the last rows come out 3 · reach steps after the last went in
        if y < side:
            for c in range(3):
                pixel, at = unsigned(y * pitch), unsigned(one + c * (side + 4) + 2)
                for x in range(unsigned(side)):
                    m[at + x] = planes[c, pixel + x]
            _blur_along(m, one, side, radius, inner, edge, two)
            _blur_along(m, two, side, radius, inner, edge, one)
            _blur_along(m, one, side, radius, inner, edge, y % 5 * length)
        for ring in range(3):
            row = y - (ring + 1) * reach
            if 0 <= row < side:
                out = ((ring + 1) * 5 + row % 5) * length if ring < 2 else one
                _blur_down(m, ring * 5 * length, row, last, length, radius, inner, edge, out)
        done = y - 3 * reach
        if done >= 0:
            for c in range(3):
                pixel, at = unsigned(done * pitch), unsigned(one + c * (side + 4) + 2)
                for x in range(unsigned(side)):
                    planes[c, pixel + x] = m[at + x]


@kernel
def apply_blur(planes, pitch, side, sigma_px, scratch):
    """GaussianBlur(sigma_px) of a view in planes (3, …), rows of `pitch` pixels, in place; sigma_px > 0."""
    radius, inner, edge = box_weights(sigma_px)
    if radius <= 1:
        _blur_narrow(planes, pitch, side, radius, np.uint32(inner), np.uint32(edge), scratch.lines)
    else:
        for c in range(3):
            _blur_wide(planes[c], pitch, side, radius, inner, edge, scratch.spare)
