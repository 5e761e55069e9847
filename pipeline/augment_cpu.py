"""The views on the CPU: (pixels, params) → pixels, equal to Pillow's and torchvision's operations bit for bit.

    image (h, w, 3) ─ crop, resize, flip ─ jitter, in the drawn order ─ grey ─ blur ─ solarize ─▶ view
                      (resample_cpu.py)

Nothing is random here and nothing is allocated: what was drawn comes in as ViewParams (draws.py), memory as
a Scratch. All functions run without the GIL; each thread needs a Scratch of its own.
"""

import math
from typing import NamedTuple

import numba
import numpy as np

from pipeline.constants import LUMA_B, LUMA_G, LUMA_HALF, LUMA_R, LUMA_SHIFT
from pipeline.draws import BRIGHTNESS, CONTRAST, HUE, SATURATION
from pipeline.resample_cpu import ResampleScratch, crop_resize_flip, make_resample_scratch
from pipeline.spec import SOLARIZE_THRESHOLD, Normalization

BLUR_PASSES = 3


class Scratch(NamedTuple):
    """Memory of one thread. planes: uint8 (3, H, W), the view being made; spare: as much again."""

    resample: ResampleScratch
    planes: np.ndarray
    spare: np.ndarray


def make_scratch(max_height_px: int, max_width_px: int, resolution_px: int) -> Scratch:
    """Scratch for images up to this size and square views of resolution_px."""
    planes = (3, resolution_px, resolution_px)
    return Scratch(
        make_resample_scratch(max_height_px, max_width_px, resolution_px),
        np.zeros(planes, np.uint8),
        np.zeros(planes, np.uint8),
    )


def normalization_table(normalization: Normalization) -> np.ndarray:
    """The normalized value of each channel's 256 values, (3, 256) float32: ToTensor, Normalize, bit for bit."""
    mean = np.array(normalization.mean, np.float32)[:, None]
    std = np.array(normalization.std, np.float32)[:, None]
    return (np.arange(256, dtype=np.float32) / np.float32(255) - mean) / std


@numba.njit(cache=True, nogil=True)
def _luma(r, g, b):
    return (r * LUMA_R + g * LUMA_G + b * LUMA_B + LUMA_HALF) >> LUMA_SHIFT


@numba.njit(cache=True, nogil=True)
def _blend(background, value, factor):
    """background + factor · (value - background) in float32, clipped and cut to 8 bits (Pillow, ImagingBlend)."""
    mixed = np.float32(background) + factor * np.float32(np.int32(value) - np.int32(background))
    return np.uint8(min(max(mixed, np.float32(0)), np.float32(255)))


@numba.njit(cache=True, nogil=True)
def apply_brightness(planes, factor):
    for c in range(3):
        for y in range(planes.shape[1]):
            for x in range(planes.shape[2]):
                planes[c, y, x] = _blend(0, planes[c, y, x], factor)


@numba.njit(cache=True, nogil=True)
def apply_contrast(planes, factor):
    total = 0
    for y in range(planes.shape[1]):
        for x in range(planes.shape[2]):
            total += _luma(planes[0, y, x], planes[1, y, x], planes[2, y, x])
    mean = int(total / (planes.shape[1] * planes.shape[2]) + 0.5)
    for c in range(3):
        for y in range(planes.shape[1]):
            for x in range(planes.shape[2]):
                planes[c, y, x] = _blend(mean, planes[c, y, x], factor)


@numba.njit(cache=True, nogil=True)
def apply_saturation(planes, factor):
    for y in range(planes.shape[1]):
        for x in range(planes.shape[2]):
            luma = _luma(planes[0, y, x], planes[1, y, x], planes[2, y, x])
            for c in range(3):
                planes[c, y, x] = _blend(luma, planes[c, y, x], factor)


@numba.njit(cache=True, nogil=True)
def _hsv(r, g, b):
    """8-bit hue, saturation, value, with Pillow's mixture of float32 and float64."""
    high, low = max(r, g, b), min(r, g, b)
    if high == low:
        return 0, 0, high
    spread = np.float32(high - low)
    saturation = spread / np.float32(high)
    rc = np.float32(high - r) / spread
    gc = np.float32(high - g) / spread
    bc = np.float32(high - b) / spread
    if r == high:
        hue = bc - gc
    elif g == high:
        hue = np.float32(2.0 + np.float64(rc) - np.float64(bc))
    else:
        hue = np.float32(4.0 + np.float64(gc) - np.float64(rc))
    turns = np.float64(hue) / 6.0 + 1.0
    hue = np.float32(turns - math.floor(turns))
    return int(np.float64(hue) * 255.0), int(np.float64(saturation) * 255.0), high


@numba.njit(cache=True, nogil=True)
def _rgb(hue, saturation, value):
    """Back from 8-bit HSV, as Pillow does it."""
    if saturation == 0:
        return value, value, value
    sector = hue * 6 // 255
    f = np.float32(hue * 6.0 / 255.0 - sector)
    fs = np.float32(saturation / 255.0)
    p = int(value * (1.0 - np.float64(fs)) + 0.5)
    q = int(value * (1.0 - np.float64(fs * f)) + 0.5)
    t = int(value * (1.0 - np.float64(fs) * (1.0 - np.float64(f))) + 0.5)
    sector %= 6
    if sector == 0:
        return value, t, p
    if sector == 1:
        return q, value, p
    if sector == 2:
        return p, value, t
    if sector == 3:
        return p, q, value
    if sector == 4:
        return t, p, value
    return value, p, q


