"""The colour operations of a view on the GPU: the jitter in its drawn order, greyscale; Pillow's integers.

Contrast blends with the mean of the whole picture at its place in the order, which cuts the operations in two kernels:

    resized rows ─▶ start_colours ─▶ colours, a pixel an int32 ─▶ finish_colours ─▶ planes, where a blur follows
                    jitter up to     sums of luma, a view          contrast, the     out, normalized, where none does
                    the contrast                                   rest, grey

A tuple of red, green, blue, red, … holds the pixels at work: a thread has one column and ROWS rows of them.
"""

import triton
import triton.language as tl

from pipeline.choices import draws
from pipeline.constants import LUMA_B, LUMA_G, LUMA_HALF, LUMA_R, LUMA_SHIFT
from pipeline.views.blur_gpu import LUT_SIZE
from pipeline.views.gpu_plan import (
    BLUR,
    BRIGHTNESS_FACTOR,
    CONTRAST_FACTOR,
    GREY,
    HUE_SHIFT,
    ORDER,
    SATURATION_FACTOR,
    SOLARIZE,
    STEPS,
    STEPS_BEFORE_MEAN,
)
from pipeline.views.resample_gpu import TILE, field, resized_rows, words

_BRIGHTNESS, _CONTRAST = tl.constexpr(draws.BRIGHTNESS), tl.constexpr(draws.CONTRAST)
_SATURATION, _HUE = tl.constexpr(draws.SATURATION), tl.constexpr(draws.HUE)
_LUMA_R, _LUMA_G, _LUMA_B = tl.constexpr(LUMA_R), tl.constexpr(LUMA_G), tl.constexpr(LUMA_B)
_LUMA_HALF, _LUMA_SHIFT = tl.constexpr(LUMA_HALF), tl.constexpr(LUMA_SHIFT)


@triton.jit
def _luma(r, g, b):
    return (r * _LUMA_R + g * _LUMA_G + b * _LUMA_B + _LUMA_HALF) >> _LUMA_SHIFT


@triton.jit
def _blend(background, value, factor):
    """background + factor · (value - background) in float32, not fused, clipped and cut to 8 bits."""
    mixed = background.to(tl.float32) + factor * (value - background).to(tl.float32)
    return tl.minimum(tl.maximum(mixed, 0.0), 255.0).to(tl.int32)


@triton.jit
def _quotient(a, b):
    """⌊a / b⌋ of integers 0 ≤ a, 0 < b ≤ 510 with a quotient below 256, by an inexact division.

    (a + ½) / b is at least 1 / 1020 away from every integer, the division's error below 1 / 10,000.
    """
    return ((a.to(tl.float32) + 0.5) / b.to(tl.float32)).to(tl.int32)


