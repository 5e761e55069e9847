"""The views on the GPU: (pixels, params) → normalized pixels, the same integers as Pillow's, a whole batch at once.

    fill_coefficients ─▶ resize_once ─▶ start_colours ─▶ finish_colours ─▶ blur_lines ─▶ blur_lines ─▶ views
                         (resample_gpu)  columns, flip,   contrast, the     rows ×3       columns ×3,
                                         jitter up to     rest, grey;       (blurred      solarize,
                                         the contrast     unblurred views   views only)   normalize
                                                          end here

Between kernels everything is uint8, since Pillow rounds there, in planes (V · B, 3, side, pitch). Contrast needs the
mean of the whole picture at its place in the drawn order: that cuts the colour operations in two. No randomness.

Bytes for one image with two 224 px views, bf16, from boxes of 300 × 300 px, 1.1 of the 2 views blurred:

    kernel               reads     writes        kernel               reads     writes
    resize_once          540 kB    403 kB        blur_lines, rows     166 kB    166 kB
    start_colours        403 kB    301 kB        blur_lines, columns  166 kB    331 kB
    finish_colours       301 kB    437 kB        coefficients         20 kB, written once, read twice

3.2 MB together, of which 1.1 MB (the boxes in, the views out) no design saves: 3.3 GB for 1024 images.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from pipeline import draws
from pipeline.augment_cpu import normalization_table
from pipeline.blur_gpu import blur_lines, normalized
from pipeline.constants import LUMA_B, LUMA_G, LUMA_HALF, LUMA_R, LUMA_SHIFT
from pipeline.resample_gpu import (
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
    TILE_PX,
    ViewPlan,
    field,
    fill_coefficients,
    resize_once,
    resized_tile,
)
from pipeline.spec import Normalization

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
def _turn_hue(r, g, b, shift):
    """To 8-bit HSV, the hue shifted, and back: Pillow's results for every colour, by fewer roundings.

    Pillow's hue is a float32 quotient cut to 8 bits, and where the quotient is exact its roundings decide: the ones
    that matter are kept, the rest is integers. Held to Pillow for all 2²⁴ colours, both ways.
    """
    high, low = tl.maximum(r, tl.maximum(g, b)), tl.minimum(r, tl.minimum(g, b))
    spread = tl.maximum(high - low, 1).to(tl.float32)
    part = tl.div_rn((2 * high + low - r - g - b).to(tl.float32), spread)  # how far the middle one lies below the top
    red = tl.where(g < b, part - 1.0, 1.0 - part)
    green = tl.where(b <= r, 1.0 + part, 3.0 - part)
    blue = tl.where(r <= g, 3.0 + part, 5.0 - part)
    hue = tl.where(r == high, red, tl.where(g == high, green, blue))
    turns = tl.div_rn(hue, 6.0)
    turns = tl.where(hue < 0.0, 1.0 + turns, turns)
    h = tl.where(high == low, 0, (turns.to(tl.float64) * 255.0).to(tl.int32))
    s = tl.where(high == low, 0, (tl.div_rn(spread, tl.maximum(high, 1).to(tl.float32)) * 255.0).to(tl.int32))

    h = (h + shift) & 255
    sector = h * 6 // 255
    rest = h * 6 - sector * 255
    p = (2 * high * (255 - s) + 255) // 510
    q = (2 * high * (65025 - s * rest) + 65025) // 130050
    t = (2 * high * (65025 - s * (255 - rest)) + 65025) // 130050
    sector = tl.where(sector == 6, 0, sector)
    r = tl.where((sector == 0) | (sector == 5), high, tl.where(sector == 1, q, tl.where(sector == 4, t, p)))
    g = tl.where((sector == 1) | (sector == 2), high, tl.where(sector == 3, q, tl.where(sector == 0, t, p)))
    b = tl.where((sector == 3) | (sector == 4), high, tl.where(sector == 5, q, tl.where(sector == 2, t, p)))
    return r, g, b


@triton.jit
def _factor(table, view, index):
    return field(table, view, index).to(tl.float32, bitcast=True)


@triton.jit
def _jitter(r, g, b, table, view, first, end, mean):
    """The jitter operations first … end - 1 of the drawn order, on int32 of 8 bits."""
    for step in range(first, end):
        operation = field(table, view, ORDER + step)
        if operation == _BRIGHTNESS:
            factor = _factor(table, view, BRIGHTNESS_FACTOR)
            black = tl.full((), 0, tl.int32)
            r, g, b = _blend(black, r, factor), _blend(black, g, factor), _blend(black, b, factor)
        elif operation == _CONTRAST:
            factor = _factor(table, view, CONTRAST_FACTOR)
            r, g, b = _blend(mean, r, factor), _blend(mean, g, factor), _blend(mean, b, factor)
        elif operation == _SATURATION:
            factor = _factor(table, view, SATURATION_FACTOR)
            luma = _luma(r, g, b)
            r, g, b = _blend(luma, r, factor), _blend(luma, g, factor), _blend(luma, b, factor)
        elif operation == _HUE:
            r, g, b = _turn_hue(r, g, b, field(table, view, HUE_SHIFT))
    return r, g, b


@triton.jit
def _place(view, side, pitch, y, x):
    """Offsets of (y, x) in plane 0 of a view of (V · B, 3, side, pitch)."""
    return view.to(tl.int64) * (3 * side * pitch) + (y * pitch)[:, None] + x[None, :]


@triton.jit
def _add(a, b):
    return a + b


@triton.jit
def start_colours(
    between, table, first, coefficients, planes, sums, side, pitch, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Grid (views, y tiles, x tiles): resize's second pass, jitter up to contrast → planes; sums of luma (views,)."""
    view = tl.program_id(0)
    y = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    x = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (y < side)[:, None] & (x < side)[None, :]
    steps = field(table, view, STEPS)
    before_mean = field(table, view, STEPS_BEFORE_MEAN)
    r, g, b = resized_tile(between, table, first, coefficients, view, y, x, side, pitch)
    r, g, b = _jitter(r, g, b, table, view, 0, before_mean, tl.full((), 0, tl.int32))
    to = planes + _place(view, side, pitch, y, x)
    tl.store(to, r.to(tl.uint8), mask=mask)
    tl.store(to + side * pitch, g.to(tl.uint8), mask=mask)
    tl.store(to + 2 * side * pitch, b.to(tl.uint8), mask=mask)
    if before_mean < steps:
        total = tl.reduce(tl.where(mask, _luma(r, g, b), 0), None, _add)
        tl.atomic_add(sums + view, total.to(tl.int64), sem="relaxed")


