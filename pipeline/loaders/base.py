"""What every loader has, whatever makes its batches: the open dataset, the stream of samples, their parameters."""

import os
from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch

from pipeline.choices.draws import ViewParams, centre_views, draw_views
from pipeline.choices.order import rank_batch, sequential_batches, shuffled_batches, steps_per_epoch
from pipeline.errors import UserError
from pipeline.loaders.read_ahead import Stream, read_ahead
from pipeline.spec import Batch, CentreCrop, LoaderConfig, is_whole
from pipeline.storage.beton import Stored
from pipeline.storage.shards import open_stored


def samples_in_use(config: LoaderConfig, dataset: Stored) -> np.ndarray:
    """The ids that a loader draws its batches from, int64. Raises UserError for ids that the dataset does not have."""
    if config.ids is None:
        return np.arange(len(dataset))
    ids = np.asarray(config.ids)
    if ids.ndim != 1 or len(ids) == 0 or ids.dtype.kind not in "iu":
        raise UserError(f"ids are {ids.dtype} of shape {ids.shape}; expected one or more whole numbers in a row")
    if ids.min() < 0 or ids.max() >= len(dataset):
        raise UserError(
            f"ids go from {ids.min()} to {ids.max()}; {config.data} has {len(dataset)} images, 0 to {len(dataset) - 1}"
        )
    if config.shuffle and len(np.unique(ids)) < len(ids):
        raise UserError("an id is there twice, which a shuffled order cannot keep apart; give each id once")
    return ids.astype(np.int64)


def require_whole(what: str, value: object) -> None:
    """Raises UserError for what is no step or epoch."""
    if not is_whole(value, 0) or value >= 2**63:  # type: ignore[operator]
        raise UserError(f"the {what} is {value!r}; expected a whole number of 0 or more")


def usable_device(name: str) -> torch.device:
    """The device of this name. Raises UserError if there is none."""
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"device {name!r} is none that views can be on; choose cpu, cuda, or cuda:0 and so on")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {name!r} is not here: PyTorch sees {torch.cuda.device_count()} GPUs; choose cpu")
    return device


def view_params(config: LoaderConfig, dataset: Stored, epoch: int, ids: np.ndarray) -> ViewParams:
    """The parameters (B, V) of all views of these samples in this epoch: drawn, or the centre crop's."""
    heights, widths, side_px = dataset.heights[ids], dataset.widths[ids], config.resolution_at(epoch)
    if isinstance(config.views, CentreCrop):
        return centre_views(heights, widths, config.views, side_px)
    rows = config.views if isinstance(config.views, tuple) else (config.views,)
    return draw_views(config.seed, epoch, ids, heights, widths, rows, side_px)


class Loader:
    """What every backend offers. The same config gives the same samples and the same draws on each.

    dataset  the open .beton file or shards     workers  threads or processes of this rank
    ids      the samples in use (config.ids, or all of the file), (images,) int64
    classes  class names                        labels   (N,) int64 of the whole file
    sizes    heights and widths of the stored images, each (N,) int64, px
    steps_per_epoch, which is len(loader): full batches an epoch when shuffled; all batches of one pass otherwise

    As PyTorch's DataLoader it can be iterated again and again: each time it is the next epoch's batches, or those of
    the epoch that `set_epoch` named. Several passes at once are the same batches as one after the other; --loader torch
    and ffcv have one at a time, and an older one says so.

    Raises UserError at construction for what cannot work, and while iterating for an image that cannot be decoded. A
    context manager that closes itself.
    """

    def __init__(self, config: LoaderConfig) -> None:
        self.config, self.device = config, usable_device(config.device)
        self._epoch = self._first = 0  # of the next iteration: the epoch, and where in it it begins
        self._next_step, self._closed = 0, False
        self.dataset = open_stored(config.data)
        self.ids = samples_in_use(config, self.dataset)
        self.images = len(self.ids)
        self.classes, self.labels = self.dataset.classes, self.dataset.labels
        self.sizes = (self.dataset.heights, self.dataset.widths)
        self.steps_per_epoch = steps_per_epoch(self.images, config.global_batch, drop_last=config.shuffle)
        rank_batch(config.global_batch, config.world_size)
        self.workers = config.workers or len(os.sched_getaffinity(0))

    def __len__(self) -> int:
        return self.steps_per_epoch

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Batch]:
        # Read at the first batch: Lightning asks for an iterator before it says which epoch it is.
        epoch, first = self._epoch, self._first
        self._epoch, self._first = epoch + 1, 0
        start_step = epoch * len(self) + first
        batches = self.batches(start_step, (epoch + 1) * len(self))
        for batch in batches if self.config.shuffle else islice(batches, first, None):
            self._next_step = batch.step + 1
            yield batch

    @property
    def sampler(self) -> "Loader":
        """Where Lightning and others, as of a DataLoader, look for `set_epoch`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """The epoch of the next iteration, as of a DistributedSampler. Raises UserError for none."""
        require_whole("epoch", epoch)
        self._epoch, self._first = epoch, self._first if epoch == self._epoch else 0

    def state_dict(self) -> dict[str, int]:
        """Where the iteration is, after the batch that was handed out last; Lightning keeps it in its checkpoints."""
        return {"step": self._next_step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """The next iteration continues there, in the middle of an epoch."""
        self._next_step = state["step"]
        self._epoch, self._first = divmod(self._next_step, len(self))

    def require_open(self) -> None:
        """Raises UserError after close()."""
        if self._closed:
            raise UserError("this loader is closed; make another one with make_loader(config)")

    def stream(self, start_step: int = 0, stop_step: int | None = None, *, reads_ahead: bool = True) -> Stream:
        """What batches() is to make: (step, epoch, sample ids of this rank); in block order the file is read ahead."""
        self.require_open()
        c = self.config
        require_whole("first step", start_step)
        if stop_step is not None or c.shuffle:
            require_whole("step to stop before", stop_step)
        if not c.shuffle:
            return sequential_batches(self.ids, c.global_batch, c.rank, c.world_size)
        assert stop_step is not None
        stream = shuffled_batches(
            c.seed, self.ids, c.global_batch, c.rank, c.world_size, start_step, stop_step, c.blocks
        )
        return read_ahead(stream, c, self.dataset, self.ids) if c.blocks and reads_ahead else stream

    def epoch(self, epoch: int = 0) -> Iterator[Batch]:
        """The batches of one epoch; without shuffling every epoch is the same pass. Raises UserError for none."""
        require_whole("epoch", epoch)
        return self.batches(epoch * len(self), (epoch + 1) * len(self))

    def batches(self, start_step: int = 0, stop_step: int | None = None) -> Iterator[Batch]:
        """Batches start_step … stop_step - 1 across epochs; without shuffling, the one pass over all samples."""
        raise NotImplementedError

    def close(self) -> None:
        """Ends the threads or processes. The loader cannot be used afterwards."""
        self._closed = True
