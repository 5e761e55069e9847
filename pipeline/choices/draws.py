"""Every random decision about a view ends here, as plain numbers, before any pixel is touched.

`draw_views` maps (seed, epoch, sample ids, image sizes) to `ViewParams`. The kernels on the CPU and
on the GPU and the PIL oracle apply these numbers and have no randomness of their own, so they can be
compared pixel by pixel, and a sample's views do not depend on workers, batch, rank or backend.

Slots of the counter-based generator (rng.py), four to a block:

    block 0–4   crop tries 0–9: area, ratio | area, ratio
    block 5     crop top, crop left, flip, jitter on
    block 6     brightness, contrast, saturation, hue
    block 7     order of the four, grey, blur on, blur sigma
    block 8     solarize
"""

import itertools
from typing import NamedTuple

import numpy as np

from pipeline.choices.rng import DOMAIN_VIEWS, uniform4
from pipeline.compiled import jit
from pipeline.spec import CentreCrop, Squash, ViewSpec

BRIGHTNESS, CONTRAST, SATURATION, HUE, NOTHING = 0, 1, 2, 3, 4  # the values of ViewParams.jitter_order


class ViewParams(NamedTuple):
    """The drawn numbers of B images × V views: a struct of arrays, each (B, V) unless it says otherwise.

    Geometry: the box is cut out of the image, resized to `resized_*`, and the (H, W) window at
    `window_*` of that is the view. A random crop has resized = (H, W) and window (0, 0); a centre crop
    has the whole image as its box. Where `first_*` is not 0, the image is resized to that before the box is cut.
    """

    box_top: np.ndarray  # the box: int32, px of the stored image
    box_left: np.ndarray
    box_height: np.ndarray
    box_width: np.ndarray
    resized_height: np.ndarray  # int32, px
    resized_width: np.ndarray
    window_top: np.ndarray  # the window: int32, px of the resized box; may be negative: zeros there
    window_left: np.ndarray
    flip: np.ndarray  # uint8, 1 = mirrored left-right, after the resize
    jitter: np.ndarray  # uint8, 1 = the four colour operations run
    jitter_order: np.ndarray  # uint8 (B, V, 4), which runs first … last; NOTHING if its strength is 0: hue would round
    brightness: np.ndarray  # these three: float32, blend factors, 1 = unchanged
    contrast: np.ndarray
    saturation: np.ndarray
    hue: np.ndarray  # float32, turns in [-0.5, 0.5], 0 = unchanged
    grey: np.ndarray  # uint8, 1 = R = G = B = luma
    sigma_px: np.ndarray  # float32, blur radius; 0 = no blur
    solarize: np.ndarray  # uint8, 1 = values of 128 and above are inverted
    first_height: np.ndarray  # int32, px: a squashed view's first resize, of the whole image; 0 = there is none
    first_width: np.ndarray


# The 24 orders of four operations, lexicographic: one uniform picks a row.
_ORDERS = np.array(list(itertools.permutations(range(4))), np.uint8)


@jit
def empty_params(images, views):
    """Parameters that change nothing (every operation off, boxes zero), shape (images, views)."""
    whole = np.zeros((10, images, views), np.int32)
    switches = np.zeros((4, images, views), np.uint8)
    factors, off = np.ones((3, images, views), np.float32), np.zeros((2, images, views), np.float32)
    jitter_order = np.empty((images, views, 4), np.uint8)
    for k in range(4):
        jitter_order[:, :, k] = k
    return ViewParams(
        box_top=whole[0],
        box_left=whole[1],
        box_height=whole[2],
        box_width=whole[3],
        resized_height=whole[4],
        resized_width=whole[5],
        window_top=whole[6],
        window_left=whole[7],
        flip=switches[0],
        jitter=switches[1],
        jitter_order=jitter_order,
        brightness=factors[0],
        contrast=factors[1],
        saturation=factors[2],
        hue=off[0],
        grey=switches[2],
        sigma_px=off[1],
        solarize=switches[3],
        first_height=whole[8],
        first_width=whole[9],
    )


class ViewTable(NamedTuple):
    """The view table as numbers for the compiled loop, float64: ranges (V, 2), strengths (V, 4), the others (V,)."""

    area: np.ndarray
    log_ratio: np.ndarray
    p_flip: np.ndarray
    p_jitter: np.ndarray
    strengths: np.ndarray  # by the jitter's four codes
    p_grey: np.ndarray
    p_blur: np.ndarray
    sigma_px: np.ndarray
    p_solarize: np.ndarray


def view_table(views: tuple[ViewSpec, ...]) -> ViewTable:
    """The view table of these rows."""
    rows = []
    for v in views:
        strengths = (v.brightness, v.contrast, v.saturation, v.hue)
        geometry = (v.area, np.log(v.ratio), v.p_flip)
        rows.append((*geometry, v.p_jitter, strengths, v.p_grey, v.p_blur, v.sigma_px, v.p_solarize))
    return ViewTable(*(np.array(column, np.float64) for column in zip(*rows, strict=True)))


@jit
def _between(bounds, u):
    """Uniform between two bounds."""
    return bounds[0] + (bounds[1] - bounds[0]) * u


@jit
def _fallback_box(height, width, min_ratio, max_ratio):
    """torchvision's fallback if ten tries failed: the largest centred box with an allowed ratio."""
    in_ratio = width / height
    if in_ratio < min_ratio:
        w = width
        h = min(max(int(np.rint(w / min_ratio)), 1), height)
    elif in_ratio > max_ratio:
        h = height
        w = min(max(int(np.rint(h * max_ratio)), 1), width)
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


