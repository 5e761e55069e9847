"""Crop, resize, flip on the GPU: Pillow's two-pass resize in Triton, by the numbers of a ViewPlan (gpu_plan.py).

The arithmetic is Pillow's, as resample_cpu.py describes it: coefficients in float64, rounded to 22-bit fixed point; one
pass along an axis, 8 bits, then the other axis; the axis that shrinks more goes first. Kernels work on a whole batch;
`view` is v · B + b everywhere here.

    fill_coefficients ─┬──────────────────────────────────────────────────┐
                       ▼                                                  ▼
    pixels ── resize_once ──▶ between, a pixel an int32: rows resized ── resized_rows ──▶ r, g, b of a tile of a view
                              in width (box height, pitch), or in
                              height (side, box width)
"""

import triton
import triton.language as tl

from pipeline.views.gpu_plan import (
    BETWEEN,
    BOX_HEIGHT,
    BOX_WIDTH,
    COEFFICIENTS_Y,
    FLIP,
    HEIGHT_FIRST,
    PIXEL,
    RESIZED_HEIGHT,
    ROW_BYTES,
    SUPPORT_PX,
    TAPS_Y,
    TILE_PX,
    WIDTH,
    WINDOW_TOP,
)

COEFFICIENT_BITS = 22  # Pillow's fixed point
TILE = tl.constexpr(TILE_PX)
_BITS = tl.constexpr(COEFFICIENT_BITS)
_HALF = tl.constexpr(1 << (COEFFICIENT_BITS - 1))
_ONE = tl.constexpr(float(1 << COEFFICIENT_BITS))


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
    # Twice over the taps: Pillow divides every weight by the sum of all, and rounds halves away from zero.
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
        # Along the rows all rows share a column's weight; down the columns each row has its own.
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
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    TAPS: tl.constexpr,
):
    """Grid (views, strides): the first pass. A program makes every strides-th tile of its view's intermediate.

    A tile is 32 columns × LANES / 32 · ROWS rows, every lane with ROWS of them below each other.
    """
    pitch: tl.constexpr = (side + TILE - 1) // TILE * TILE
    view = tl.program_id(0)
    box_height, box_width = field(table, view, BOX_HEIGHT), field(table, view, BOX_WIDTH)
    down = field(table, view, HEIGHT_FIRST) != 0
    height, width = tl.where(down, side, box_height), tl.where(down, box_width, pitch)
    source, row_bytes = pixels + field64(table, view, PIXEL), field(table, view, ROW_BYTES)
    target = between + field64(table, view, BETWEEN)
    lane, tile_rows = tl.arange(0, LANES), LANES // TILE * ROWS
    across = (width + TILE - 1) // TILE
    # Views differ in size, so each has the same number of programs, which share its tiles.
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
    between, table, first, coefficients, view, top, x, side: tl.constexpr, ROWS: tl.constexpr, TAPS: tl.constexpr
):
    """The second pass, for ROWS rows from `top` on, at x, both (LANES,): a tuple of red, green, blue of each."""
    pitch: tl.constexpr = (side + TILE - 1) // TILE * TILE
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