@triton.jit
def finish_colours(table, planes, sums, lut, out, side, pitch, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Grid (views, y tiles, x tiles): contrast and what follows, grey → planes; unblurred views normalized → out."""
    view = tl.program_id(0)
    y = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    x = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (y < side)[:, None] & (x < side)[None, :]
    own = planes + _place(view, side, pitch, y, x)
    r = tl.load(own, mask=mask, other=0).to(tl.int32)
    g = tl.load(own + side * pitch, mask=mask, other=0).to(tl.int32)
    b = tl.load(own + 2 * side * pitch, mask=mask, other=0).to(tl.int32)
    count = side * side
    mean = ((2 * tl.load(sums + view) + count) // (2 * count)).to(tl.int32)
    r, g, b = _jitter(r, g, b, table, view, field(table, view, STEPS_BEFORE_MEAN), field(table, view, STEPS), mean)
    if field(table, view, GREY) != 0:
        r = _luma(r, g, b)
        g, b = r, r
    if field(table, view, BLUR) != 0:
        tl.store(own, r.to(tl.uint8), mask=mask)
        tl.store(own + side * pitch, g.to(tl.uint8), mask=mask)
        tl.store(own + 2 * side * pitch, b.to(tl.uint8), mask=mask)
    else:
        solarized = field(table, view, SOLARIZE) != 0
        to = out + view.to(tl.int64) * (3 * count) + (y * (3 * side))[:, None] + (x * 3)[None, :]
        tl.store(to, normalized(r, 0, solarized, lut), mask=mask)
        tl.store(to + 1, normalized(g, 1, solarized, lut), mask=mask)
        tl.store(to + 2, normalized(b, 2, solarized, lut), mask=mask)


@lru_cache(maxsize=8)
def _lut(normalization: Normalization, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The normalized value of every channel and 8-bit value, (3, 256), rounded to dtype once."""
    return torch.from_numpy(normalization_table(normalization)).to(dtype).to(device)


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


def _empty(count: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A buffer whose size differs from batch to batch: rounded up, so that the allocator finds the last one again."""
    return torch.empty(
        triton.cdiv(count, 2**24) * 2**24 if device.type == "cuda" else count, dtype=dtype, device=device
    )


def _launch(pixels: torch.Tensor, plan: ViewPlan, lut: torch.Tensor, out: torch.Tensor) -> None:
    """The six kernels, and the memory between them."""
    table, side, pitch = plan.table, plan.side_px, plan.pitch_bytes
    n, device = len(table), pixels.device
    first = torch.empty((n, 2, side), dtype=torch.int32, device=device)
    coefficients = _empty(plan.taps * side, torch.int32, device)
    between = _empty(plan.between_bytes, torch.uint8, device)
    planes = torch.empty((n, 3, side, pitch), dtype=torch.uint8, device=device)
    sums = torch.zeros(n, dtype=torch.int64, device=device)
    tiles = (n, triton.cdiv(side, TILE_PX), triton.cdiv(side, TILE_PX))
    lines = (n, triton.cdiv(3 * side, 64))
    exact = {"enable_fp_fusion": False}  # Pillow is compiled without fused multiply-add

    fill_coefficients[(n, 2, triton.cdiv(side, 128))](table, first, coefficients, side, OUTPUTS=128, **exact)
    tile = {"ROWS": 16, "COLUMNS": 32, "LINES": 4, "BYTES": 512}
    resize_once[(n, 28)](pixels, table, first, coefficients, between, side, pitch, **tile, **exact)
    tile = {"ROWS": TILE_PX, "COLUMNS": TILE_PX}
    start_colours[tiles](between, table, first, coefficients, planes, sums, side, pitch, **tile, **exact)
    finish_colours[tiles](table, planes, sums, lut, out, side, pitch, **tile, **exact)
    if plan.blur_radius < 0:
        return
    turned = torch.empty_like(planes)
    walk = {"RADIUS": max(plan.blur_radius, 1), "LINES": 64, "num_warps": 2}  # one kernel for all sigma up to 2.4 px
    for source, target, last in ((planes, turned, False), (turned, out, True)):
        words = source.view(torch.int32)
        blur_lines[lines](table, words, target, lut, side, pitch, LAST=last, **walk, **exact)
