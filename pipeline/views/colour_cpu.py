"""The colour operations of a view on the CPU: torchvision's ColorJitter on Pillow images, greyscale, solarize.

Pillow rounds to 8 bits after each operation, so between the operations pixels are whole numbers; here they stay
float32 holding whole numbers, one block of a few thousand at a time, in cache. An image is read and written
once up to the contrast, which needs the mean of the whole picture at that point, and once from there on.
"""

import numpy as np

from pipeline.choices.draws import BRIGHTNESS, CONTRAST, HUE, SATURATION
from pipeline.compiled import kernel, unsigned
from pipeline.constants import LUMA_B, LUMA_G, LUMA_HALF, LUMA_R, LUMA_SHIFT
from pipeline.spec import SOLARIZE_THRESHOLD
from pipeline.views.vector_cpu import widest_vectors

GREY = 5  # the operation of a program beside those of the jitter
PROGRAM_LENGTH = 5
BLOCK = 1024  # pixels at work at once: three channels of float32 fill a quarter of the first-level cache

# float32, because a Python number would turn a whole expression into float64.
_0, _1, _2, _4, _6, _255, _256 = (np.float32(n) for n in (0, 1, 2, 4, 6, 255, 256))
_1_5, _2_5, _3_5 = (np.float32(n) for n in (1.5, 2.5, 3.5))
_HALF, _65025 = np.float32(0.5), np.float32(255 * 255)
_PER_255, _PER_65025 = np.float32(1 / 255), np.float32(1 / 65025)
# Every partial sum of the luma is a whole number below 2^24, so float32 holds it exactly.
_LUMA_R, _LUMA_G, _LUMA_B, _LUMA_HALF = (np.float32(n) for n in (LUMA_R, LUMA_G, LUMA_B, LUMA_HALF))
_LUMA_SCALE = np.float32(2.0**-LUMA_SHIFT)


@kernel
def _whole(value):
    """A non-negative float32 without its fraction."""
    return np.float32(np.int32(value))


@kernel
def _luma(r, g, b):
    """Pillow's "L"."""
    return _whole((r * _LUMA_R + g * _LUMA_G + b * _LUMA_B + _LUMA_HALF) * _LUMA_SCALE)


@kernel
def _blend(background, value, factor):
    """background + factor · (value - background), clipped and cut to 8 bits (Pillow, ImagingBlend)."""
    mixed = background + factor * (value - background)
    mixed = mixed if mixed > _0 else _0
    return _whole(mixed if mixed < _255 else _255)


@kernel
def _blend_all(block, background, factor):
    """Brightness, with a background of 0, and contrast, with that of the picture's mean."""
    widest_vectors()
    for i in range(3 * BLOCK):
        block[i] = _blend(background, block[i], factor)


@kernel
def _saturate(block, factor):
    """Every pixel blended with its own grey."""
    widest_vectors()
    for i in range(BLOCK):
        r, g, b = block[i], block[BLOCK + i], block[2 * BLOCK + i]
        luma = _luma(r, g, b)
        block[i] = _blend(luma, r, factor)
        block[BLOCK + i] = _blend(luma, g, factor)
        block[2 * BLOCK + i] = _blend(luma, b, factor)


@kernel
def _turn_hue(block, shift):
    """To 8-bit hue, saturation, value, hue + shift modulo 256, and back (Pillow's rgb2hsv, hsv2rgb; 0 <= shift < 256).

    Pillow mixes float32 and float64. These float32 formulas give the same 8 bits for each of the 2^24 colours
    and each shift; the tests try them. The middle one of the three channels carries the hue: it is a whole number
    of sixths of a turn plus or minus part = (highest - middle) / (highest - lowest).
    """
    widest_vectors()
    for i in range(BLOCK):
        r, g, b = block[i], block[BLOCK + i], block[2 * BLOCK + i]
        high, low = r if r > g else g, r if r < g else g
        high, low = high if high > b else b, low if low < b else b
        spread = high - low
        part = (high - (r + g + b - high - low)) / (spread if spread > _0 else _1)
        rising = (g < b) if r == high else ((r >= b) if g == high else (g >= r))
        base = _0 if r == high else (_2 if g == high else _4)
        base = base - _1 if rising else base + _1
        turns = (base + part if rising else base - part) / _6
        turns = turns + _1 if turns < _0 else turns
        turns = turns - _1 if turns >= _1 else turns
        hue = _whole(turns * _255) + shift
        hue = hue - _256 if hue >= _256 else hue
        saturation = _whole(spread * _255 / (high if high > _0 else _1))
        # Back: the sixth of the circle, and the position in it, 0 … 255.
        sixth = _whole((_6 * hue + _HALF) * _PER_255)
        position = _6 * hue - _255 * sixth
        odd = sixth - _2 * _whole(sixth * _HALF)
        position = position if odd > _0 else _255 - position
        lowest = _whole(high * (_255 - saturation) * _PER_255 + _HALF)
        middle = _whole(high * (_65025 - saturation * position) * _PER_65025 + _HALF)
        # How far the sixth is from the two in which a channel is lowest (red) or highest (green, blue).
        from_cyan, from_green, from_blue = abs(sixth - _2_5), abs(sixth - _1_5), abs(sixth - _3_5)
        block[i] = high if from_cyan > _2 else (middle if from_cyan > _1 else lowest)
        block[BLOCK + i] = high if from_green < _1 else (middle if from_green < _2 else lowest)
        block[2 * BLOCK + i] = high if from_blue < _1 else (middle if from_blue < _2 else lowest)


