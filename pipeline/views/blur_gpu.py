"""The end of a view on the GPU: Pillow's Gaussian blur, solarize, normalize.

Pillow blurs by three passes of one box along the rows, then three along the columns, each rounded to 8 bits
(blur_cpu.py gives the weights). Here three passes are one walk along a line: what a pass still needs of the one before
it is a window in registers, and the sums are the same integers as Pillow's running ones.
"""

import triton
import triton.language as tl

from pipeline.views.gpu_plan import BLUR, BLUR_EDGE, BLUR_INNER, BLUR_RADIUS, SOLARIZE
from pipeline.views.resample_gpu import TILE, field

LUT_SIZE = tl.constexpr(3 * 256)  # values of a look-up table: what the network gets, by channel and 8-bit value


@triton.jit
def _push(window, value):
    """The window of consecutive values of a line, moved on by one."""
    moved = window[1:]
    moved += (value,)
    return moved


@triton.jit
def _push_end(window, value, at, side):
    """The same near a line's ends: its first value fills the window, past its end the last one repeats."""
    value = tl.where(at < side, value, window[len(window) - 1])
    moved = ()
    for i in tl.static_range(1, len(window)):
        moved += (tl.where(at == 0, value, window[i]),)
    moved += (value,)
    return moved


@triton.jit
def _box(window, weights, RADIUS: tl.constexpr):
    """The weighted mean about the window's middle, 24-bit fixed point, uint32."""
    total = window[RADIUS + 1] * weights[0] + (1 << 23)
    for i in tl.static_range(1, RADIUS + 2):
        total += (window[RADIUS + 1 - i] + window[RADIUS + 1 + i]) * weights[i]
    return total >> 24


@triton.jit
def _box_weights(table, view, RADIUS: tl.constexpr):
    """Weights of the pixels 0 … RADIUS + 1 away from the middle, uint32."""
    radius = field(table, view, BLUR_RADIUS)
    inner, edge = field(table, view, BLUR_INNER), field(table, view, BLUR_EDGE)
    weights = ()
    for i in tl.static_range(RADIUS + 2):
        weights += (tl.where(i <= radius, inner, tl.where(i == radius + 1, edge, 0)).to(tl.uint32),)
    return weights


@triton.jit
def _walk(words, start, passes, weights, target, side, END: tl.constexpr, LAST: tl.constexpr, RADIUS: tl.constexpr):
    """Sixteen pixels further along a line, from `start` on: three passes, each RADIUS + 1 pixels behind the one before.

    END: the line may begin or end here. `target` is where a lane's results go: pointer, step, look-up table of its
    channel (used when LAST), whether there is such a line.
    """
    to, step, values, wanted = target
    delay: tl.constexpr = RADIUS + 1
    first, second, third = passes
    # Four words of four bytes each lane: split takes the last axis apart, two halves at a time.
    left, right = tl.split(tl.reshape(words, (words.shape[0], 2, 2)))
    word_0, word_2 = tl.split(left)
    word_1, word_3 = tl.split(right)
    four = (word_0, word_1, word_2, word_3)
    for i in tl.static_range(16):
        at = start + i
        value = (four[i // 4].to(tl.uint32, bitcast=True) >> (i % 4 * 8)) & 255
        if END:
            first = _push_end(first, value, at, side)
            second = _push_end(second, _box(first, weights, RADIUS), at - delay, side)
            third = _push_end(third, _box(second, weights, RADIUS), at - 2 * delay, side)
        else:
            first = _push(first, value)
            second = _push(second, _box(first, weights, RADIUS))
            third = _push(third, _box(second, weights, RADIUS))
        done = at - 3 * delay
        if (not END) or ((done >= 0) & (done < side)):
            blurred = _box(third, weights, RADIUS).to(tl.int32)
            if LAST:
                tl.store(to + done * step, tl.load(values + blurred), mask=wanted)
            else:
                tl.store(to + done * step, blurred.to(tl.uint8), mask=wanted)
    return first, second, third


@triton.jit
def blur_lines(
    table, source, out, lut, side: tl.constexpr, RADIUS: tl.constexpr, LAST: tl.constexpr, LINES: tl.constexpr
):
    """Grid (views, ⌈3 · side / LINES⌉): three box passes along every line of blurred views, in registers.

    A lane walks down one line of `source` (planes as int32, sixteen pixels a load), keeps a window of 2 · RADIUS + 3
    values for each pass, and writes across the lines, so that lanes write side by side: transposed planes or, when
    LAST, where lines are columns, solarized and normalized views.
    """
    pitch: tl.constexpr = (side + TILE - 1) // TILE * TILE
    view = tl.program_id(0)
    if field(table, view, BLUR) != 0:
        lane = tl.program_id(1) * LINES + tl.arange(0, LINES)
        wanted = lane < 3 * side
        inside = tl.minimum(lane, 3 * side - 1)
        if LAST:  # lanes in the order of the output's elements
            channel, line = inside % 3, inside // 3
            step = 3 * side
            to = out + view.to(tl.int64) * (side * step) + lane
        else:
            channel, line = inside // side, inside % side
            step = pitch
            to = out + view.to(tl.int64) * (3 * side * pitch) + channel * (side * pitch) + line
        at = view.to(tl.int64) * (3 * side * pitch // 4) + (channel * side + line) * (pitch // 4)
        words = source + tl.multiple_of(at, 8)[:, None] + tl.arange(0, 4)[None, :]
        values = lut + field(table, view, SOLARIZE) * LUT_SIZE + channel * 256
        target, weights = (to, step, values, wanted), _box_weights(table, view, RADIUS)
        window = (tl.full((LINES,), 0, tl.uint32),) * (2 * RADIUS + 3)
        passes = (window, window, window)
        for start in range(0, side + 3 * (RADIUS + 1), 16):
            loaded = tl.load(words + tl.minimum(start, pitch - 16) // 4)
            # In a line's middle no pass looks at an end: less to compute for most of the pixels.
            if (start > 3 * RADIUS + 2) & (start + 16 <= side):
                passes = _walk(loaded, start, passes, weights, target, side, False, LAST, RADIUS)
            else:
                passes = _walk(loaded, start, passes, weights, target, side, True, LAST, RADIUS)
