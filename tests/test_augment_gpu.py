"""The Triton kernels against Pillow and torchvision, and against the numba kernels: equal in every bit.

Without a CUDA device they run in Triton's interpreter, on small pictures; with one (`-m gpu`) the same tests run
the compiled kernels, and so does a larger one. What they compile to is looked at in test_machine_code.py.
"""

import os

import numpy as np
import PIL
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as F

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read where kernels are defined: before the imports below

import triton
import triton.language as tl

from pipeline.choices.draws import BRIGHTNESS, CONTRAST, HUE, NOTHING, SATURATION, ViewParams, centre_views, draw_views
from pipeline.choices.draws import empty_params as empty
from pipeline.spec import BARLOW_TWINS_VIEWS, CentreCrop, Normalization, ViewSpec
from pipeline.views import augment_gpu, colour_gpu
from pipeline.views.augment_cpu import UNCHANGED, apply_view, make_scratch
from pipeline.views.augment_gpu import make_views, normalize_views
from pipeline.views.gpu_plan import MAX_SIGMA_PX, ViewPlan, plan_views
from pipeline.views.reference import apply_view_pil
from pipeline.views.resample_cpu import height_first
from tests.philox import philox4x32_array

INTERPRETED = not isinstance(augment_gpu.start_colours, triton.JITFunction)
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="the kernels are compiled here")),
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(INTERPRETED, reason="they are interpreted here")]),
]
LEVELS = Normalization(mean=(0.0, 0.0, 0.0), std=(1 / 255, 1 / 255, 1 / 255))  # normalized to 0 … 255
ALWAYS = ViewSpec(p_flip=1.0, p_jitter=1.0, p_grey=0.5, p_blur=1.0, p_solarize=0.5)
JITTER = {"brightness": BRIGHTNESS, "contrast": CONTRAST, "saturation": SATURATION, "hue": HUE}

pytestmark = pytest.mark.skipif(
    INTERPRETED and torch.cuda.is_available(), reason="TRITON_INTERPRET is set on a machine with a GPU"
)


@pytest.fixture(scope="module", params=DEVICES)
def device(request) -> str:
    return request.param