@kernel
def _to_grey(block):
    widest_vectors()
    for i in range(BLOCK):
        luma = _luma(block[i], block[BLOCK + i], block[2 * BLOCK + i])
        block[i] = block[BLOCK + i] = block[2 * BLOCK + i] = luma


@kernel
def _run(block, program, factors, mean):
    """The operations of a program, one after the other; `mean` is what the contrast blends with."""
    for operation in program:
        if operation == BRIGHTNESS:
            _blend_all(block, _0, factors[0])
        elif operation == CONTRAST:
            _blend_all(block, mean, factors[1])
        elif operation == SATURATION:
            _saturate(block, factors[2])
        elif operation == HUE:
            # torchvision adds the shift as a byte: a negative one counts down from 256.
            _turn_hue(block, np.float32(np.uint8(np.int64(np.float64(factors[3]) * 255.0))))
        elif operation == GREY:
            _to_grey(block)


@kernel
def _luma_sum(block):
    """The sum of luma over BLOCK pixels: at most 255 · 1024, which int32 holds."""
    widest_vectors()
    total = np.int32(0)
    for i in range(BLOCK):
        total += np.int32(_luma(block[i], block[BLOCK + i], block[2 * BLOCK + i]))
    return total


@kernel
def _load(planes, start, block):
    widest_vectors()
    for c in range(3):
        at, first = unsigned(c * BLOCK), unsigned(start)
        for i in range(unsigned(BLOCK)):
            block[at + i] = planes[c, first + i]


@kernel
def _store(block, planes, start):
    widest_vectors()
    for c in range(3):
        at, first = unsigned(c * BLOCK), unsigned(start)
        for i in range(unsigned(BLOCK)):
            planes[c, first + i] = np.int32(block[at + i])


@kernel
def apply_colour(planes, pixels, count, program, factors, block):
    """Runs the operations of `program`, codes of draws.py and above, on the first `pixels` of planes (3, …).

    factors: brightness, contrast, saturation, hue. block: scratch, float32 (3 · BLOCK,). At most one contrast, whose
    mean is over `count` pixels: the others must be zero. Whole blocks are worked on, so planes ends with one.
    """
    # What comes before the contrast runs in a first round, which sums up the picture; the rest in a second one.
    barrier, mean = 0, _0
    for k in range(len(program)):
        if program[k] == CONTRAST:
            barrier, total = k, 0
            for c in range(3):
                # Past the view, to the end of its last block, black: it adds nothing to the sum.
                for i in range(pixels, -(-pixels // BLOCK) * BLOCK):
                    planes[c, i] = 0
            for start in range(0, pixels, BLOCK):
                _load(planes, start, block)
                _run(block, program[:barrier], factors, _0)
                total += _luma_sum(block)
                if barrier > 0:
                    _store(block, planes, start)
            mean = np.float32(int(total / count + 0.5))  # as Pillow's ImageEnhance.Contrast
    for start in range(0, pixels, BLOCK):
        _load(planes, start, block)
        _run(block, program[barrier:], factors, mean)
        _store(block, planes, start)


@kernel
def apply_solarize(planes):
    """Values from the threshold up are inverted."""
    widest_vectors()
    values = planes.reshape(-1)
    for i in range(len(values)):
        values[i] = values[i] if values[i] < SOLARIZE_THRESHOLD else np.uint8(255 - values[i])
