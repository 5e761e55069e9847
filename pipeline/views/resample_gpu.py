"""Crop, resize, flip on the GPU: what the kernels need to know about a batch, and Pillow's two-pass resize in Triton.

The arithmetic is Pillow's, as resample_cpu.py tells it: coefficients in float64, rounded to 22-bit fixed point; one
pass along an axis, 8 bits, then the other axis; the axis that shrinks more goes first. Kernels work on a whole batch;
`view` is v · B + b everywhere here.

    fill_coefficients ─┬──────────────────────────────────────────────────┐
                       ▼                                                  ▼
    pixels ── resize_once ──▶ between, a pixel an int32: rows resized ── resized_rows ──▶ r, g, b of a tile of a view
                              in width (box height, pitch), or in
                              height (side, box width)
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from pipeline.choices.draws import CONTRAST, ViewParams
from pipeline.compiled import jit
from pipeline.views.blur_cpu import box_weights
from pipeline.views.resample_cpu import height_first

SUPPORT = {"bicubic": 2, "bilinear": 1}  # px of the filter to each side, at scale 1
COEFFICIENT_BITS = 22  # Pillow's fixed point
MAX_SIGMA_PX = 9.4  # of the blur: a box radius of 8 px
TILE_PX = 32  # of a view, both ways
TILE = tl.constexpr(TILE_PX)

# The columns of ViewPlan.table: names for the host, constants for the kernels.
FIELDS = (
    *("pixel", "row_bytes"),  # byte of `pixels` where the box starts, bytes from row to row
    *("box_height", "box_width", "resized_height", "resized_width", "window_top", "window_left"),
    *("flip", "support", "height_first"),
    *("taps_y", "taps_x", "coefficients_y", "coefficients_x"),  # taps of an output, where they start in their buffer
    "between",  # pixel where this view's intermediate starts
    *("order_0", "order_1", "order_2", "order_3"),
    *("steps_before_mean", "steps"),  # how many of the four run before the contrast's mean is known, and in all
    *("brightness", "contrast", "saturation", "hue"),  # three float32 as their bits; hue as its 8-bit shift
    *("grey", "solarize", "blur", "blur_radius", "blur_inner", "blur_edge"),
)
# fmt: off
(PIXEL, ROW_BYTES, BOX_HEIGHT, BOX_WIDTH, RESIZED_HEIGHT, _, WINDOW_TOP, _, FLIP, SUPPORT_PX, HEIGHT_FIRST,
 TAPS_Y, TAPS_X, COEFFICIENTS_Y, COEFFICIENTS_X, BETWEEN, ORDER, _, _, _, STEPS_BEFORE_MEAN, STEPS,
 BRIGHTNESS_FACTOR, CONTRAST_FACTOR, SATURATION_FACTOR, HUE_SHIFT, GREY, SOLARIZE, BLUR, BLUR_RADIUS, BLUR_INNER,
 BLUR_EDGE) = (tl.constexpr(i) for i in range(len(FIELDS)))
# fmt: on
WIDTH = tl.constexpr(len(FIELDS))  # of a table row
_BITS = tl.constexpr(COEFFICIENT_BITS)
_HALF = tl.constexpr(1 << (COEFFICIENT_BITS - 1))
_ONE = tl.constexpr(float(1 << COEFFICIENT_BITS))


class ViewPlan(NamedTuple):
    """What the kernels need to know about V views of B images, and the sizes the host needs to allocate.

    table          int64 (V · B, len(FIELDS)), row v · B + b
    images         B
    side_px        H = W of the views
    pitch_px       from row to row of an intermediate: side_px, rounded up to whole tiles
    between_px     of the intermediate of all views
    taps           of both axes of all views: rows of the coefficient buffer
    blur_radius    the largest box radius of any view, px; -1 = no view is blurred
    """

    table: torch.Tensor
    images: int
    side_px: int
    pitch_px: int
    between_px: int
    taps: int
    blur_radius: int

    def to(self, device: torch.device | str) -> "ViewPlan":
        """The same plan with its table on `device`: one asynchronous copy of 256 bytes a view."""
        return self._replace(table=self.table.to(device, non_blocking=True))


@jit
def _rules(box_height, box_width, resized_height, resized_width, sigma_px):
    """(n, 4): Pillow's choices for each view, by the CPU's functions: height first, blur radius, inner, edge weight."""
    out = np.empty((len(sigma_px), 4), np.int64)
    for i in range(len(out)):
        out[i, 0] = height_first(box_height[i], box_width[i], resized_height[i], resized_width[i])
        out[i, 1:] = -1
        if sigma_px[i] > 0:
            out[i, 1], out[i, 2], out[i, 3] = box_weights(sigma_px[i])
    return out


def _taps(box: np.ndarray, resized: np.ndarray, support: np.ndarray) -> np.ndarray:
    """An upper bound of the taps of one output pixel; a tap beyond it would have weight zero."""
    return np.minimum(np.ceil(2 * support * np.maximum(box / resized, 1)).astype(np.int64), box)


def _starts(counts: np.ndarray) -> np.ndarray:
    """Where each of some consecutive parts starts."""
    return np.cumsum(counts) - counts


def _round_up(count, multiple: int):
    return -(-count // multiple) * multiple


def _check(params: ViewParams, starts: np.ndarray, heights: np.ndarray, widths: np.ndarray) -> None:
    if not len(params.flip) == len(starts) == len(heights) == len(widths):
        raise ValueError(f"parameters of {len(params.flip)} images for {len(starts)} images: give one row an image")
    inside = (params.box_top >= 0) & (params.box_left >= 0) & (params.box_height > 0) & (params.box_width > 0)
    inside &= params.box_top + params.box_height <= heights[:, None]
    inside &= params.box_left + params.box_width <= widths[:, None]
    if not inside.all():
        b, v = np.argwhere(~inside)[0]
        raise ValueError(
            f"the box of image {b}, view {v} leaves its {heights[b]} × {widths[b]} px: draw it for this size"
        )
    if (params.sigma_px > MAX_SIGMA_PX).any():
        raise ValueError(
            f"a blur of sigma {params.sigma_px.max():g} px is wider than the kernels' registers: "
            f"draw at most {MAX_SIGMA_PX} px, or make the views on the CPU"
        )
    if (heights * widths * 3 >= 2**31).any():
        raise ValueError(f"image {np.argmax(heights * widths)} has 2³¹ bytes or more: store it smaller")


def plan_views(
    params: ViewParams,
    starts: np.ndarray,
    heights: np.ndarray,
    widths: np.ndarray,
    interpolations: Sequence[str],
    resolution_px: int,
) -> ViewPlan:
    """The plan of all views of B images whose pixels lie in one uint8 buffer, image b (h, w, 3) from byte starts[b] on.

    `starts`, `heights`, `widths` are (B,); boxes are relative to what is in the buffer (who ships a cut of the image
    shifts them). `interpolations` has one of SUPPORT's names a view. The table is in pinned memory where there is a
    GPU. Raises ValueError for boxes outside their image.
    """
    starts, heights, widths = (np.asarray(a, np.int64) for a in (starts, heights, widths))
    _check(params, starts, heights, widths)
    images, views = params.flip.shape
    p = ViewParams(*(np.swapaxes(a, 0, 1).reshape(images * views, *a.shape[2:]) for a in params))
    starts, row_bytes = np.tile(starts, views), np.tile(widths, views) * 3
    support = np.repeat([SUPPORT[name] for name in interpolations], images)
    taps_y = _taps(p.box_height, p.resized_height, support)
    taps_x = _taps(p.box_width, p.resized_width, support)
    taps = taps_y + taps_x
    rules = _rules(p.box_height, p.box_width, p.resized_height, p.resized_width, p.sigma_px)
    is_contrast = p.jitter_order == CONTRAST
    contrast_at = np.where(is_contrast.any(1), is_contrast.argmax(1), 4)
    pitch = _round_up(resolution_px, TILE_PX)
    between = np.where(rules[:, 0], p.box_width.astype(np.int64) * resolution_px, p.box_height.astype(np.int64) * pitch)
    between = _round_up(between, TILE_PX)
    columns = {name: getattr(p, name) for name in FIELDS if name in ViewParams._fields}
    columns |= {name: columns[name].view(np.int32) for name in ("brightness", "contrast", "saturation")}
    columns |= {f"order_{i}": p.jitter_order[:, i] for i in range(4)}
    columns |= {
        "pixel": starts + p.box_top * row_bytes + p.box_left * 3,
        "row_bytes": row_bytes,
        "support": support,
        "height_first": rules[:, 0],
        "taps_y": taps_y,
        "taps_x": taps_x,
        "coefficients_y": _starts(taps),
        "coefficients_x": _starts(taps) + taps_y,
        "between": _starts(between),
        "steps_before_mean": np.where(p.jitter, contrast_at, 0),
        "steps": np.where(p.jitter, 4, 0),
        "hue": (p.hue.astype(np.float64) * 255).astype(np.int64) & 255,
        "blur": p.sigma_px > 0,
        "blur_radius": rules[:, 1],
        "blur_inner": rules[:, 2],
        "blur_edge": rules[:, 3],
    }
    table = torch.empty((images * views, len(FIELDS)), dtype=torch.int64, pin_memory=torch.cuda.is_available())
    np.stack([columns[name] for name in FIELDS], 1, out=table.numpy(), casting="unsafe")
    return ViewPlan(
        table, images, resolution_px, pitch, int(between.sum()), int(taps.sum()), int(rules[:, 1].max(initial=-1))
    )


@triton.jit
def field(table, view, index):
    """One number of the plan, int32."""
    return tl.load(table + view.to(tl.int64) * WIDTH + index).to(tl.int32)


@triton.jit
def field64(table, view, index):
    """One number of the plan that may pass 2³¹: a place in a buffer."""
    return tl.load(table + view.to(tl.int64) * WIDTH + index)


@triton.jit
def _weight(x, support):
    """The filter's weight at distance x: the triangle (support 1) or Keys' cubic, a = -0.5 (support 2)."""
    x = tl.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    cubic = tl.where(x < 1.0, near, tl.where(x < 2.0, far, 0.0))
    return tl.where(support == 2, cubic, tl.maximum(1.0 - x, 0.0))


@triton.jit
def fill_coefficients(table, first, coefficients, side: tl.constexpr, OUTPUTS: tl.constexpr):
    """Grid (views, 2 axes, ⌈side / OUTPUTS⌉) → first int32 (views, 2, side), coefficients int32 (taps, side).

    Axis 0 is y, 1 is x. The flip is in here: it is the coefficients of x in the reverse order. `first` is the first
    input that an output reads; where its taps would leave the box it lies before the filter, and the weights of what
    comes too early are zero. An output outside the resized box gets zeros. So nobody has to clamp or to mask a tap.
    """
    view, axis = tl.program_id(0), tl.program_id(1)
    i = tl.program_id(2) * OUTPUTS + tl.arange(0, OUTPUTS)
    own = table + view.to(tl.int64) * WIDTH
    box = tl.load(own + BOX_HEIGHT + axis).to(tl.int32)
    resized = tl.load(own + RESIZED_HEIGHT + axis).to(tl.int32)
    window = tl.load(own + WINDOW_TOP + axis).to(tl.int32)
    taps = tl.load(own + TAPS_Y + axis).to(tl.int32)
    target = coefficients + tl.load(own + COEFFICIENTS_Y + axis) * side
    support = field(table, view, SUPPORT_PX)
    mirrored = (field(table, view, FLIP) * axis) != 0
    out = tl.where(mirrored, side - 1 - i, i) + window
    inside = (out >= 0) & (out < resized)

    scale = box.to(tl.float64) / resized.to(tl.float64)
    filter_scale = tl.maximum(scale, 1.0)
    reach = support.to(tl.float64) * filter_scale
    inverse = 1.0 / filter_scale
    centre = (out.to(tl.float64) + 0.5) * scale
    begin = tl.maximum((centre - reach + 0.5).to(tl.int32), 0)
    end = tl.minimum((centre + reach + 0.5).to(tl.int32), box)
    start = tl.where(inside, tl.minimum(begin, box - taps), 0)
    total = tl.full((OUTPUTS,), 0.0, tl.float64)
    for k in range(taps):
        weight = _weight(((start + k).to(tl.float64) - centre + 0.5) * inverse, support)
        total += tl.where((start + k >= begin) & (start + k < end), weight, 0.0)
    total = tl.where(inside & (total != 0.0), total, 1.0)
    for k in range(taps):
        weight = _weight(((start + k).to(tl.float64) - centre + 0.5) * inverse, support)
        fixed = weight / total * _ONE
        rounded = tl.where(fixed < 0.0, fixed - 0.5, fixed + 0.5).to(tl.int32)
        wanted = inside & (start + k >= begin) & (start + k < end)
        tl.store(target + k * side + i, tl.where(wanted, rounded, 0), mask=i < side)
    tl.store(first + (view * 2 + axis).to(tl.int64) * side + i, start, mask=i < side)


@triton.jit
def clip8(fixed):
    """A fixed-point sum as 8 bits, int32."""
    return tl.minimum(tl.maximum(fixed >> _BITS, 0), 255)


@triton.jit
def _axis(table, first, coefficients, view, axis: tl.constexpr, i, side):
    """Of outputs i along an axis (0 = y): taps, the first input of each, pointers to their first weights.

    Outputs past the side are taken for the last one: what is made of them is never stored.
    """
    i = tl.minimum(i, side - 1)
    begin = tl.load(first + (view * 2 + axis).to(tl.int64) * side + i)
    weights = coefficients + field64(table, view, COEFFICIENTS_Y + axis) * side
    return field(table, view, TAPS_Y + axis), begin, weights + i


@triton.jit
def _tops(table, first, coefficients, view, top, side, ROWS: tl.constexpr):
    """Of ROWS rows of outputs from `top` on: taps, a tuple of their first inputs, pointers to the first's weights."""
    begins = ()
    for row in tl.static_range(ROWS):
        begins += (_axis(table, first, coefficients, view, 0, top + row, side)[1],)
    weights = coefficients + field64(table, view, COEFFICIENTS_Y) * side + top
    return field(table, view, TAPS_Y), begins, weights


