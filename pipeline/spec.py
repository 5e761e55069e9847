"""What a view is and what a batch is: the contract between the data path and everything that uses it.

Shape legend, used in every docstring of the project:

    N  images in a dataset        B  images of one rank's batch     V  views of an image
    C  channels (3, R G B)        H  W  height and width, px        D  embedding dimensions
    K  classes

World size is always spelled `world_size`; `global_batch` = `rank_batch` × `world_size`.
"""

from __future__ import annotations  # torch takes seconds to load, and neither draws nor conversion need it

import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pipeline.constants import IMAGENET_MEAN, IMAGENET_STD
from pipeline.errors import UserError

if TYPE_CHECKING:
    import torch

SOLARIZE_THRESHOLD = 128  # v < 128 stays, v >= 128 becomes 255 - v (Zbontar 2021, appendix A)
INTERPOLATIONS = ("bicubic", "bilinear")


def _require(of: object, holds: Callable[[Any], bool], expected: str, *names: str) -> None:
    """Raises UserError, one sentence, about the first of these fields that is not as expected."""
    for name in names:
        if not holds(value := getattr(of, name)):
            raise UserError(f"{type(of).__name__}: {name} is {value!r}; expected {expected}")


def _is_number(value: Any, high: float = sys.float_info.max) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and bool(0 <= value <= high)


def is_whole(value: Any, low: int = 1) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and bool(value >= low)


def _are_numbers(value: Any, count: int) -> bool:
    return isinstance(value, tuple | list) and len(value) == count and all(map(_is_number, value))


def _is_range(value: Any) -> bool:
    return _are_numbers(value, 2) and 0 < value[0] <= value[1]


@dataclass(frozen=True)
class ViewSpec:
    """One row of the view table: the distribution that one view of an image is drawn from.

    The operations run in the order of the fields. `p_<op>` is the probability that the operation
    IS applied. The four jitter strengths follow torchvision's ColorJitter: a factor is uniform in
    [max(0, 1 - s), 1 + s], hue in [-s, s] turns.
    """

    area: tuple[float, float] = (0.08, 1.0)  # crop area as a share of the image's
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # crop width / height, log-uniform
    interpolation: str = "bicubic"  # or "bilinear"; both antialiased, as Pillow's
    p_flip: float = 0.5
    p_jitter: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    p_grey: float = 0.2
    p_blur: float = 0.0
    sigma_px: tuple[float, float] = (0.1, 2.0)
    p_solarize: float = 0.0

    def __post_init__(self) -> None:
        _require(self, _is_range, "(least, most), both above 0", "ratio", "sigma_px", "area")
        _require(self, lambda area: area[1] <= 1, "a share of the image, at most 1", "area")
        _require(self, INTERPOLATIONS.__contains__, " or ".join(INTERPOLATIONS), "interpolation")
        shares = [f.name for f in fields(self) if f.name.startswith("p_")]
        _require(self, lambda share: _is_number(share, 1.0), "a probability, 0 to 1", *shares)
        _require(self, _is_number, "a strength of 0 or more", "brightness", "contrast", "saturation", "hue")
        _require(self, lambda hue: hue <= 0.5, "at most 0.5", "hue")


@dataclass(frozen=True)
class CentreCrop:
    """The evaluation view: the shorter side resized to `resize_px`, then a centre crop. Nothing is drawn."""

    resize_px: int = 256
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        _require(self, is_whole, "a whole number of 1 or more", "resize_px")
        _require(self, INTERPOLATIONS.__contains__, " or ".join(INTERPOLATIONS), "interpolation")


@dataclass(frozen=True)
class Squash(CentreCrop):
    """The whole image in the square, out of proportion: resized as for the centre crop, then again to (H, W).

    Two resamplings, each rounded to 8 bits, as VISSL's VOC07 SVM has them (Resize 256, Resize [224, 224]).
    """


