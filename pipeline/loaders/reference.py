"""The reference: Pillow decodes, torchvision's functions make the views, DataLoader processes do the work.

`apply_view_pil` is the definition of a view; every other backend is tested against it. The loader yields
what the fast one yields, from the same file, order and draws, at the speed such pipelines usually have.
"""

import io
import multiprocessing
import os
from collections.abc import Iterator

import numpy as np
import torch
import torch.utils.data
import torchvision.transforms.functional as F
from PIL import Image, ImageFilter
from torchvision.transforms import InterpolationMode

from pipeline.choices.draws import BRIGHTNESS, CONTRAST, HUE, SATURATION, ViewParams, centre_views, draw_views
from pipeline.choices.order import rank_batch, steps_per_epoch
from pipeline.errors import UserError
from pipeline.loaders.bad_images import BadImages
from pipeline.loaders.stream import make_plan, samples_in_use
from pipeline.spec import SOLARIZE_THRESHOLD, Batch, CentreCrop, LoaderConfig
from pipeline.storage.beton import MODE_RAW, Beton, jpeg_bytes, open_beton
from pipeline.storage.decode import decode_status


def _apply_jitter_pil(image: Image.Image, p: ViewParams, b: int, v: int) -> Image.Image:
    for operation in p.jitter_order[b, v]:
        if operation == BRIGHTNESS:
            image = F.adjust_brightness(image, float(p.brightness[b, v]))
        elif operation == CONTRAST:
            image = F.adjust_contrast(image, float(p.contrast[b, v]))
        elif operation == SATURATION:
            image = F.adjust_saturation(image, float(p.saturation[b, v]))
        elif operation == HUE:
            image = F.adjust_hue(image, float(p.hue[b, v]))
    return image


def apply_view_pil(
    image: Image.Image, p: ViewParams, b: int, v: int, interpolation: str, resolution_px: int
) -> Image.Image:
    """View v of the RGB image that row b of the parameters was drawn for: the definition, on Pillow images."""
    top, left, height, width = (int(a[b, v]) for a in (p.box_top, p.box_left, p.box_height, p.box_width))
    image = F.crop(image, top, left, height, width)
    size = [int(p.resized_height[b, v]), int(p.resized_width[b, v])]
    image = F.resize(image, size, InterpolationMode(interpolation))
    image = F.crop(image, int(p.window_top[b, v]), int(p.window_left[b, v]), resolution_px, resolution_px)
    if p.flip[b, v]:
        image = F.hflip(image)
    if p.jitter[b, v]:
        image = _apply_jitter_pil(image, p, b, v)
    if p.grey[b, v]:
        image = F.to_grayscale(image, 3)
    if p.sigma_px[b, v] > 0:
        image = image.filter(ImageFilter.GaussianBlur(float(p.sigma_px[b, v])))
    if p.solarize[b, v]:
        image = F.solarize(image, SOLARIZE_THRESHOLD)
    return image


def decode_pil(beton: Beton, sample: int) -> Image.Image:
    """The stored image as RGB. Raises UserError, with the file's name, where it is not the image the table says."""
    height, width = int(beton.heights[sample]), int(beton.widths[sample])
    stored = jpeg_bytes(beton, sample)
    try:
        if beton.modes[sample] == MODE_RAW:
            return Image.fromarray(np.asarray(stored).reshape(height, width, 3))
        image = Image.open(io.BytesIO(stored)).convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(_damaged(beton, sample, str(error))) from None
    if image.size != (width, height):
        raise UserError(_damaged(beton, sample, f"it is {image.size} px, the table says {(width, height)}"))
    return image


def _damaged(beton: Beton, sample: int, reason: str) -> str:
    name = beton.file_names()[sample]
    return f"image {sample} of {beton.path} ({name}) cannot be decoded: {reason}; convert the dataset again"


