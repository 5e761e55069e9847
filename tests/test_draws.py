"""The draws: their frequencies and distributions, torchvision's crop, and what they may depend on."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as F

from pipeline.choices.draws import BRIGHTNESS, HUE, NOTHING, ViewParams, centre_views, draw_views, empty_params
from pipeline.spec import BARLOW_TWINS_VIEWS, SUPERVISED_VIEW, CentreCrop, ViewSpec

DRAWS = 100_000
SIGNIFICANT = 1e-4  # the draws are fixed by the seed, so a test that passes once passes always


@pytest.fixture(scope="module")
def params() -> ViewParams:
    size = np.full(DRAWS, 400)
    return draw_views(11, 3, np.arange(DRAWS), size, size + 100, BARLOW_TWINS_VIEWS, 224)


@pytest.mark.parametrize("view", [0, 1])
@pytest.mark.parametrize("name", ["flip", "jitter", "grey", "blur", "solarize"])
def test_each_operation_is_applied_as_often_as_the_table_says(params, view, name):
    happened = params.sigma_px[:, view] > 0 if name == "blur" else getattr(params, name)[:, view]
    p = getattr(BARLOW_TWINS_VIEWS[view], f"p_{name}")
    assert abs(happened.mean() - p) <= 4 * np.sqrt(p * (1 - p) / DRAWS)


@pytest.mark.parametrize("view", [0, 1])
@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("brightness", 0.6, 1.4), ("contrast", 0.6, 1.4), ("saturation", 0.8, 1.2), ("hue", -0.1, 0.1)],
)
def test_each_factor_is_uniform(params, view, name, low, high):
    drawn = getattr(params, name)[:, view]
    assert stats.kstest(drawn, stats.uniform(low, high - low).cdf).pvalue > SIGNIFICANT


def test_the_numbers_of_a_view_are_uncorrelated(params):
    names = ("box_top", "flip", "jitter", "brightness", "contrast", "saturation", "hue", "grey", "sigma_px")
    table = np.stack([getattr(params, name)[:, 0].astype(np.float64) for name in names])
    assert np.abs(np.corrcoef(table) - np.eye(len(names))).max() < 4.5 / np.sqrt(DRAWS)


@pytest.mark.parametrize("view", [0, 1])
def test_sigma_is_uniform_where_there_is_blur(params, view):
    drawn = params.sigma_px[:, view]
    assert stats.kstest(drawn[drawn > 0], stats.uniform(0.1, 1.9).cdf).pvalue > SIGNIFICANT


@pytest.mark.parametrize("view", [0, 1])
def test_the_24_orders_of_the_jitter_are_equally_frequent(params, view):
    codes = params.jitter_order[:, view].astype(np.int64) @ [64, 16, 4, 1]
    _, counts = np.unique(codes, return_counts=True)
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > SIGNIFICANT


def test_the_two_views_of_an_image_are_independent(params):
    for name in ("box_top", "box_width", "flip", "jitter", "brightness", "hue", "grey"):
        one, two = getattr(params, name).T
        assert abs(np.corrcoef(one, two)[0, 1]) < 4 / np.sqrt(DRAWS), name


@pytest.mark.parametrize("size", [(375, 500), (500, 333), (64, 64), (30, 400)])
def test_the_crop_is_distributed_as_torchvisions(size):
    torch.manual_seed(0)
    height, width = size
    image = torch.empty(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)])
    n = 20_000
    p = draw_views(5, 0, np.arange(n), np.full(n, height), np.full(n, width), BARLOW_TWINS_VIEWS[:1], 224)
    ours = np.stack([p.box_top, p.box_left, p.box_height, p.box_width], -1)[:, 0]
    for column in range(4):
        assert stats.ks_2samp(ours[:, column], theirs[:, column]).pvalue > SIGNIFICANT
    area = ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3]
    ratio = ours[:, 3] / ours[:, 2], theirs[:, 3] / theirs[:, 2]
    assert stats.ks_2samp(*area).pvalue > SIGNIFICANT
    assert stats.ks_2samp(*ratio).pvalue > SIGNIFICANT


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (3000, 20), (20, 3000), (7, 9)])
def test_the_crop_of_an_odd_image_lies_inside_it(size):
    n = 2000
    height, width = (np.full(n, s) for s in size)
    p = draw_views(1, 0, np.arange(n), height, width, BARLOW_TWINS_VIEWS, 224)
    assert (p.box_height > 0).all() and (p.box_width > 0).all()
    assert (p.box_top >= 0).all() and (p.box_left >= 0).all()
    assert (p.box_top + p.box_height <= size[0]).all() and (p.box_left + p.box_width <= size[1]).all()


def test_a_hopeless_ratio_ends_in_torchvisions_centred_crop():
    torch.manual_seed(0)
    for height, width in ((3000, 20), (20, 3000), (1, 500), (500, 1)):
        theirs = RandomResizedCrop.get_params(torch.empty(3, height, width), [0.9, 1.0], [3 / 4, 4 / 3])
        p = draw_views(1, 0, np.arange(1), np.array([height]), np.array([width]), (ViewSpec(area=(0.9, 1.0)),), 224)
        assert (p.box_top[0, 0], p.box_left[0, 0], p.box_height[0, 0], p.box_width[0, 0]) == theirs


def test_draws_do_not_depend_on_how_the_samples_are_batched():
    ids = np.array([5, 900_000, 17, 3, 1_281_166])
    heights, widths = np.array([375, 500, 1, 400, 333]), np.array([500, 375, 900, 400, 500])
    whole = draw_views(9, 2, ids, heights, widths, BARLOW_TWINS_VIEWS, 224)
    for b in range(len(ids)):
        alone = draw_views(9, 2, ids[b : b + 1], heights[b : b + 1], widths[b : b + 1], BARLOW_TWINS_VIEWS, 224)
        for name in ViewParams._fields:
            assert np.array_equal(getattr(alone, name)[0], getattr(whole, name)[b]), name


def test_seed_epoch_sample_and_view_each_change_the_draw():
    def boxes(seed, epoch, sample):
        p = draw_views(seed, epoch, np.array([sample]), np.array([400]), np.array([400]), BARLOW_TWINS_VIEWS, 224)
        return [tuple(int(a[0, v]) for a in p[:4]) for v in range(2)]

    drawn = boxes(1, 1, 1) + boxes(2, 1, 1) + boxes(1, 2, 1) + boxes(1, 1, 2)
    assert len(set(drawn)) == len(drawn)


def test_an_operation_of_strength_zero_is_left_out():
    """torchvision's ColorJitter(hue=0) leaves the hue alone; adjust_hue by 0 turns does not, it rounds to HSV."""
    ids = np.arange(100)
    size = np.full(100, 64)
    p = draw_views(0, 0, ids, size, size, (replace(BARLOW_TWINS_VIEWS[0], hue=0.0),), 32)
    assert not (p.jitter_order == HUE).any()
    assert ((p.jitter_order == NOTHING).sum(-1) == 1).all() and ((p.jitter_order == BRIGHTNESS).sum(-1) == 1).all()
    assert (draw_views(0, 0, ids, size, size, (SUPERVISED_VIEW,), 32).jitter == 0).all()


