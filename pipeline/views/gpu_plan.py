"""The plan of a batch's views: what the kernels on the GPU need to know, as one table of numbers, made on the CPU.

    pixels' places, ViewParams ─▶ plan_views ─▶ ViewPlan.table, a row a view (v · B + b), a column a number

Here Pillow's choices are made: which axis goes first, how many taps an output has, how wide the blur is. The table's
columns have names, which are constants for the kernels and indices for NumPy: `table[:, PIXEL]`.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import triton.language as tl

from pipeline.choices.draws import CONTRAST, ViewParams
from pipeline.compiled import jit
from pipeline.views.blur_cpu import box_weights
from pipeline.views.resample_cpu import height_first

SUPPORT = {"bicubic": 2, "bilinear": 1}  # px of the filter to each side, at scale 1
MAX_SIGMA_PX = 9.4  # of the blur: a box radius of 8 px
TILE_PX = 32  # of a view, both ways

# The columns. Where something belongs to y and to x, x comes right behind y: the kernels add the axis.
_columns = map(tl.constexpr, itertools.count())
PIXEL = next(_columns)  # byte of the pixels' buffer where the box starts
ROW_BYTES = next(_columns)  # from row to row of the image
BOX_HEIGHT, BOX_WIDTH = next(_columns), next(_columns)
RESIZED_HEIGHT, RESIZED_WIDTH = next(_columns), next(_columns)
WINDOW_TOP, WINDOW_LEFT = next(_columns), next(_columns)
FLIP = next(_columns)
SUPPORT_PX = next(_columns)
HEIGHT_FIRST = next(_columns)
TAPS_Y, TAPS_X = next(_columns), next(_columns)  # of an output
COEFFICIENTS_Y, COEFFICIENTS_X = next(_columns), next(_columns)  # rows of their buffer where an axis' taps start
BETWEEN = next(_columns)  # pixel where this view's intermediate starts
ORDER, *_ORDER_REST = (next(_columns) for _ in range(4))  # of the four jitter operations
STEPS_BEFORE_MEAN = next(_columns)  # how many of the four run before the contrast's mean is known
STEPS = next(_columns)  # how many run in all: four or none
BRIGHTNESS_FACTOR = next(_columns)  # this and the next two: float32, as their bits
CONTRAST_FACTOR = next(_columns)
SATURATION_FACTOR = next(_columns)
HUE_SHIFT = next(_columns)  # 0 … 255
GREY = next(_columns)
SOLARIZE = next(_columns)
BLUR = next(_columns)  # 1 if there is one; the next three say which
BLUR_RADIUS = next(_columns)
BLUR_INNER = next(_columns)
BLUR_EDGE = next(_columns)
WIDTH = next(_columns)  # the number of columns


class ViewPlan(NamedTuple):
    """What the kernels need to know about V views of B images, and the sizes the host needs to allocate."""

    table: torch.Tensor  # int64 (V · B, WIDTH), row v · B + b
    images: int  # B
    side_px: int  # H = W of the views
    pitch_px: int  # from row to row of an intermediate: side_px, rounded up to whole tiles
    between_px: int  # of the intermediate of all views
    taps: int  # of both axes of all views: rows of the coefficient buffer
    blur_radius: int  # the largest box radius of any view, px; -1 = no view is blurred

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
    if params.first_height.any():
        raise ValueError("a squashed view is resized twice, which the kernels do not do: make the views on the CPU")
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
    shifts them). `interpolations` has one of SUPPORT's names a view. The table is in pinned memory if there is a
    GPU. Raises ValueError for boxes outside their image, and for squashed views.
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
    table = torch.empty((images * views, WIDTH.value), dtype=torch.int64, pin_memory=torch.cuda.is_available())
    numbers = table.numpy()
    numbers[:, PIXEL] = starts + p.box_top * row_bytes + p.box_left * 3
    numbers[:, ROW_BYTES] = row_bytes
    numbers[:, BOX_HEIGHT], numbers[:, BOX_WIDTH] = p.box_height, p.box_width
    numbers[:, RESIZED_HEIGHT], numbers[:, RESIZED_WIDTH] = p.resized_height, p.resized_width
    numbers[:, WINDOW_TOP], numbers[:, WINDOW_LEFT] = p.window_top, p.window_left
    numbers[:, FLIP] = p.flip
    numbers[:, SUPPORT_PX] = support
    numbers[:, HEIGHT_FIRST] = rules[:, 0]
    numbers[:, TAPS_Y], numbers[:, TAPS_X] = taps_y, taps_x
    numbers[:, COEFFICIENTS_Y], numbers[:, COEFFICIENTS_X] = _starts(taps), _starts(taps) + taps_y
    numbers[:, BETWEEN] = _starts(between)
    numbers[:, ORDER.value : ORDER.value + 4] = p.jitter_order
    numbers[:, STEPS_BEFORE_MEAN] = np.where(p.jitter, contrast_at, 0)
    numbers[:, STEPS] = np.where(p.jitter, 4, 0)
    numbers[:, BRIGHTNESS_FACTOR] = p.brightness.view(np.int32)
    numbers[:, CONTRAST_FACTOR] = p.contrast.view(np.int32)
    numbers[:, SATURATION_FACTOR] = p.saturation.view(np.int32)
    numbers[:, HUE_SHIFT] = (p.hue.astype(np.float64) * 255).astype(np.int64) & 255
    numbers[:, GREY] = p.grey
    numbers[:, SOLARIZE] = p.solarize
    numbers[:, BLUR] = p.sigma_px > 0
    numbers[:, BLUR_RADIUS], numbers[:, BLUR_INNER], numbers[:, BLUR_EDGE] = rules[:, 1], rules[:, 2], rules[:, 3]
    return ViewPlan(
        table=table,
        images=images,
        side_px=resolution_px,
        pitch_px=pitch,
        between_px=int(between.sum()),
        taps=int(taps.sum()),
        blur_radius=int(rules[:, 1].max(initial=-1)),
    )