class _Steps(torch.utils.data.Dataset):
    """(step, epoch, ids) → that batch's tensors, made in a DataLoader process; a UserError comes back as a value."""

    def __init__(self, config: LoaderConfig) -> None:
        self.config = config
        self.beton: Beton | None = None  # opened where it is used: a memory map must not be pickled

    def _open(self) -> None:
        self.beton = open_beton(self.config.data)
        self.bad = BadImages(self.config, self.beton, samples_in_use(self.config, self.beton))

    def __getitem__(self, plan: tuple[int, int, np.ndarray]) -> tuple | UserError:
        step, epoch, ids = plan
        if self.beton is None:
            self._open()
        try:
            if self.bad.substitute:
                ids = self.bad.decodable(epoch, ids, lambda new: [decode_status(self.beton, sample) for sample in new])
            return step, epoch, ids, self._views(epoch, ids), int((ids != plan[2]).sum())
        except UserError as error:
            return error

    def _views(self, epoch: int, ids: np.ndarray) -> tuple[torch.Tensor, ...]:
        c, beton = self.config, self.beton
        side, heights, widths = c.resolution_at(epoch), beton.heights[ids], beton.widths[ids]
        if isinstance(c.views, CentreCrop):
            rows, params = (c.views,), centre_views(heights, widths, c.views, side)
        else:
            rows, params = c.views, draw_views(c.seed, epoch, ids, heights, widths, c.views, side)
        shape = (len(ids), 3, side, side)
        views = tuple(torch.empty(shape, memory_format=torch.channels_last) for _ in rows)
        for b, sample in enumerate(ids):
            image = decode_pil(beton, int(sample))
            for v, row in enumerate(rows):
                view = apply_view_pil(image, params, b, v, row.interpolation, side)
                views[v][b] = F.normalize(F.to_tensor(view), c.normalization.mean, c.normalization.std)
        return views


def _as_made(batch: tuple | UserError) -> tuple | UserError:
    return batch


class TorchLoader:
    """Batches from a .beton file by Pillow and torchvision; see LoaderConfig and Batch for what is in them.

    Raises UserError at construction for a dataset or batch size that cannot work, and while iterating
    for an image that cannot be decoded. One pass of batches() at a time.
    """

    def __init__(self, config: LoaderConfig) -> None:
        self.beton = beton = open_beton(config.data)
        self.config = config
        self.ids = samples_in_use(config, beton)
        self.images, self.classes, self.labels = len(self.ids), beton.classes, beton.labels
        self.sizes = (beton.heights, beton.widths)
        self.steps_per_epoch = steps_per_epoch(self.images, config.global_batch, drop_last=config.shuffle)
        rank_batch(config.global_batch, config.world_size)
        self.workers = config.workers or len(os.sched_getaffinity(0))
        self._plan: list | Iterator = []
        # A forked process would inherit numba's and torch's thread pools in an unknown state. So a clean server
        # forks the workers, once it has imported what they need.
        multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])
        self._loader = torch.utils.data.DataLoader(
            _Steps(config),
            batch_size=None,
            collate_fn=_as_made,
            sampler=self,
            num_workers=self.workers,
            multiprocessing_context="forkserver",
            persistent_workers=True,
        )

    def __iter__(self) -> Iterator[tuple[int, int, np.ndarray]]:
        """What the DataLoader takes its work from: the plan of the current pass."""
        return iter(self._plan)

    def batches(self, start_step: int = 0, stop_step: int | None = None) -> Iterator[Batch]:
        """Batches start_step … stop_step - 1 across epochs; without shuffling, the one pass over all samples."""
        c = self.config
        self._plan = make_plan(c, self.beton, self.ids, start_step, stop_step)
        for made in self._loader:
            if isinstance(made, UserError):
                raise made
            step, epoch, ids, views, substituted = made
            yield Batch(
                tuple(view.to(c.device, c.view_type) for view in views),
                torch.from_numpy(self.labels[ids]).to(c.device),
                torch.from_numpy(ids).to(c.device),
                step,
                epoch,
                substituted,
            )

    def close(self) -> None:
        """Ends the worker processes. The loader cannot be used afterwards."""
        self._loader = None
