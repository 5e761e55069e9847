"""The views on the GPU: (pixels, params) → normalized pixels, the same integers as Pillow's, a whole batch at once.

    fill_coefficients ─▶ resize_once ─▶ start_colours ─▶ finish_colours ─▶ blur_lines ─▶ blur_lines ─▶ views
                         (resample_gpu)  columns, flip,   contrast, the     rows ×3       columns ×3,
                                         jitter up to     rest, grey;       (blurred      solarize,
                                         the contrast     unblurred views   views only)   normalize
                                                          end here

Between kernels every value has 8 bits, since Pillow rounds there: a pixel's three in an int32, which is one load, until
the colours are finished; planes (V · B, 3, side, pitch) for the blur. Contrast needs the mean of the whole picture at
its place in the drawn order: that cuts the colour operations in two. A thread has one column and some rows of a view,
so that neighbours in a row are neighbours in a warp, whatever Triton's version. No randomness.

Bytes for one image with two 224 px views, bf16, from boxes of 300 × 300 px, 1.1 of the 2 views blurred:

    kernel               reads     writes        kernel               reads     writes
    resize_once          540 kB    538 kB        blur_lines, rows     166 kB    166 kB
    start_colours        538 kB    401 kB        blur_lines, columns  166 kB    331 kB
    finish_colours       401 kB    437 kB        coefficients         20 kB, written once, read twice

3.7 MB together, of which 1.1 MB (the boxes in, the views out) no design saves: 3.8 GB for 1024 images.
"""

from functools import lru_cache

import numpy as np
import torch
import triton
import triton.language as tl
from PIL import Image

from pipeline.choices import draws
from pipeline.constants import LUMA_B, LUMA_G, LUMA_HALF, LUMA_R, LUMA_SHIFT
from pipeline.spec import SOLARIZE_THRESHOLD, Normalization
from pipeline.views.augment_cpu import normalization_table
from pipeline.views.blur_gpu import LUT_SIZE, blur_lines
from pipeline.views.resample_gpu import (
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
    TILE,
    TILE_PX,
    ViewPlan,
    field,
    fill_coefficients,
    resize_once,
    resized_rows,
    words,
)

# How the kernels are launched: the size of what a program makes, how far loops are unrolled, warps.
SETTINGS = {
    "fill_coefficients": {"OUTPUTS": 128},
    "resize_once": {"ROWS": 4, "LANES": 128, "TAPS": 4},
    "start_colours": {"ROWS": 8, "LANES": 128, "TAPS": 4},
    "finish_colours": {"ROWS": 8, "LANES": 128},
    "blur_lines": {"LINES": 64, "num_warps": 2},
    "look_up": {"BLOCK": 1024},
}
EXACT = {"enable_fp_fusion": False}  # Pillow is compiled without fused multiply-add
STRIDES = 28  # programs of resize_once a view
READ_PAST = 128  # coefficients behind the last, which a tile that reaches beyond the views reads and nobody uses

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

    Pillow's hue is a float32 quotient cut to 8 bits. Where the quotient is a whole number, its roundings decide whether
    that or the one below comes out: `exact_hues` (256,) tells. Held to Pillow for all 2²⁴ colours, both ways.
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
def _add(a, b):
    return a + b


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
    pitch: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    TAPS: tl.constexpr,
):
    """Grid (views, tiles): second pass, jitter up to contrast → colours, a pixel an int32; sums of luma (views,)."""
    view = tl.program_id(0)
    top, x = _place(pitch, ROWS, LANES)
    steps, before_mean = field(table, view, STEPS), field(table, view, STEPS_BEFORE_MEAN)
    levels = resized_rows(between, table, first, coefficients, view, top, x, side, pitch, ROWS, TAPS)
    levels = _jitter(levels, table, view, 0, before_mean, tl.full((), 0, tl.int32), exact_hues)
    to, packed = colours + view.to(tl.int64) * (side * pitch) + top * pitch + x, words(levels)
    for row in tl.static_range(ROWS):
        tl.store(to + row * pitch, packed[row], mask=top + row < side)
    if before_mean < steps:
        total = tl.full((LANES,), 0, tl.int32)
        for row in tl.static_range(ROWS):
            luma = _luma(levels[3 * row], levels[3 * row + 1], levels[3 * row + 2])
            total += tl.where((top + row < side) & (x < side), luma, 0)
        tl.atomic_add(sums + view, tl.reduce(total, None, _add).to(tl.int64), sem="relaxed")