@triton.jit
def _turn_hue(r, g, b, shift, exact_hues):
    """To 8-bit HSV, the hue shifted, and back, in integers: Pillow's results for every colour.

    Pillow's hue is a float32 quotient cut to 8 bits. If the quotient is a whole number, its roundings decide whether
    that or the one below comes out: `exact_hues` (256,) says which. The tests compare all 2²⁴ colours with Pillow.
    """
    high, low = tl.maximum(r, tl.maximum(g, b)), tl.minimum(r, tl.minimum(g, b))
    spread = high - low
    sixths = tl.where(r == high, g - b, tl.where(g == high, 2 * spread + b - r, 4 * spread + r - g))
    sixths = tl.where(sixths < 0, sixths + 6 * spread, sixths)  # the hue in sixths of the circle, times the spread
    divisor = tl.maximum(2 * spread, 1)
    h = _quotient(85 * sixths, divisor)  # 255 · sixths / (6 · spread)
    exact = 85 * sixths == h * divisor
    h -= tl.load(exact_hues + h, mask=exact, other=0).to(tl.int32)
    s = _quotient(255 * spread, tl.maximum(high, 1))

    h = (h + shift) & 255
    sector = (h * 1542 + 257) >> 16  # 6 · h / 255
    rest = h * 6 - sector * 255
    rest = tl.where((sector & 1) != 0, rest, 255 - rest)
    p = ((high * (255 - s) + 128) * 257) >> 16  # / 255, rounded
    q = ((high * (65025 - s * rest) + 32512).to(tl.uint32) // 65025).to(tl.int32)
    r = tl.where((sector == 1) | (sector == 4), q, tl.where((sector == 2) | (sector == 3), p, high))
    g = tl.where((sector == 1) | (sector == 2), high, tl.where((sector == 4) | (sector == 5), p, q))
    b = tl.where((sector == 3) | (sector == 4), high, tl.where((sector == 2) | (sector == 5), q, p))
    return r, g, b


@triton.jit
def _factor(table, view, index):
    return field(table, view, index).to(tl.float32, bitcast=True)


@triton.jit
def _blended(levels, background, factor):
    """Every value of a tuple blended with one background."""
    blended = ()
    for i in tl.static_range(len(levels)):
        blended += (_blend(background, levels[i], factor),)
    return blended


@triton.jit
def _saturated(levels, factor):
    """A tuple of red, green, blue, red, …, every pixel blended with its luma."""
    saturated = ()
    for i in tl.static_range(0, len(levels), 3):
        luma = _luma(levels[i], levels[i + 1], levels[i + 2])
        saturated += (_blend(luma, levels[i], factor), _blend(luma, levels[i + 1], factor))
        saturated += (_blend(luma, levels[i + 2], factor),)
    return saturated


@triton.jit
def _turned(levels, shift, exact_hues):
    """The same with every pixel's hue shifted."""
    turned = ()
    for i in tl.static_range(0, len(levels), 3):
        turned += _turn_hue(levels[i], levels[i + 1], levels[i + 2], shift, exact_hues)
    return turned


@triton.jit
def _jitter(levels, table, view, first, end, mean, exact_hues):
    """The jitter operations first … end - 1 of the drawn order, on a tuple of red, green, blue, red, …"""
    for step in range(first, end):
        operation = field(table, view, ORDER + step)
        if operation == _BRIGHTNESS:
            levels = _blended(levels, tl.full((), 0, tl.int32), _factor(table, view, BRIGHTNESS_FACTOR))
        elif operation == _CONTRAST:
            levels = _blended(levels, mean, _factor(table, view, CONTRAST_FACTOR))
        elif operation == _SATURATION:
            levels = _saturated(levels, _factor(table, view, SATURATION_FACTOR))
        elif operation == _HUE:
            levels = _turned(levels, field(table, view, HUE_SHIFT), exact_hues)
    return levels


@triton.jit
def _place(pitch, ROWS: tl.constexpr, LANES: tl.constexpr):
    """The first row and the column of each lane: 32 columns × LANES / 32 · ROWS rows to a program."""
    lane, across = tl.arange(0, LANES), pitch // TILE
    down = tl.program_id(1) // across
    top = (down * (LANES // TILE) + lane // TILE) * ROWS
    return top, (tl.program_id(1) - down * across) * TILE + lane % TILE


@triton.jit
def start_colours(
    between,
    table,
    first,
    coefficients,
    colours,
    sums,
    exact_hues,
    side: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    TAPS: tl.constexpr,
):
    """Grid (views, tiles): second pass, jitter up to contrast → colours, a pixel an int32; sums of luma (views,)."""
    pitch: tl.constexpr = (side + TILE - 1) // TILE * TILE
    view = tl.program_id(0)
    top, x = _place(pitch, ROWS, LANES)
    steps, before_mean = field(table, view, STEPS), field(table, view, STEPS_BEFORE_MEAN)
    levels = resized_rows(between, table, first, coefficients, view, top, x, side, ROWS, TAPS)
    levels = _jitter(levels, table, view, 0, before_mean, tl.full((), 0, tl.int32), exact_hues)
    to, packed = colours + view.to(tl.int64) * (side * pitch) + top * pitch + x, words(levels)
    for row in tl.static_range(ROWS):
        tl.store(to + row * pitch, packed[row], mask=top + row < side)
    if before_mean < steps:
        total = tl.full((LANES,), 0, tl.int32)
        for row in tl.static_range(ROWS):
            luma = _luma(levels[3 * row], levels[3 * row + 1], levels[3 * row + 2])
            total += tl.where((top + row < side) & (x < side), luma, 0)
        # Whole numbers: their sum does not depend on the order in which programs add.
        tl.atomic_add(sums + view, tl.sum(total).to(tl.int64), sem="relaxed")


@triton.jit
def finish_colours(
    table, colours, sums, exact_hues, lut, planes, out, side: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr
):
    """Grid (views, tiles): contrast and what follows, grey; views to be blurred → planes, others normalized → out."""
    pitch: tl.constexpr = (side + TILE - 1) // TILE * TILE
    view = tl.program_id(0)
    top, x = _place(pitch, ROWS, LANES)
    own, levels = colours + view.to(tl.int64) * (side * pitch) + top * pitch + x, ()
    for row in tl.static_range(ROWS):
        word = tl.load(own + row * pitch, mask=top + row < side, other=0)
        levels += (word & 255, (word >> 8) & 255, word >> 16)
    count = side * side
    # The mean rounded half up, in whole numbers, as Pillow's contrast takes it.
    mean = ((2 * tl.load(sums + view) + count) // (2 * count)).to(tl.int32)
    begin, end = field(table, view, STEPS_BEFORE_MEAN), field(table, view, STEPS)
    levels = _jitter(levels, table, view, begin, end, mean, exact_hues)
    if field(table, view, GREY) != 0:
        grey = ()
        for i in tl.static_range(0, 3 * ROWS, 3):
            grey += (_luma(levels[i], levels[i + 1], levels[i + 2]),) * 3
        levels = grey
    if field(table, view, BLUR) != 0:
        plane = planes + view.to(tl.int64) * (3 * side * pitch) + top * pitch + x
        for i in tl.static_range(3 * ROWS):
            to = plane + (i // 3) * pitch + (i % 3) * (side * pitch)
            tl.store(to, levels[i].to(tl.uint8), mask=top + i // 3 < side)
    else:
        values = lut + field(table, view, SOLARIZE) * LUT_SIZE
        pixel = out + view.to(tl.int64) * (3 * count) + (top * side + x) * 3
        for i in tl.static_range(3 * ROWS):
            value = tl.load(values + (i % 3) * 256 + levels[i])
            tl.store(pixel + (i // 3) * (3 * side) + i % 3, value, mask=(x < side) & (top + i // 3 < side))