@triton.jit
def _sums(
    rows, step, taps, weights, side, ROWS: tl.constexpr, DOWN: tl.constexpr, WORDS: tl.constexpr, TAPS: tl.constexpr
):
    """A pass for ROWS rows of outputs: a tuple, red, green, blue of each, int32 of 8 bits.

    `rows` are pointers to each row's first input at each lane's column, and a tap further is `step` further: along the
    row with weights for each column or, DOWN, from row to row with weights for each row. Inputs are three bytes a pixel
    or, WORDS, three in an int32, which is one load for three.
    """
    sums = (tl.full(rows[0].shape, _HALF, tl.int32),) * (3 * ROWS)
    for _ in tl.range(taps, loop_unroll_factor=TAPS):
        added, moved = (), ()
        weight = tl.load(weights)
        for row in tl.static_range(ROWS):
            if DOWN and row > 0:
                weight = tl.load(weights + row)
            if WORDS:
                word = tl.load(rows[row])
                r, g, b = word & 255, (word >> 8) & 255, word >> 16
            else:
                r = tl.load(rows[row]).to(tl.int32)
                g = tl.load(rows[row] + 1).to(tl.int32)
                b = tl.load(rows[row] + 2).to(tl.int32)
            added += (sums[3 * row] + r * weight, sums[3 * row + 1] + g * weight, sums[3 * row + 2] + b * weight)
            moved += (rows[row] + step,)
        sums, rows = added, moved
        weights += side
    levels = ()
    for i in tl.static_range(3 * ROWS):
        levels += (clip8(sums[i]),)
    return levels