def noise(*sizes: tuple[int, int]) -> list[np.ndarray]:
    """Smooth pictures with sharp edges and full range, uint8 (h, w, 3): every branch of every operation is taken."""
    pictures = []
    for seed, (height, width) in enumerate(sizes):
        rng = np.random.default_rng(seed)
        coarse = rng.integers(0, 256, (max(height // 4, 1), max(width // 4, 1), 3), np.uint8)
        picture = np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
        picture[height // 2 :, : width // 2] = rng.integers(0, 256, (height - height // 2, width // 2, 3), np.uint8)
        pictures.append(picture)
    return pictures


def packed(images: list[np.ndarray]) -> tuple[torch.Tensor, np.ndarray, np.ndarray, np.ndarray]:
    """One buffer with some bytes before each image; starts, heights, widths."""
    sizes = np.array([image.size for image in images])
    starts = np.cumsum(sizes + 5) - sizes
    pixels = torch.full((int(starts[-1] + sizes[-1]),), 99, dtype=torch.uint8)
    for start, image in zip(starts, images, strict=True):
        pixels[start : start + image.size] = torch.from_numpy(image.ravel())
    return pixels, starts, np.array([i.shape[0] for i in images]), np.array([i.shape[1] for i in images])


def run_gpu(
    images: list[np.ndarray], params: ViewParams, interpolations: list[str], side: int, device: str
) -> list[np.ndarray]:
    """V arrays of views, uint8 (B, side, side, 3)."""
    pixels, *table = packed(images)
    plan = plan_views(params, *table, interpolations, side).to(device)
    views = make_views(pixels.to(device), plan, LEVELS, torch.float32)
    return [np.rint(view.permute(0, 2, 3, 1).cpu().numpy()).astype(np.uint8) for view in views]


def run_pil(image: np.ndarray, params: ViewParams, b: int, v: int, interpolation: str, side: int) -> np.ndarray:
    return np.asarray(apply_view_pil(Image.fromarray(image), params, b, v, interpolation, side))


def check(images: list[np.ndarray], params: ViewParams, interpolations: list[str], side: int, device: str) -> None:
    ours = run_gpu(images, params, interpolations, side, device)
    for v, interpolation in enumerate(interpolations):
        for b, image in enumerate(images):
            theirs = run_pil(image, params, b, v, interpolation, side)
            assert np.array_equal(ours[v][b], theirs), f"view {v} of image {b}, {image.shape[:2]} px"


def draw(images: list[np.ndarray], views: tuple[ViewSpec, ...], side: int, seed: int = 0) -> ViewParams:
    heights, widths = (np.array([image.shape[axis] for image in images]) for axis in (0, 1))
    return draw_views(seed, 0, np.arange(len(images)), heights, widths, views, side)


def whole_images(images: list[np.ndarray], side: int) -> ViewParams:
    """One view an image: all of it, resized to the side, nothing else done."""
    p = empty(len(images), 1)
    p.box_height[:, 0] = [image.shape[0] for image in images]
    p.box_width[:, 0] = [image.shape[1] for image in images]
    p.resized_height[:] = p.resized_width[:] = side
    return p


# operation, value: each alone on one picture of the batch
ALONE = [
    *((name, value) for name in ("brightness", "contrast", "saturation") for value in (0.0, 0.61, 1.39)),
    *(("hue", value) for value in (-0.1, 0.0, 0.37)),
    *(("sigma_px", value) for value in (0.1, 1.3, 2.0)),
    ("flip", 1),
    ("grey", 1),
    ("solarize", 1),
]


@pytest.fixture(scope="module")
def alone(device) -> dict[tuple[str, float], tuple[np.ndarray, np.ndarray]]:
    """(operation, value) → ours, Pillow's; one launch for all."""
    side = 16
    images = noise(*[(side, side)] * len(ALONE))
    p = whole_images(images, side)
    for b, (operation, value) in enumerate(ALONE):
        getattr(p, operation)[b] = value
        if operation in JITTER:
            p.jitter[b] = 1
            p.jitter_order[b, 0] = (NOTHING, JITTER[operation], NOTHING, NOTHING)
    ours = run_gpu(images, p, ["bicubic"], side, device)[0]
    return {key: (ours[b], run_pil(images[b], p, b, 0, "bicubic", side)) for b, key in enumerate(ALONE)}


@pytest.mark.parametrize(("operation", "value"), ALONE)
def test_operation_alone(alone, operation, value):
    ours, theirs = alone[operation, value]
    assert np.array_equal(ours, theirs)
    assert not np.array_equal(theirs, noise(*[theirs.shape[:2]] * len(ALONE))[ALONE.index((operation, value))])


@pytest.mark.slow
@pytest.mark.parametrize(("side", "sigma_px"), [(3, 5.0), (40, 2.5), (16, MAX_SIGMA_PX)])
def test_wide_blurs_and_lines_shorter_than_the_box(side, sigma_px, device):
    images = noise((side, side))
    p = whole_images(images, side)
    p.sigma_px[:] = sigma_px
    check(images, p, ["bicubic"], side, device)


def test_contrast_at_each_place_in_the_order(device):
    orders = [(1, 0, 3, 2), (0, 1, 2, 3), (3, 2, 1, 0), (2, 3, 0, 1), (0, NOTHING, 3, 2)]
    orders += [(2, 1, NOTHING, 0), (NOTHING, 0, 2, 1)]  # without the hue, as where its strength is 0
    images = noise(*[(16, 16)] * len(orders))
    p = draw(images, (ALWAYS,), 16)
    p.jitter_order[:, 0] = orders
    p.sigma_px[:] = 0
    check(images, p, ["bicubic"], 16, device)


SIZES = [(1, 1), (1, 37), (41, 1), (16, 16), (90, 5), (5, 90), (31, 47), (47, 31)]


@pytest.mark.skipif(int(PIL.__version__.split(".")[0]) < 13, reason="older Pillows always resize the rows first")
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_crop_resize_of_odd_sizes(interpolation, device):
    images = noise(*SIZES)
    p = whole_images(images, 16)
    p.flip[::2] = 1
    first = [height_first(*(int(a[b, 0]) for a in p[2:6])) for b in range(len(images))]
    assert any(first) and not all(first)
    check(images, p, [interpolation], 16, device)


def test_boxes_inside_and_the_next_image_out_of_sight(device):
    images = noise(*SIZES[3:])
    p = draw(images, (ViewSpec(p_jitter=0.0, p_grey=0.0), ViewSpec(p_jitter=0.0, p_grey=0.0)), 16)
    check(images, p, ["bicubic", "bilinear"], 16, device)


def test_centre_crop_and_windows_that_reach_outside(device):
    images = noise((40, 60), (60, 40), (30, 31), (50, 20))
    heights, widths = (np.array([image.shape[axis] for image in images]) for axis in (0, 1))
    p = centre_views(heights, widths, CentreCrop(resize_px=20), 16)
    check(images, p, ["bilinear"], 16, device)
    p.resized_height[:], p.resized_width[:] = 20, 11
    p.window_top[:, 0], p.window_left[:, 0] = (-3, 0, 30, 7), (2, -4, 0, -20)
    p.flip[1:3] = 1
    check(images, p, ["bicubic"], 16, device)


def test_the_published_recipe(device):
    """Both views, drawn, as bfloat16: Pillow's pixels, torchvision's normalization rounded once, channels last."""
    images = noise((48, 40), (30, 44), (24, 25), (37, 37))
    side, p = 16, draw(images, BARLOW_TWINS_VIEWS, 16, seed=3)
    p.sigma_px[1, 1], p.solarize[1, 1], p.solarize[2, 1] = 0.9, 1, 1  # rare draws of view 2
    assert 0 < p.jitter.sum() < p.jitter.size
    pixels, *table = packed(images)
    plan = plan_views(p, *table, ["bicubic"] * 2, side).to(device)
    views = make_views(pixels.to(device), plan, Normalization(), torch.bfloat16)
    assert len(views) == 2
    for v, view in enumerate(views):
        assert view.shape == (4, 3, side, side) and view.dtype == torch.bfloat16
        assert view.is_contiguous(memory_format=torch.channels_last)
        for b, image in enumerate(images):
            theirs = F.to_tensor(run_pil(image, p, b, v, "bicubic", side).copy())
            theirs = F.normalize(theirs, Normalization().mean, Normalization().std).to(torch.bfloat16)
            assert torch.equal(view[b].cpu(), theirs)


def check_numba(images: list[np.ndarray], params: ViewParams, side: int, device: str) -> None:
    views = params.flip.shape[1]
    ours = run_gpu(images, params, ["bicubic"] * views, side, device)
    theirs = np.empty((side, side, 3), np.uint8)
    for b, image in enumerate(images):
        scratch = make_scratch(*image.shape[:2], side)
        for v in range(views):
            apply_view(image, params, b, v, True, UNCHANGED, scratch, theirs)
            assert np.array_equal(ours[v][b], theirs), f"view {v} of image {b}"


@pytest.mark.slow
def test_a_photograph_against_numba(imagenet_sample, device):
    """At 40 px blurred lines have a middle, where the kernel looks at no end, and planes have two tiles a row."""
    image = np.array(Image.open(imagenet_sample[0]).convert("RGB").reduce(4))
    params = draw([image], (ALWAYS,), 40)
    check_numba([image], params, 40, device)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="they are interpreted here")
def test_many_photographs_at_224_px_against_numba(imagenet_sample):
    images = [np.array(Image.open(path).convert("RGB")) for path in imagenet_sample[:200]]
    for seed, views in enumerate((BARLOW_TWINS_VIEWS, (ALWAYS, ALWAYS))):
        check_numba(images, draw(images, views, 224, seed), 224, "cuda")


@triton.jit
def turn_hues(colours, exact_hues, out, shift, COUNT: tl.constexpr):
    at = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    colour = tl.load(colours + at)
    r, g, b = colour_gpu._turn_hue((colour >> 16) & 255, (colour >> 8) & 255, colour & 255, shift, exact_hues)
    tl.store(out + at, (r << 16) | (g << 8) | b)


@pytest.mark.slow
def test_hue_of_every_colour_there_is(device):
    """All 2^24 colours (interpreted: an eighth of them) into 8-bit HSV, their hue shifted, and back."""
    step, count = (7, 1 << 20) if device == "cpu" else (1, 1 << 10)
    codes = torch.arange(0, 1 << 24, step, dtype=torch.int32, device=device)
    codes = codes[: len(codes) // count * count].contiguous()
    out = torch.empty_like(codes)
    hues = augment_gpu._exact_hues(codes.device)
    turn_hues[(len(codes) // count,)](codes, hues, out, 41, COUNT=count, enable_fp_fusion=False)
    image = codes.cpu().numpy().view(np.uint8).reshape(-1, count, 4)[..., 2::-1]
    theirs = np.asarray(F.adjust_hue(Image.fromarray(np.ascontiguousarray(image)), 41.5 / 255)).astype(np.int32)
    theirs = (theirs[..., 0] << 16) | (theirs[..., 1] << 8) | theirs[..., 2]
    assert np.array_equal(out.cpu().numpy(), theirs.ravel())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_finished_bytes_are_normalized_as_on_the_cpu(device, dtype):
    """Every value of every channel; a division by a number would round otherwise on a GPU."""
    levels = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, 3).reshape(1, 1, 16, 16, 3)
    (view,) = normalize_views(levels.to(device), Normalization(), dtype)
    theirs = F.normalize(F.to_tensor(levels[0, 0].numpy()), Normalization().mean, Normalization().std)
    assert torch.equal(view[0].cpu(), theirs.to(dtype)) and view.is_contiguous(memory_format=torch.channels_last)


@triton.jit
def philox_words(counters, out, seed, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    a, b = tl.load(counters + at), tl.load(counters + COUNT + at)
    c, d = tl.load(counters + 2 * COUNT + at), tl.load(counters + 3 * COUNT + at)
    a, b, c, d = tl.philox(seed, a, b, c, d)
    tl.store(out + at, a)
    tl.store(out + COUNT + at, b)
    tl.store(out + 2 * COUNT + at, c)
    tl.store(out + 3 * COUNT + at, d)


@pytest.mark.parametrize("seed", [0, 1, 2**32 + 5, 2**62 + 12345])
def test_triton_draws_the_bits_of_numpy(device, seed):
    """Triton's own Philox is the project's generator: draws could move to the GPU without changing one."""
    counters = np.random.default_rng(1).integers(0, 2**32, (4, 256), np.uint32)
    given = torch.from_numpy(counters.view(np.int32)).to(device).view(torch.uint32)
    out = torch.empty_like(given)
    philox_words[(1,)](given, out, seed, COUNT=256)
    key = np.broadcast_to(np.array([seed & 0xFFFFFFFF, seed >> 32], np.uint32), (256, 2))
    assert np.array_equal(out.view(torch.int32).cpu().numpy().view(np.uint32).T, philox4x32_array(counters.T, key))


def test_what_cannot_work_is_refused(device):
    images = noise((20, 30), (30, 20))
    pixels, *table = packed(images)
    p = whole_images(images, 16)
    good = plan_views(p, *table, ["bicubic"], 16)
    for change in ({"box_top": 1}, {"box_left": -1}, {"box_height": 0}, {"box_width": 31}):
        bad = p._replace(**{name: np.full_like(getattr(p, name), value) for name, value in change.items()})
        with pytest.raises(ValueError, match="leaves its"):
            plan_views(bad, *table, ["bicubic"], 16)
    with pytest.raises(ValueError, match="sigma 10 px"):
        plan_views(p._replace(sigma_px=np.full_like(p.sigma_px, 10)), *table, ["bicubic"], 16)
    with pytest.raises(ValueError, match="resized twice"):
        plan_views(p._replace(first_height=np.ones_like(p.first_height)), *table, ["bicubic"], 16)
    with pytest.raises(ValueError, match="one row an image"):
        plan_views(p, table[0][:1], *table[1:], ["bicubic"], 16)
    with pytest.raises(ValueError, match="contiguous uint8"):
        make_views(pixels.float().to(device), good.to(device), LEVELS)
    with pytest.raises(ValueError, match="the plan on meta"):
        make_views(pixels.to(device), good._replace(table=good.table.to("meta")), LEVELS)


def test_a_plan_travels_whole():
    images = noise((20, 30))
    plan = plan_views(whole_images(images, 16), *packed(images)[1:], ["bicubic"], 16)
    assert plan.to("cpu") == plan and isinstance(plan.to("meta"), ViewPlan)