def centre_view(resolution_px: int) -> CentreCrop:
    """The evaluation view of a side: 256 → 224 px and the like; images of less than 64 px keep every pixel."""
    return CentreCrop(resize_px=round(resolution_px * 256 / 224) if resolution_px >= 64 else resolution_px)


# Zbontar 2021, section 2.2 and appendix A: the two views differ in blur and solarize only.
BARLOW_TWINS_VIEWS = (
    ViewSpec(p_blur=1.0, p_solarize=0.0),
    ViewSpec(p_blur=0.1, p_solarize=0.2),
)

# CIFAR-10 as solo-learn trains Barlow Twins on it: no blur at 32 px.
CIFAR_VIEWS = (
    ViewSpec(p_blur=0.0, p_solarize=0.0),
    ViewSpec(p_blur=0.0, p_solarize=0.2),
)

# Supervised training of the linear and semi-supervised protocols: crop and flip.
SUPERVISED_VIEW = ViewSpec(interpolation="bilinear", p_jitter=0.0, p_grey=0.0)

# What leaving one augmentation out means. Without crops the whole image's centre square is resized.
WITHOUT: dict[str, dict[str, Any]] = {
    "crop": {"area": (1.0, 1.0), "ratio": (1.0, 1.0)},
    **{name: {f"p_{name}": 0.0} for name in ("flip", "jitter", "grey", "blur", "solarize")},
}


def views_without(views: tuple[ViewSpec, ...], names: Iterable[str]) -> tuple[ViewSpec, ...]:
    """The same view table with some augmentations of `WITHOUT` left out."""
    for name in names:
        views = tuple(replace(view, **WITHOUT[name]) for view in views)
    return views


@dataclass(frozen=True)
class Normalization:
    """Per-channel mean and standard deviation in units of [0, 1], applied as (v / 255 - mean) / std."""

    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        _require(self, lambda row: _are_numbers(row, 3), "three numbers, none negative", "mean", "std")
        _require(self, lambda row: max(row) <= 1, "shares of 1, not of 255", "mean")
        _require(self, all, "three numbers above 0", "std")


class Batch(NamedTuple):
    """One rank's share of one step.

    views   V tensors (B, 3, H, W), channels-last in memory, normalized, of config.view_type, on the loader's device
    label   (B,) int64, the class index
    sample  (B,) int64, the position in the dataset file; with (seed, epoch, view) it names the pixels
    step    the global step this batch belongs to
    epoch   the epoch it belongs to
    substituted   how many of the samples stand in for one that cannot be decoded
    """

    views: tuple[torch.Tensor, ...]
    label: torch.Tensor
    sample: torch.Tensor
    step: int
    epoch: int
    substituted: int = 0


class Blocks(NamedTuple):
    """Block-shuffled order (order.py): blocks of `images` neighbours in the file, `window` of them mixed at a time."""

    images: int
    window: int


def _are_views(value: Any) -> bool:
    several = isinstance(value, tuple) and len(value) > 0 and all(isinstance(view, ViewSpec) for view in value)
    return several or isinstance(value, CentreCrop)


def _are_blocks(value: Any) -> bool:
    return value is None or (isinstance(value, Blocks) and all(map(is_whole, value)))


def _are_resolutions(value: Any) -> bool:
    rows = isinstance(value, tuple | list) and all(_are_numbers(row, 2) and is_whole(row[1]) for row in value)
    return rows and all(before[0] < after[0] for before, after in pairwise(value))


def _float32() -> torch.dtype:
    import torch

    return torch.float32