@numba.njit(cache=True, nogil=True)
def apply_hue(planes, turns):
    shift = int(np.float64(turns) * 255.0)
    for y in range(planes.shape[1]):
        for x in range(planes.shape[2]):
            h, s, v = _hsv(np.int64(planes[0, y, x]), np.int64(planes[1, y, x]), np.int64(planes[2, y, x]))
            planes[0, y, x], planes[1, y, x], planes[2, y, x] = _rgb((h + shift) & 255, s, v)


@numba.njit(cache=True, nogil=True)
def apply_grey(planes):
    for y in range(planes.shape[1]):
        for x in range(planes.shape[2]):
            planes[:, y, x] = _luma(planes[0, y, x], planes[1, y, x], planes[2, y, x])


@numba.njit(cache=True, nogil=True)
def box_weights(sigma_px):
    """(radius, inner weight, edge weight), 24-bit fixed point, of the box that Pillow runs three times for a Gaussian.

    Gwosdek et al. 2011, "Theoretical foundations of Gaussian convolution by extended box filtering"; in float32.
    """
    one, two, three, six = np.float32(1), np.float32(2), np.float32(3), np.float32(6)
    variance = np.float32(sigma_px) * np.float32(sigma_px) / np.float32(BLUR_PASSES)
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
    """One box pass along a line, its ends repeated outwards."""
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
def apply_blur(planes, spare, sigma_px):
    radius, inner, edge = box_weights(sigma_px)
    for c in range(3):
        for y in range(planes.shape[1]):
            _box(planes[c, y], radius, inner, edge, spare[c, y])
            _box(spare[c, y], radius, inner, edge, planes[c, y])
            _box(planes[c, y], radius, inner, edge, spare[c, y])
        for x in range(planes.shape[2]):
            _box(spare[c, :, x], radius, inner, edge, planes[c, :, x])
            _box(planes[c, :, x], radius, inner, edge, spare[c, :, x])
            _box(spare[c, :, x], radius, inner, edge, planes[c, :, x])


@numba.njit(cache=True, nogil=True)
def apply_solarize(planes):
    for c in range(3):
        for y in range(planes.shape[1]):
            for x in range(planes.shape[2]):
                value = planes[c, y, x]
                planes[c, y, x] = 255 - value if value >= SOLARIZE_THRESHOLD else value


@numba.njit(cache=True, nogil=True)
def _apply_jitter(planes, p, b, v):
    for operation in p.jitter_order[b, v]:
        if operation == BRIGHTNESS:
            apply_brightness(planes, p.brightness[b, v])
        elif operation == CONTRAST:
            apply_contrast(planes, p.contrast[b, v])
        elif operation == SATURATION:
            apply_saturation(planes, p.saturation[b, v])
        elif operation == HUE:
            apply_hue(planes, p.hue[b, v])


@numba.njit(cache=True, nogil=True)
def _make_planes(image, p, b, v, bicubic, scratch):
    """View v of image b, as uint8 planes (3, H, W) in scratch.planes."""
    box = p.box_top[b, v], p.box_left[b, v], p.box_height[b, v], p.box_width[b, v]
    resized = p.resized_height[b, v], p.resized_width[b, v]
    window = p.window_top[b, v], p.window_left[b, v]
    planes = scratch.planes
    crop_resize_flip(image, box, resized, window, p.flip[b, v] != 0, bicubic, scratch.resample, planes)
    if p.jitter[b, v]:
        _apply_jitter(planes, p, b, v)
    if p.grey[b, v]:
        apply_grey(planes)
    if p.sigma_px[b, v] > 0:
        apply_blur(planes, scratch.spare, p.sigma_px[b, v])
    if p.solarize[b, v]:
        apply_solarize(planes)


@numba.njit(cache=True, nogil=True)
def apply_view(image, params, b, v, bicubic, scratch, out):
    """View v of the image that params' row b was drawn for: uint8 (h, w, 3) → out, uint8 (H, W, 3)."""
    _make_planes(image, params, b, v, bicubic, scratch)
    planes = scratch.planes
    for y in range(planes.shape[1]):
        for x in range(planes.shape[2]):
            for c in range(3):
                out[y, x, c] = planes[c, y, x]


@numba.njit(cache=True, nogil=True)
def apply_view_normalized(image, params, b, v, bicubic, table, scratch, out):
    """The same view, normalized: → out, float32 (H, W, 3). `table` is normalization_table's."""
    _make_planes(image, params, b, v, bicubic, scratch)
    planes = scratch.planes
    for y in range(planes.shape[1]):
        for x in range(planes.shape[2]):
            for c in range(3):
                out[y, x, c] = table[c, planes[c, y, x]]


@numba.njit(cache=True, nogil=True)
def normalize_into(view, table, out):
    """uint8 (H, W, 3) → out, float32 (H, W, 3), by normalization_table's table."""
    for y in range(view.shape[0]):
        for x in range(view.shape[1]):
            for c in range(3):
                out[y, x, c] = table[c, view[y, x, c]]
