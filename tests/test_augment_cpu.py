"""The CPU kernels against Pillow and torchvision: each operation alone, the whole chain, odd sizes, extremes.

The bars are the project's published ones. On x86-64 the two agree in every bit, and the tests insist on it;
elsewhere compilers may fuse multiplications with additions, and the bars hold.
"""

import platform
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import Compose, Resize
from torchvision.transforms import functional as F

from pipeline.choices.draws import (
    BRIGHTNESS,
    CONTRAST,
    HUE,
    NOTHING,
    SATURATION,
    centre_views,
    draw_views,
    empty_params,
)
from pipeline.spec import BARLOW_TWINS_VIEWS, CentreCrop, Normalization, Squash, ViewSpec
from pipeline.views.augment_cpu import (
    UNCHANGED,
    apply_view,
    make_scratch,
    normalization_table,
    write_view,
)
from pipeline.views.blur_cpu import box_weights
from pipeline.views.reference import apply_view_pil
from pipeline.views.resample_cpu import height_first

IMAGES = 200
SIDE = 224
EXACT = platform.machine() == "x86_64"
ALWAYS = ViewSpec(p_flip=1.0, p_jitter=1.0, p_grey=1.0, p_blur=1.0, p_solarize=1.0)
JITTER = {"brightness": BRIGHTNESS, "contrast": CONTRAST, "saturation": SATURATION, "hue": HUE}

# operation: (levels of 255, share of values that may differ by more)
BARS = dict.fromkeys(("flip", "grey", "solarize", "normalize", "brightness", "contrast", "saturation"), (0, 0.001))
BARS |= {"crop_resize": (1, 0.001), "crop_resize_bilinear": (1, 0.001), "hue": (2, 0.01), "blur": (1, 0.001)}
CHAIN_MEAN_DIFFERENCE = 0.5


@dataclass
class Agreement:
    """Differences of many pairs of pictures, in levels of 255."""

    histogram: np.ndarray

    def add(self, ours: np.ndarray, theirs: np.ndarray) -> None:
        assert ours.shape == theirs.shape
        self.histogram += np.bincount(np.abs(ours.astype(int) - theirs).ravel(), minlength=256)

    def check(self, name: str) -> None:
        values = self.histogram.sum()
        mean = (self.histogram * np.arange(256)).sum() / values
        print(f"{name}: {values} values, {1 - self.histogram[0] / values:.2e} differ, mean {mean:.2e} of 255")
        level, share = BARS.get(name, (255, 0))
        assert self.histogram[level + 1 :].sum() <= share * values
        assert mean <= CHAIN_MEAN_DIFFERENCE
        if EXACT:
            assert self.histogram[0] == values


def new_agreement() -> Agreement:
    return Agreement(np.zeros(256, np.int64))


def run_cpu(image: np.ndarray, params, b: int, v: int, interpolation: str, side: int = SIDE) -> np.ndarray:
    """The kernels' view, into memory that was not zero before."""
    scratch = make_scratch(*image.shape[:2], side)
    scratch.planes[:] = 171
    out = np.full((side, side, 3), 173, np.uint8)
    apply_view(image, params, b, v, interpolation == "bicubic", UNCHANGED, scratch, out)
    return out


def run_pil(image: np.ndarray, params, b: int, v: int, interpolation: str, side: int = SIDE) -> np.ndarray:
    return np.asarray(apply_view_pil(Image.fromarray(image), params, b, v, interpolation, side))


def whole_image(height: int, width: int):
    """Parameters of one view that is the image itself."""
    p = empty_params(1, 1)
    p.box_height[:] = p.resized_height[:] = height
    p.box_width[:] = p.resized_width[:] = width
    return p


def only(operation: str, drawn, v: int = 0, side: int = SIDE):
    """The parameters of one drawn operation, everything else off, for an image of the view's size."""
    p = whole_image(side, side)
    if operation in JITTER:
        p.jitter[:] = 1
        p.jitter_order[0, 0] = (JITTER[operation], NOTHING, NOTHING, NOTHING)
    field = {"blur": "sigma_px"}.get(operation, operation)
    getattr(p, field)[:] = getattr(drawn, field)[0, v]
    return p


def draw_one(seed: int, image: np.ndarray, views=(ALWAYS,)):
    return draw_views(seed, 0, np.arange(1), *(np.array([s]) for s in image.shape[:2]), views, SIDE)


@pytest.fixture(scope="module")
def images(imagenet_sample) -> list[np.ndarray]:
    """200 decoded photographs, uint8 (h, w, 3)."""
    return [np.array(Image.open(path).convert("RGB")) for path in imagenet_sample[:IMAGES]]


