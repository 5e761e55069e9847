"""Single operations of a view, the kernels' and Pillow's: compared, and as candidates for loader.py."""

from collections.abc import Callable
from functools import partial

import numpy as np
from measure import difference_summary
from PIL import Image, ImageFilter
from torchvision.transforms import functional as F

from pipeline.choices.draws import BRIGHTNESS, CONTRAST, HUE, NOTHING, SATURATION, ViewParams, draw_views, empty_params
from pipeline.compiled import jit
from pipeline.constants import IMAGENET_MEAN, IMAGENET_STD
from pipeline.spec import BARLOW_TWINS_VIEWS, SOLARIZE_THRESHOLD, Normalization, ViewSpec
from pipeline.storage.beton import Beton
from pipeline.storage.decode_pil import decode_pil
from pipeline.views.augment_cpu import UNCHANGED, apply_view, make_scratch, normalization_table, write_view
from pipeline.views.blur_cpu import apply_blur
from pipeline.views.colour_cpu import GREY, apply_colour, apply_solarize
from pipeline.views.reference import apply_view_pil
from pipeline.views.resample_cpu import crop_resize_flip, row_pitch

SIDE = 224
TIMED_IMAGES = 32
JITTER = {"brightness": BRIGHTNESS, "contrast": CONTRAST, "saturation": SATURATION, "hue": HUE}
ALWAYS = ViewSpec(p_flip=1.0, p_jitter=1.0, p_grey=1.0, p_blur=1.0, p_solarize=1.0)
FIELDS = {
    "crop_resize": ViewParams._fields[:8],
    **{name: (name,) for name in ("flip", *JITTER, "grey", "solarize")},
    "blur": ("sigma_px",),
}


# ---- comparing ----


def only(operation: str, drawn: ViewParams) -> ViewParams:
    """The parameters of one operation as drawn for one image, everything else off."""
    p = empty_params(1, 1)
    for field in FIELDS["crop_resize"]:
        getattr(p, field)[:] = SIDE if field in ("box_height", "box_width", "resized_height", "resized_width") else 0
    for field in FIELDS[operation]:
        getattr(p, field)[:] = getattr(drawn, field)
    if operation in JITTER:
        p.jitter[:] = 1
        p.jitter_order[0, 0] = (JITTER[operation], NOTHING, NOTHING, NOTHING)
    return p


def compare_views(beton: Beton) -> list[dict]:
    """Every operation alone and the whole chain of both views, on each image with its own draws: ours and Pillow's."""
    histograms = {name: np.zeros(256, np.int64) for name in (*FIELDS, "whole_chain")}

    def add(name: str, image: Image.Image, params: ViewParams, v: int) -> None:
        array, ours = np.ascontiguousarray(image), np.empty((SIDE, SIDE, 3), np.uint8)
        apply_view(array, params, 0, v, True, UNCHANGED, make_scratch(*array.shape[:2], SIDE), ours)
        theirs = np.asarray(apply_view_pil(image, params, 0, v, "bicubic", SIDE))
        histograms[name] += np.bincount(np.abs(ours.astype(int) - theirs).ravel(), minlength=256)

    for i in range(len(beton)):
        image, one = decode_pil(beton, i), np.array([i])
        size = beton.heights[one], beton.widths[one]
        drawn = draw_views(1, 0, one, *size, (ALWAYS,), SIDE)
        square = image.resize((SIDE, SIDE))
        for name in FIELDS:
            add(name, image if name == "crop_resize" else square, only(name, drawn), 0)
        both = draw_views(2, 0, one, *size, BARLOW_TWINS_VIEWS, SIDE)
        for v in range(2):
            add("whole_chain", image, both, v)
    return [{"operation": name} | difference_summary(counts) for name, counts in histograms.items()]


# ---- timing ----


@jit
def _colour(stack, program, factors, memory):
    for i in range(len(stack)):
        apply_colour(stack[i], SIDE * row_pitch(SIDE), SIDE * SIDE, program, factors, memory)


@jit
def _blur(stack, sigmas, memory):
    for i in range(len(stack)):
        apply_blur(stack[i], row_pitch(SIDE), SIDE, sigmas[i], memory)


@jit
def _solarize(stack):
    for i in range(len(stack)):
        apply_solarize(stack[i])


@jit
def _normalize(stack, table, out):
    for i in range(len(stack)):
        write_view(stack[i], table, out[i])