@triton.jit
def words(levels):
    """A tuple of red, green, blue, red, … as one of pixels, int32: red in the lowest byte."""
    packed = ()
    for i in tl.static_range(0, len(levels), 3):
        packed += (levels[i] | (levels[i + 1] << 8) | (levels[i + 2] << 16),)
    return packed


@triton.jit
def resize_once(
    pixels,
    table,
    first,
    coefficients,
    between,
    side: tl.constexpr,
    pitch: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    TAPS: tl.constexpr,
):
    """Grid (views, strides): the first pass. A program makes every strides-th tile of its view's intermediate.

    A tile is 32 columns × LANES / 32 · ROWS rows, every lane with ROWS of them below each other.
    """
    view = tl.program_id(0)
    box_height, box_width = field(table, view, BOX_HEIGHT), field(table, view, BOX_WIDTH)
    down = field(table, view, HEIGHT_FIRST) != 0
    height, width = tl.where(down, side, box_height), tl.where(down, box_width, pitch)
    source, row_bytes = pixels + field64(table, view, PIXEL), field(table, view, ROW_BYTES)
    target = between + field64(table, view, BETWEEN)
    lane, tile_rows = tl.arange(0, LANES), LANES // TILE * ROWS
    across = (width + TILE - 1) // TILE
    for tile in range(tl.program_id(1), (height + tile_rows - 1) // tile_rows * across, tl.num_programs(1)):
        above = tile // across
        top = above * tile_rows + lane // TILE * ROWS
        x = (tile - above * across) * TILE + lane % TILE
        if down:
            taps, begins, of_y = _tops(table, first, coefficients, view, top, side, ROWS)
            column, lines = source + tl.minimum(x, width - 1) * 3, ()
            for row in tl.static_range(ROWS):
                lines += (column + begins[row] * row_bytes,)
            levels = _sums(lines, row_bytes, taps, of_y, side, ROWS, True, False, TAPS)
        else:
            taps, begin, of_x = _axis(table, first, coefficients, view, 1, x, side)
            rows = ()
            for row in tl.static_range(ROWS):
                rows += (source + tl.minimum(top + row, height - 1) * row_bytes + begin * 3,)
            levels = _sums(rows, 3, taps, of_x, side, ROWS, False, False, TAPS)
        packed = words(levels)
        for row in tl.static_range(ROWS):
            tl.store(target + (top + row) * width + x, packed[row], mask=(top + row < height) & (x < width))


@triton.jit
def resized_rows(
    between, table, first, coefficients, view, top, x, side, pitch, ROWS: tl.constexpr, TAPS: tl.constexpr
):
    """The second pass, for ROWS rows from `top` on, at x, both (LANES,): a tuple of red, green, blue of each."""
    source = between + field64(table, view, BETWEEN)
    if field(table, view, HEIGHT_FIRST) != 0:
        taps, begin, of_x = _axis(table, first, coefficients, view, 1, x, side)
        width, rows = field(table, view, BOX_WIDTH), ()
        for row in tl.static_range(ROWS):
            rows += (source + tl.minimum(top + row, side - 1) * width + begin,)
        levels = _sums(rows, 1, taps, of_x, side, ROWS, False, True, TAPS)
    else:
        taps, begins, of_y = _tops(table, first, coefficients, view, top, side, ROWS)
        lines = ()
        for row in tl.static_range(ROWS):
            lines += (source + begins[row] * pitch + x,)
        levels = _sums(lines, pitch, taps, of_y, side, ROWS, True, True, TAPS)
    return levels