@pytest.fixture(scope="module")
def square_images(images) -> list[np.ndarray]:
    """The same, cut and resized to the size of a view."""
    return [np.array(Image.fromarray(image).resize((SIDE, SIDE), box=(0, 0, *image.shape[1::-1]))) for image in images]


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_crop_resize_alone(images, interpolation):
    agreement, height_passes_first = new_agreement(), 0
    for seed, image in enumerate(images):
        drawn = draw_one(seed, image)
        p = empty_params(1, 1)
        for field in ("box_top", "box_left", "box_height", "box_width", "resized_height", "resized_width"):
            getattr(p, field)[:] = getattr(drawn, field)
        agreement.add(run_cpu(image, p, 0, 0, interpolation), run_pil(image, p, 0, 0, interpolation))
        height_passes_first += height_first(p.box_height[0, 0], p.box_width[0, 0], SIDE, SIDE)
    assert 0 < height_passes_first < len(images)
    agreement.check("crop_resize" if interpolation == "bicubic" else "crop_resize_bilinear")


@pytest.mark.parametrize(
    "operation", ["flip", "brightness", "contrast", "saturation", "hue", "grey", "blur", "solarize"]
)
def test_operation_alone(square_images, operation):
    agreement, changed = new_agreement(), 0
    for seed, image in enumerate(square_images):
        p = only(operation, draw_one(seed, image))
        ours = run_cpu(image, p, 0, 0, "bicubic")
        agreement.add(ours, run_pil(image, p, 0, 0, "bicubic"))
        changed += not np.array_equal(ours, image)
    assert changed > 0.9 * len(square_images)
    agreement.check(operation)


def test_normalize_alone(square_images):
    normalization = Normalization()
    table = normalization_table(normalization)
    for image in square_images[:50]:
        out, planes = np.full(image.shape, np.nan, np.float32), make_scratch(SIDE, SIDE, SIDE).planes
        planes[:, : SIDE * SIDE] = image.transpose(2, 0, 1).reshape(3, -1)
        write_view(planes, table, out)
        theirs = F.normalize(F.to_tensor(image), normalization.mean, normalization.std)
        assert torch.equal(torch.from_numpy(out).permute(2, 0, 1), theirs)


def test_whole_chain(images):
    agreement = new_agreement()
    for seed, image in enumerate(images):
        p = draw_one(1000 + seed, image, BARLOW_TWINS_VIEWS)
        for v in range(2):
            agreement.add(run_cpu(image, p, 0, v, "bicubic"), run_pil(image, p, 0, v, "bicubic"))
    agreement.check("chain")


def test_every_operation_in_every_order(square_images):
    """All 24 orders of the jitter, with everything else on."""
    agreement = new_agreement()
    for seed, order in enumerate(np.unique(draw_many_orders(), axis=0)):
        image = square_images[seed]
        p = draw_one(seed, image)
        p.jitter_order[0, 0] = order
        agreement.add(run_cpu(image, p, 0, 0, "bicubic"), run_pil(image, p, 0, 0, "bicubic"))
    assert seed == 23
    agreement.check("orders")


def draw_many_orders() -> np.ndarray:
    n = 1000
    size = np.full(n, SIDE)
    return draw_views(0, 0, np.arange(n), size, size, (ALWAYS,), SIDE).jitter_order[:, 0]


def test_centre_crop(images):
    agreement = new_agreement()
    for image in images[:60]:
        height, width = (np.array([s]) for s in image.shape[:2])
        p = centre_views(height, width, CentreCrop(), SIDE)
        theirs = np.asarray(F.center_crop(F.resize(Image.fromarray(image), 256), SIDE))
        agreement.add(run_cpu(image, p, 0, 0, "bilinear"), theirs)
    agreement.check("centre_crop")


