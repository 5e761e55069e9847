"""The views on the CPU: (pixels, params) → pixels, equal to Pillow's and torchvision's operations bit for bit.

    image (h, w, 3) ─ crop, resize, flip ─ jitter, in the drawn order, grey ─ blur ─ solarize ─ (normalize) ─▶ view
                      (resample_cpu.py)    (colour_cpu.py)           (blur_cpu.py)

A view in the making is `planes`, uint8 (3, …): one colour after the other, rows of S pixels (the view's width
rounded up to whole vectors), so that every inner loop runs over neighbouring bytes. Nothing is random here and
nothing is allocated, except for a squashed view: what was drawn comes in as ViewParams (draws.py), memory as a Scratch.
All functions run without the GIL; each thread needs a Scratch of its own.
"""

from typing import NamedTuple

import numpy as np

from pipeline.choices.draws import NOTHING
from pipeline.compiled import compiled, jit, unsigned
from pipeline.spec import Normalization
from pipeline.views.blur_cpu import BlurScratch, apply_blur, make_blur_scratch
from pipeline.views.colour_cpu import BLOCK, GREY, PROGRAM_LENGTH, apply_colour, apply_solarize
from pipeline.views.resample_cpu import (
    ResampleScratch,
    crop_resize_flip,
    make_resample_scratch,
    resized_image,
    row_pitch,
)
from pipeline.views.vector_cpu import ROWS


class Scratch(NamedTuple):
    """Memory of one thread."""

    planes: np.ndarray  # uint8 (3, …), the view being made
    resample: ResampleScratch
    program: np.ndarray  # uint8 (PROGRAM_LENGTH,), the colour operations of a view
    colours: np.ndarray  # float32 (3 · BLOCK,), the pixels they work on
    blur: BlurScratch


@jit
def make_scratch(max_height_px, max_width_px, resolution_px):
    """Scratch for images up to this size and square views of resolution_px. Compiled code may call it, too."""
    pixels = (resolution_px + ROWS - 1) * row_pitch(resolution_px)
    return Scratch(
        np.zeros((3, -(-pixels // BLOCK) * BLOCK), np.uint8),
        make_resample_scratch(max_height_px, max_width_px, resolution_px),
        np.zeros(PROGRAM_LENGTH, np.uint8),
        np.zeros(3 * BLOCK, np.float32),
        make_blur_scratch(resolution_px),
    )


def normalization_table(normalization: Normalization) -> np.ndarray:
    """The normalized value of each channel's 256 values, (3, 256) float32: ToTensor, Normalize, bit for bit."""
    mean = np.array(normalization.mean, np.float32)[:, None]
    std = np.array(normalization.std, np.float32)[:, None]
    return (np.arange(256, dtype=np.float32) / np.float32(255) - mean) / std


UNCHANGED = np.tile(np.arange(256, dtype=np.uint8), (3, 1))  # the table of a view that stays 8-bit


@jit
def write_view(planes, table, out):
    """A view in planes (3, …) → out (H, W, 3), each value looked up in its channel's row of table (3, 256)."""
    side = out.shape[0]
    for y in range(side):
        start = unsigned(y * row_pitch(side))
        for x in range(unsigned(side)):
            i = start + x
            out[y, x, 0], out[y, x, 1] = table[0, planes[0, i]], table[1, planes[1, i]]
            out[y, x, 2] = table[2, planes[2, i]]


@compiled(no_cfunc_wrapper=True, inline="always")
def apply_view(image, params, b, v, bicubic, table, scratch, out):
    """View v of the image that params' row b was drawn for: uint8 (h, w, 3), contiguous → out (H, W, 3).

    `table` decides what is written: normalization_table's float32, or UNCHANGED for the 8-bit view itself.
    """
    p, side, planes, program = params, out.shape[0], scratch.planes, scratch.program
    pitch, resample = row_pitch(side), scratch.resample
    if p.first_height[b, v] > 0:
        image = resized_image(image, p.first_height[b, v], p.first_width[b, v], bicubic)
        resample = make_resample_scratch(image.shape[0], image.shape[1], side)  # it may be larger than the stored one
    box = p.box_top[b, v], p.box_left[b, v], p.box_height[b, v], p.box_width[b, v]
    resized, window = (p.resized_height[b, v], p.resized_width[b, v]), (p.window_top[b, v], p.window_left[b, v])
    crop_resize_flip(image, box, resized, window, p.flip[b, v] != 0, bicubic, resample, planes)
    # The colour operations as one list of codes: whatever is off is NOTHING, and costs nothing.
    for k in range(4):
        program[k] = p.jitter_order[b, v, k] if p.jitter[b, v] else NOTHING
    program[4] = GREY if p.grey[b, v] else NOTHING
    if p.jitter[b, v] or p.grey[b, v]:
        factors = p.brightness[b, v], p.contrast[b, v], p.saturation[b, v], p.hue[b, v]
        apply_colour(planes, side * pitch, side * side, program, factors, scratch.colours)
    if p.sigma_px[b, v] > 0:
        apply_blur(planes, pitch, side, p.sigma_px[b, v], scratch.blur)
    if p.solarize[b, v]:
        apply_solarize(planes)
    write_view(planes, table, out)


@jit
def views_of_images(pixels, starts, heights, widths, params, bicubic, scratch, table, first, views):
    """The V views of decoded images, image b (h, w, 3) from byte starts[b] of `pixels` on → views (V, B, H, W, 3).

    They are number first, first + 1, … of the batch, whose whole array `views` is: one layout, so that one compiled
    version serves every number of images.
    """
    for b in range(len(starts)):
        height, width = heights[b], widths[b]
        image = pixels[starts[b] : starts[b] + height * width * 3].reshape(height, width, 3)
        for v in range(len(bicubic)):
            apply_view(image, params, b, v, bicubic[v], table, scratch, views[v, first + b])