@dataclass(frozen=True)
class LoaderConfig:
    """Everything that decides what a loader yields, and how (from `backend` on) it gets there. Raises UserError.

    data            path of a .beton file with its manifest beside it; for dali also the shards.json of shards
    views           one ViewSpec a view, a single one for one view, or for evaluation a CentreCrop or a Squash
    resolution_px   side of the square views
    shuffle         True: shuffled full batches, epoch after epoch (order.shuffled_batches);
                    False: every sample once, in the order given (order.sequential_batches)
    ids             positions of the samples to use; None for all. Shuffled, none of them may be there twice
    blocks          None: every epoch a full shuffle; else a block-shuffled one, for files larger than the memory
    on_bad_image    "stop": an image that cannot be decoded raises UserError with its file's name; "substitute":
                    another sample stands in for it (bad_images.py), in shuffled streams
    check_bytes     hash each image's bytes at its first use; one that has changed since the conversion counts as one
                    that cannot be decoded
    resolutions     (first epoch, px), ascending: sides of the views that change with the epoch; () for resolution_px
    backend         fast, ffcv, resident, torch or dali: who decodes (loader.py); the batches are the same
    workers         threads (of torch: processes) of this rank; 0 for one a core it may use
    device          where the views end up
    views_on        "cpu" or "gpu": who makes the views (not torch); "auto" for the device they end up on, of a Squash
                    the CPU, which alone resizes twice
    view_type       of the normalized values: float32, or what autocast would round them to in any case, at half the
                    memory and copying
    """

    data: Path
    views: tuple[ViewSpec, ...] | ViewSpec | CentreCrop
    resolution_px: int
    global_batch: int
    seed: int = 0
    shuffle: bool = True
    ids: np.ndarray | None = None
    blocks: Blocks | None = None
    on_bad_image: str = "stop"
    check_bytes: bool = True
    resolutions: tuple[tuple[int, int], ...] = ()
    normalization: Normalization = field(default_factory=Normalization)
    rank: int = 0
    world_size: int = 1
    backend: str = "fast"
    workers: int = 0
    device: str = "cpu"
    views_on: str = "auto"
    view_type: torch.dtype = field(default_factory=_float32)

    def __post_init__(self) -> None:
        _require(
            self,
            lambda path: isinstance(path, str | os.PathLike) and bool(Path(path).name),
            "the path of a .beton",
            "data",
        )
        views = (self.views,) if isinstance(self.views, ViewSpec) else self.views
        object.__setattr__(self, "data", Path(self.data))
        object.__setattr__(self, "views", tuple(views) if isinstance(views, list) else views)
        wanted = "a ViewSpec, a tuple of them (one a view), or a CentreCrop"
        _require(self, _are_views, wanted, "views")
        whole = ("resolution_px", "global_batch", "world_size")
        _require(self, is_whole, "a whole number of 1 or more", *whole)
        _require(self, lambda n: is_whole(n, 0), "a whole number of 0 or more", "seed", "rank", "workers")
        _require(self, lambda seed: seed < 2**64, "a number of 64 bits", "seed")
        _require(self, lambda rank: rank < self.world_size, f"less than the world size, {self.world_size}", "rank")
        _require(self, lambda shuffle: isinstance(shuffle, bool), "True or False", "shuffle", "check_bytes")
        policies = ("stop", "substitute") if self.shuffle else ("stop",)  # a pass over all has no room for stand-ins
        _require(self, policies.__contains__, f"{' or '.join(policies)}, as shuffle={self.shuffle}", "on_bad_image")
        places = ("auto", "cpu") if isinstance(self.views, Squash) else ("auto", "cpu", "gpu")
        _require(self, places.__contains__, f"{', '.join(places[:-1])} or {places[-1]}", "views_on")
        _require(self, _are_blocks, "None or Blocks(images, window), both 1 or more", "blocks")
        _require(self, lambda n: isinstance(n, Normalization), "a Normalization", "normalization")
        _require(self, _are_resolutions, "(first epoch, px), ascending", "resolutions")
        floating = "a torch.dtype such as torch.float32"
        _require(self, lambda dtype: getattr(dtype, "is_floating_point", None) is True, floating, "view_type")

    @property
    def rows(self) -> tuple[ViewSpec | CentreCrop, ...]:
        """What each of the V views is."""
        return self.views if isinstance(self.views, tuple) else (self.views,)

    def resolution_at(self, epoch: int) -> int:
        """Side of an epoch's views, px."""
        return next((px for first, px in reversed(self.resolutions) if epoch >= first), self.resolution_px)