def test_squashed_as_vissl_has_it(images):
    """Two resizes; one straight to the square is another picture."""
    agreement, upright, differ = new_agreement(), set(), 0.0
    for image in images[:20]:
        p = centre_views(*(np.array([s]) for s in image.shape[:2]), Squash(), SIDE)
        theirs = np.asarray(Compose([Resize(256), Resize([SIDE, SIDE])])(Image.fromarray(image)))
        agreement.add(run_cpu(image, p, 0, 0, "bilinear"), theirs)
        upright.add(image.shape[0] > image.shape[1])
        differ += np.mean(theirs != np.asarray(Resize([SIDE, SIDE])(Image.fromarray(image)))) / 20
    agreement.check("squash")
    assert upright == {True, False} and differ > 0.5


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (7, 100), (40, 40), (32, 41), (30, 31), (600, 224)])
def test_squashed_odd_sizes(size):
    """Some grow first: the picture between is larger than the one that is stored."""
    image, agreement = np.random.default_rng(size[0]).integers(0, 256, (*size, 3), np.uint8), new_agreement()
    p = centre_views(*(np.array([s]) for s in size), Squash(40), 32)
    theirs = np.asarray(Compose([Resize(40), Resize([32, 32])])(Image.fromarray(image)))
    agreement.add(run_cpu(image, p, 0, 0, "bilinear", 32), theirs)
    agreement.add(run_pil(image, p, 0, 0, "bilinear", 32), theirs)
    agreement.check("squash")


@pytest.mark.parametrize("side", [32, 224])
@pytest.mark.parametrize(
    "size", [(1, 1), (1, 500), (500, 1), (2, 3), (7, 1000), (3000, 20), (20, 3000), (224, 224), (32, 32), (225, 223)]
)
def test_odd_sizes(size, side):
    image = np.random.default_rng(size[0]).integers(0, 256, (*size, 3), np.uint8)
    agreement = new_agreement()
    for seed in range(6):
        p = draw_views(seed, 0, np.arange(1), *(np.array([s]) for s in size), (ALWAYS, *BARLOW_TWINS_VIEWS), side)
        for v in range(3):
            agreement.add(run_cpu(image, p, 0, v, "bicubic", side), run_pil(image, p, 0, v, "bicubic", side))
    p = centre_views(*(np.array([s]) for s in size), CentreCrop(resize_px=40), side)
    agreement.add(run_cpu(image, p, 0, 0, "bilinear", side), run_pil(image, p, 0, 0, "bilinear", side))
    agreement.check("odd sizes")


def test_every_box_of_a_small_image():
    image = np.random.default_rng(0).integers(0, 256, (6, 5, 3), np.uint8)
    agreement = new_agreement()
    for top, left in np.ndindex(6, 5):
        for height, width in np.ndindex(6 - top, 5 - left):
            p = whole_image(3, 4)
            p.box_top[:], p.box_left[:], p.box_height[:], p.box_width[:] = top, left, height + 1, width + 1
            p.flip[:] = height % 2
            for interpolation in ("bicubic", "bilinear"):
                agreement.add(run_cpu(image, p, 0, 0, interpolation, 4), run_pil(image, p, 0, 0, interpolation, 4))
    agreement.check("boxes")


@pytest.mark.parametrize("window", [(-3, -5), (-300, 0), (0, 300), (7, 2), (100, 100), (-40, 90)])
def test_a_window_that_reaches_outside_is_zero_there(window):
    image = np.random.default_rng(0).integers(1, 256, (90, 70, 3), np.uint8)
    p = whole_image(90, 70)
    p.resized_height[:], p.resized_width[:] = 101, 53
    p.window_top[:], p.window_left[:] = window
    for flip in (0, 1):
        p.flip[:] = flip
        ours = run_cpu(image, p, 0, 0, "bicubic", 64)
        assert np.array_equal(ours, run_pil(image, p, 0, 0, "bicubic", 64))
        assert (ours == 0).any()


EXTREMES = [
    *((name, value) for name in ("brightness", "contrast", "saturation") for value in (0.0, 1e-6, 1.0, 2.0, 20.0)),
    *(("hue", value) for value in (-0.5, -0.1, -0.003, 0.0, 0.003, 0.4999, 0.5)),
    *(("blur", value) for value in (1e-3, 0.1, 1.41, 1.42, 2.0, 2.4, 2.5, 7.7, 60.0, 1000.0)),
    ("grey", 1),
    ("solarize", 1),
]