@triton.jit
def finish_colours(
    table,
    colours,
    sums,
    exact_hues,
    lut,
    planes,
    out,
    side: tl.constexpr,
    pitch: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Grid (views, tiles): contrast and what follows, grey; views to be blurred → planes, others normalized → out."""
    view = tl.program_id(0)
    top, x = _place(pitch, ROWS, LANES)
    own, levels = colours + view.to(tl.int64) * (side * pitch) + top * pitch + x, ()
    for row in tl.static_range(ROWS):
        word = tl.load(own + row * pitch, mask=top + row < side, other=0)
        levels += (word & 255, (word >> 8) & 255, word >> 16)
    count = side * side
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


@triton.jit
def look_up(levels, lut, out, count, BLOCK: tl.constexpr):
    """Grid (⌈count / BLOCK⌉,): 8-bit values, channels last → what the network gets."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(levels + at, mask=at < count, other=0)
    tl.store(out + at, tl.load(lut + at % 3 * 256 + value), mask=at < count)


@lru_cache(maxsize=8)
def _lut(normalization: Normalization, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """What the network gets for every 8-bit value, (2, 3, 256): plain and solarized, by channel; rounded once."""
    plain = torch.from_numpy(normalization_table(normalization))
    values = torch.arange(256)
    solarized = plain[:, torch.where(values < SOLARIZE_THRESHOLD, values, 255 - values)]
    return torch.stack([plain, solarized]).to(dtype).to(device)


@lru_cache(maxsize=8)
def _exact_hues(device: torch.device) -> torch.Tensor:
    """Uint8 (256,): 1 where a hue of exactly k / 255 of the circle is k - 1 to Pillow, after its roundings."""
    sixths = 6 * np.arange(255)
    rest, full, none = sixths % 255, np.full(255, 255), np.zeros(255, int)
    ways = [(full, rest, none), (255 - rest, full, none), (none, full, rest)]
    ways += [(none, 255 - rest, full), (rest, none, full), (full, none, 255 - rest)]
    colours = np.stack([np.choose(sixths // 255, channel) for channel in zip(*ways, strict=True)], -1)
    hues = np.asarray(Image.fromarray(colours[None].astype(np.uint8)).convert("HSV"))[0, :, 0]
    return torch.from_numpy(np.append(np.arange(255) - hues, 0).astype(np.uint8)).to(device)


def make_views(
    pixels: torch.Tensor, plan: ViewPlan, normalization: Normalization, dtype: torch.dtype = torch.bfloat16
) -> tuple[torch.Tensor, ...]:
    """All views of a batch: V tensors (B, 3, H, W), channels-last in memory, of `dtype`, on the device of `pixels`.

    `pixels` is the flat uint8 buffer that plan_views planned for; the plan's table must be on the same device.
    Everything is queued on the current stream and nothing waits. Raises ValueError for tensors of another kind,
    and on a CPU without Triton's interpreter.
    """
    device, side = pixels.device, plan.side_px
    if pixels.dtype != torch.uint8 or pixels.ndim != 1 or not pixels.is_contiguous():
        raise ValueError(f"pixels are {pixels.dtype} {tuple(pixels.shape)}: give one contiguous uint8 buffer")
    if plan.table.device != device:
        raise ValueError(f"pixels are on {device}, the plan on {plan.table.device}: use plan.to(pixels.device)")
    if device.type != "cuda" and isinstance(blur_lines, triton.JITFunction):
        raise ValueError(f"pixels are on {device}: the kernels need a CUDA device, or TRITON_INTERPRET=1")
    lut = _lut(normalization, dtype, device)
    out = torch.empty((len(plan.table), side, side, 3), dtype=dtype, device=device)
    with torch.cuda.device_of(pixels):
        _launch(pixels, plan, lut, out)
    return tuple(view.permute(0, 3, 1, 2) for view in out.split(plan.images))


def normalize_views(levels: torch.Tensor, normalization: Normalization, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Finished views as bytes, uint8 (V, B, H, W, 3) → V tensors (B, 3, H, W) as from make_views.

    By table: a GPU divides by a number where it multiplies by its reciprocal, which has other last bits than the CPU's.
    """
    out = torch.empty(levels.shape, dtype=dtype, device=levels.device)
    with torch.cuda.device_of(levels):
        count, lut, block = levels.numel(), _lut(normalization, dtype, levels.device), SETTINGS["look_up"]["BLOCK"]
        look_up[(triton.cdiv(count, block),)](levels, lut, out, count, block)
    return tuple(view.permute(0, 3, 1, 2) for view in out)


KERNELS = (fill_coefficients, resize_once, start_colours, finish_colours, blur_lines)


def _empty(count: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A buffer whose size differs from batch to batch: rounded up, so that the allocator finds the last one again."""
    return torch.empty(
        triton.cdiv(count, 2**24) * 2**24 if device.type == "cuda" else count, dtype=dtype, device=device
    )


def _launch(pixels: torch.Tensor, plan: ViewPlan, lut: torch.Tensor, out: torch.Tensor) -> None:
    """The six kernels, and the memory between them."""
    table, side, pitch = plan.table, plan.side_px, plan.pitch_px
    n, device = len(table), pixels.device
    first = torch.empty((n, 2, side), dtype=torch.int32, device=device)
    fill, resize, start, finish, blur = (EXACT | SETTINGS[k.__name__] for k in KERNELS)
    coefficients = _empty(plan.taps * side + READ_PAST, torch.int32, device)
    between = _empty(plan.between_px, torch.int32, device)
    colours = torch.empty((n, side, pitch), dtype=torch.int32, device=device)
    planes, turned = torch.empty((2, n, 3, side, pitch), dtype=torch.uint8, device=device)
    sums = torch.zeros(n, dtype=torch.int64, device=device)
    hues, shape = _exact_hues(device), (side, pitch)

    def tiles(settings: dict[str, int]) -> tuple[int, int]:
        return n, pitch // TILE_PX * triton.cdiv(side, settings["LANES"] // TILE_PX * settings["ROWS"])

    fill_coefficients[(n, 2, triton.cdiv(side, fill["OUTPUTS"]))](table, first, coefficients, side, **fill)
    resize_once[(n, STRIDES)](pixels, table, first, coefficients, between, *shape, **resize)
    start_colours[tiles(start)](between, table, first, coefficients, colours, sums, hues, *shape, **start)
    finish_colours[tiles(finish)](table, colours, sums, hues, lut, planes, out, *shape, **finish)
    if plan.blur_radius < 0:
        return
    lines = (n, triton.cdiv(3 * side, blur["LINES"]))
    blur["RADIUS"] = max(plan.blur_radius, 1)  # one kernel for all sigma up to 2.4 px
    for source, target, last in ((planes, turned, False), (turned, out, True)):
        blur_lines[lines](table, source.view(torch.int32), target, lut, *shape, LAST=last, **blur)