@jit
def _crop_resize(flat, starts, heights, widths, p, memory, planes):
    for i in range(len(starts)):
        image = flat[starts[i] : starts[i] + heights[i] * widths[i] * 3].reshape(heights[i], widths[i], 3)
        box = p.box_top[i, 0], p.box_left[i, 0], p.box_height[i, 0], p.box_width[i, 0]
        crop_resize_flip(image, box, (SIDE, SIDE), (0, 0), p.flip[i, 0] != 0, True, memory, planes)


class OperationBench:
    """The first TIMED_IMAGES of a file, as both sides want them, with drawn parameters."""

    def __init__(self, beton: Beton) -> None:
        ids = np.arange(min(TIMED_IMAGES, len(beton)))
        self.heights, self.widths = beton.heights[ids], beton.widths[ids]
        self.params = draw_views(3, 0, ids, self.heights, self.widths, (ALWAYS,), SIDE)
        self.images = [decode_pil(beton, int(i)) for i in ids]
        self.flat = np.concatenate([np.asarray(image).reshape(-1) for image in self.images])
        self.starts = np.cumsum(3 * self.heights * self.widths) - 3 * self.heights * self.widths
        self.squares = [image.resize((SIDE, SIDE)) for image in self.images]
        self.scratch = make_scratch(int(self.heights.max()), int(self.widths.max()), SIDE)
        self.stack = np.zeros((len(ids), *self.scratch.planes.shape), np.uint8)
        views = np.stack([np.asarray(square) for square in self.squares])
        self.stack[:, :, : SIDE * SIDE] = views.transpose(0, 3, 1, 2).reshape(len(ids), 3, -1)

    def colour(self, operation: int) -> None:
        program = np.array([operation, *[NOTHING] * 4], np.uint8)
        p = self.params
        factors = p.brightness[0, 0], p.contrast[0, 0], p.saturation[0, 0], p.hue[0, 0]
        _colour(self.stack, program, factors, self.scratch.colours)

    def candidates(self) -> dict:
        """name → (what to run, views it makes)."""
        p, table = self.params, normalization_table(Normalization())
        out = np.empty((len(self.stack), SIDE, SIDE, 3), np.float32)
        sizes, memory = (self.heights, self.widths), (self.scratch.resample, self.scratch.planes)
        ours: dict[str, Callable[[], object]] = {
            **{name: partial(self.colour, code) for name, code in {**JITTER, "grey": GREY}.items()},
            "crop_resize": partial(_crop_resize, self.flat, self.starts, *sizes, p, *memory),
            "blur": partial(_blur, self.stack, p.sigma_px[:, 0], self.scratch.blur),
            "solarize": partial(_solarize, self.stack),
            "normalize": partial(_normalize, self.stack, table, out),
        }
        candidates = {}
        for name, run in ours.items():
            candidates[f"op_{name}"] = run, len(self.images)
            candidates[f"pillow_{name}"] = self.pillow(name), len(self.images)
        return candidates

    def pillow(self, name: str) -> Callable[[], object]:
        """The same by Pillow and torchvision."""
        p = self.params
        each = {
            "brightness": lambda i, view: F.adjust_brightness(view, float(p.brightness[i, 0])),
            "contrast": lambda i, view: F.adjust_contrast(view, float(p.contrast[i, 0])),
            "saturation": lambda i, view: F.adjust_saturation(view, float(p.saturation[i, 0])),
            "hue": lambda i, view: F.adjust_hue(view, float(p.hue[i, 0])),
            "grey": lambda i, view: F.to_grayscale(view, 3),
            "blur": lambda i, view: view.filter(ImageFilter.GaussianBlur(float(p.sigma_px[i, 0]))),
            "solarize": lambda i, view: F.solarize(view, SOLARIZE_THRESHOLD),
            "normalize": lambda i, view: F.normalize(F.to_tensor(view), IMAGENET_MEAN, IMAGENET_STD),
        }
        if name == "crop_resize":
            boxes = [tuple(int(a[i, 0]) for a in p[:4]) for i in range(len(self.images))]
            return lambda: [
                image.crop((left, top, left + width, top + height)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
                for image, (top, left, height, width) in zip(self.images, boxes, strict=True)
            ]
        return lambda: [each[name](i, view) for i, view in enumerate(self.squares)]