@pytest.mark.parametrize(("operation", "value"), EXTREMES)
@pytest.mark.parametrize("side", [1, 2, 5, 61])
def test_extreme_parameters(operation, value, side):
    rng = np.random.default_rng(side)
    agreement = new_agreement()
    p = whole_image(side, side)
    if operation in JITTER:
        p.jitter[:] = 1
        p.jitter_order[0, 0] = (JITTER[operation], NOTHING, NOTHING, NOTHING)
    getattr(p, {"blur": "sigma_px"}.get(operation, operation))[:] = value
    noise = rng.integers(0, 256, (side, side, 3), np.uint8)
    for image in (
        noise,
        np.zeros_like(noise),
        np.full_like(noise, 255),
        np.where(noise > 127, 255, 0).astype(np.uint8),
    ):
        agreement.add(run_cpu(image, p, 0, 0, "bicubic", side), run_pil(image, p, 0, 0, "bicubic", side))
    agreement.check(operation)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("operation", "value"),
    [("hue", -0.5), ("hue", 0.1), ("hue", 0.37), ("saturation", 0.83), ("saturation", 1.19), ("grey", 1)],
)
def test_every_colour_there_is(operation, value):
    """All 2^24 colours in one picture of 4096 × 4096."""
    side = 4096
    codes = np.arange(side * side, dtype=np.uint32).view(np.uint8).reshape(side, side, 4)
    image = np.ascontiguousarray(codes[..., :3])
    drawn = whole_image(side, side)
    getattr(drawn, operation)[:] = value
    p = only(operation, drawn, side=side)
    agreement = new_agreement()
    agreement.add(run_cpu(image, p, 0, 0, "bicubic", side), run_pil(image, p, 0, 0, "bicubic", side))
    agreement.check(operation)


def test_an_impulse_blurs_into_a_symmetric_bell():
    image = np.zeros((21, 21, 3), np.uint8)
    image[10, 10] = 255
    p = whole_image(21, 21)
    p.sigma_px[:] = 1.5
    blurred = run_cpu(image, p, 0, 0, "bicubic", 21)[..., 0].astype(int)
    assert np.array_equal(blurred, blurred[::-1]) and np.array_equal(blurred, blurred[:, ::-1])
    assert blurred[10, 10] == blurred.max() and abs(blurred.sum() - 255) < 60
    rows = np.arange(21) - 10
    assert abs(np.sqrt((blurred.sum(0) * rows**2).sum() / blurred.sum()) - 1.5) < 0.2


def test_the_box_has_unit_weight():
    for sigma in np.linspace(0.05, 12, 300):
        radius, inner, edge = box_weights(np.float32(sigma))
        assert (1 << 24) - 1 <= (2 * radius + 1) * inner + 2 * edge <= 1 << 24
        assert 0 <= edge <= inner


def test_the_normalized_view_is_the_view_normalized(images):
    table = normalization_table(Normalization(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7)))
    for seed, image in enumerate(images[:20]):
        p = draw_one(seed, image, BARLOW_TWINS_VIEWS)
        for v in range(2):
            out = np.full((SIDE, SIDE, 3), np.nan, np.float32)
            apply_view(image, p, 0, v, True, table, make_scratch(*image.shape[:2], SIDE), out)
            assert np.array_equal(out, table[np.arange(3), run_cpu(image, p, 0, v, "bicubic")])


def test_a_scratch_can_be_used_again_for_smaller_images(images):
    """What one view leaves behind must not show in the next."""
    largest = [max(image.shape[axis] for image in images[:40]) for axis in (0, 1)]
    shared, out = make_scratch(*largest, SIDE), np.empty((SIDE, SIDE, 3), np.uint8)
    for seed, image in enumerate(images[:40]):
        p = draw_one(seed, image, BARLOW_TWINS_VIEWS)
        for v in range(2):
            apply_view(image, p, 0, v, True, UNCHANGED, shared, out)
            assert np.array_equal(out, run_cpu(image, p, 0, v, "bicubic"))


def test_a_box_outside_the_image_or_too_small_a_scratch_is_refused(square_images):
    image, out = square_images[0], np.empty((SIDE, SIDE, 3), np.uint8)
    good = whole_image(SIDE, SIDE)
    for change in ({"box_top": 1}, {"box_left": -1}, {"box_height": 0}, {"box_width": SIDE + 1}):
        p = good._replace(**{name: np.full_like(getattr(good, name), value) for name, value in change.items()})
        with pytest.raises(AssertionError):
            apply_view(image, p, 0, 0, True, UNCHANGED, make_scratch(SIDE, SIDE, SIDE), out)
    with pytest.raises(AssertionError):
        apply_view(image, good, 0, 0, True, UNCHANGED, make_scratch(100, 100, SIDE), out)


def test_strength_zero_hue_is_torchvisions_jitter_without_hue(square_images):
    image = square_images[0]
    p = draw_one(0, image, (replace(ALWAYS, hue=0.0, p_grey=0.0, p_blur=0.0, p_solarize=0.0, p_flip=0.0),))
    assert np.array_equal(run_cpu(image, p, 0, 0, "bicubic"), run_pil(image, p, 0, 0, "bicubic"))