@jit
def _draw_box(seed, epoch, sample, v, height, width, table, top_u, left_u):
    """RandomResizedCrop's box (torchvision's algorithm): ten tries, then the centred fallback.

    Its place has uniforms of its own, so that they do not depend on how many tries the size took.
    """
    area = height * width
    for block in range(5):
        u = uniform4(seed, DOMAIN_VIEWS, epoch, sample, v, block)
        for k in range(2):
            target = area * _between(table.area[v], u[2 * k])
            aspect = np.exp(_between(table.log_ratio[v], u[2 * k + 1]))
            w = int(np.rint(np.sqrt(target * aspect)))
            h = int(np.rint(np.sqrt(target / aspect)))
            if 0 < w <= width and 0 < h <= height:
                return int(top_u * (height - h + 1)), int(left_u * (width - w + 1)), h, w
    return _fallback_box(height, width, np.exp(table.log_ratio[v, 0]), np.exp(table.log_ratio[v, 1]))


@jit
def _factor(strength, u):
    """ColorJitter's: uniform in [max(0, 1 - strength), 1 + strength]."""
    low = max(0.0, 1.0 - strength)
    return low + (1.0 + strength - low) * u


@jit
def fill_views(seed, epoch, samples, heights, widths, table, resolution_px, p):
    """`draw_views` for compiled code: into the empty_params `p`; `seed` uint64, `table` from view_table."""
    for b in range(len(samples)):
        for v in range(len(table.p_flip)):
            # Blocks as int64(…): a literal number would compile the generator once more for each.
            u = uniform4(seed, DOMAIN_VIEWS, epoch, samples[b], v, np.int64(5))
            box = _draw_box(seed, epoch, samples[b], v, heights[b], widths[b], table, u[0], u[1])
            p.box_top[b, v], p.box_left[b, v], p.box_height[b, v], p.box_width[b, v] = box
            p.resized_height[b, v] = resolution_px
            p.resized_width[b, v] = resolution_px
            p.flip[b, v] = u[2] < table.p_flip[v]
            p.jitter[b, v] = u[3] < table.p_jitter[v]
            u = uniform4(seed, DOMAIN_VIEWS, epoch, samples[b], v, np.int64(6))
            strengths = table.strengths[v]
            p.brightness[b, v] = _factor(strengths[BRIGHTNESS], u[0])
            p.contrast[b, v] = _factor(strengths[CONTRAST], u[1])
            p.saturation[b, v] = _factor(strengths[SATURATION], u[2])
            p.hue[b, v] = strengths[HUE] * (2.0 * u[3] - 1.0)
            u = uniform4(seed, DOMAIN_VIEWS, epoch, samples[b], v, np.int64(7))
            for k in range(4):
                operation = _ORDERS[int(u[0] * 24), k]
                p.jitter_order[b, v, k] = operation if strengths[operation] > 0 else NOTHING
            p.grey[b, v] = u[1] < table.p_grey[v]
            p.sigma_px[b, v] = _between(table.sigma_px[v], u[3]) if u[2] < table.p_blur[v] else 0.0
            u = uniform4(seed, DOMAIN_VIEWS, epoch, samples[b], v, np.int64(8))
            p.solarize[b, v] = u[0] < table.p_solarize[v]


def draw_views(
    seed: int,
    epoch: int,
    samples: np.ndarray,
    heights_px: np.ndarray,
    widths_px: np.ndarray,
    views: tuple[ViewSpec, ...],
    resolution_px: int,
) -> ViewParams:
    """The parameters of both (all) views of some images in one epoch.

    `samples`, `heights_px`, `widths_px` are (B,): dataset positions and the stored images' sizes.
    The same arguments always give the same bits. About 1 µs a view.
    """
    params = empty_params(len(samples), len(views))
    samples = np.ascontiguousarray(samples, np.int64)
    heights = np.ascontiguousarray(heights_px, np.int64)
    widths = np.ascontiguousarray(widths_px, np.int64)
    fill_views(np.uint64(seed), epoch, samples, heights, widths, view_table(views), resolution_px, params)
    return params


@jit
def _window_start(spare_px):
    """Where a centred window starts. Too small an image is padded first, by spare // 2 (rounded towards 0)."""
    return -(-spare_px // 2) if spare_px < 0 else np.int64(np.rint(spare_px / 2))


@jit
def fill_centre_views(heights, widths, resize_px, squash, resolution_px, p):
    """`centre_views` for compiled code: into the empty_params `p`; `squash`: of a Squash."""
    for b in range(len(heights)):
        height, width = heights[b], widths[b]
        longer_px = np.int64(resize_px * max(height, width) / min(height, width))
        resized_height, resized_width = (resize_px, longer_px) if height <= width else (longer_px, resize_px)
        if squash:
            p.first_height[b, 0], p.first_width[b, 0] = resized_height, resized_width
            height, width = resized_height, resized_width
            resized_height, resized_width = resolution_px, resolution_px
        p.box_height[b, 0], p.box_width[b, 0] = height, width
        p.resized_height[b, 0], p.resized_width[b, 0] = resized_height, resized_width
        p.window_top[b, 0] = _window_start(resized_height - resolution_px)
        p.window_left[b, 0] = _window_start(resized_width - resolution_px)


def centre_views(heights_px: np.ndarray, widths_px: np.ndarray, view: CentreCrop, resolution_px: int) -> ViewParams:
    """torchvision's Resize(resize_px) then CenterCrop(resolution_px), as parameters of one view. (B,) sizes in.

    Of a Squash, Resize((resolution_px, resolution_px)) is the second.
    """
    params = empty_params(len(heights_px), 1)
    heights, widths = np.ascontiguousarray(heights_px, np.int64), np.ascontiguousarray(widths_px, np.int64)
    fill_centre_views(heights, widths, view.resize_px, isinstance(view, Squash), resolution_px, params)
    return params