def test_a_crop_resizes_to_the_whole_view(params):
    assert (params.resized_height == 224).all() and (params.resized_width == 224).all()
    assert not params.window_top.any() and not params.window_left.any()


def test_empty_params_change_nothing():
    p = empty_params(2, 3)
    assert p.jitter_order.shape == (2, 3, 4) and p.hue.shape == (2, 3)
    assert (p.brightness == 1).all() and not any(a.any() for a in (p.jitter, p.grey, p.flip, p.sigma_px, p.solarize))


@pytest.mark.parametrize("resize_px", [256, 30])
@pytest.mark.parametrize(
    "size", [(375, 500), (500, 375), (333, 500), (224, 224), (256, 256), (101, 37), (1, 7), (3, 1), (257, 100)]
)
def test_centre_views_are_torchvisions_resize_and_centre_crop(size, resize_px):
    """The oracle's pixels tell where its window lies: a picture whose values are its coordinates."""
    height, width = size
    ramp = np.zeros((height, width, 3), np.uint8)
    ramp[..., 0] = np.linspace(1, 255, height)[:, None]
    ramp[..., 1] = np.linspace(1, 255, width)[None]
    image = Image.fromarray(ramp)
    theirs = F.center_crop(F.resize(image, resize_px), 32)
    p = centre_views(np.array([height]), np.array([width]), CentreCrop(resize_px=resize_px), 32)
    top, left = int(p.window_top[0, 0]), int(p.window_left[0, 0])
    ours = image.resize((int(p.resized_width[0, 0]), int(p.resized_height[0, 0])), Image.Resampling.BILINEAR)
    assert np.array_equal(np.asarray(ours.crop((left, top, left + 32, top + 32))), np.asarray(theirs))
    assert (p.box_height[0, 0], p.box_width[0, 0]) == size
