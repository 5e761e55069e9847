"""What every loader has, whatever makes its batches: the open dataset, the stream of samples, their parameters."""

import os
from collections.abc import Iterator

import numpy as np

from pipeline.choices.draws import ViewParams, centre_views, draw_views
from pipeline.choices.order import rank_batch, sequential_batches, shuffled_batches, steps_per_epoch
from pipeline.loaders.read_ahead import Stream, read_ahead
from pipeline.spec import Batch, CentreCrop, LoaderConfig
from pipeline.storage.beton import Stored
from pipeline.storage.shards import open_stored


def samples_in_use(config: LoaderConfig, dataset: Stored) -> np.ndarray:
    """The ids that a loader draws its batches from, int64."""
    return np.arange(len(dataset)) if config.ids is None else np.asarray(config.ids, np.int64)


def view_params(config: LoaderConfig, dataset: Stored, epoch: int, ids: np.ndarray) -> ViewParams:
    """The parameters (B, V) of all views of these samples in this epoch: drawn, or the centre crop's."""
    heights, widths, side_px = dataset.heights[ids], dataset.widths[ids], config.resolution_at(epoch)
    if isinstance(config.views, CentreCrop):
        return centre_views(heights, widths, config.views, side_px)
    return draw_views(config.seed, epoch, ids, heights, widths, config.views, side_px)


class Loader:
    """What every backend offers. The same config gives the same samples and the same draws on each.

    dataset  the open .beton file or shards     workers  threads or processes of this rank
    ids      the samples in use (config.ids, or all of the file), (images,) int64
    classes  class names                        labels   (N,) int64 of the whole file
    sizes    heights and widths of the stored images, each (N,) int64, px
    steps_per_epoch, which is len(loader): full batches an epoch when shuffled; all batches of one pass otherwise

    Raises UserError at construction for a dataset or batch size that cannot work, and while iterating for an image
    that cannot be decoded. A context manager that closes itself. One pass over batches at a time.
    """

    def __init__(self, config: LoaderConfig) -> None:
        self.config = config
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

    def stream(self, start_step: int = 0, stop_step: int | None = None, *, reads_ahead: bool = True) -> Stream:
        """What batches() is to make: (step, epoch, sample ids of this rank); in block order the file is read ahead."""
        c = self.config
        if not c.shuffle:
            assert c.on_bad_image == "stop", "a pass over all samples has no room for stand-ins"
            return sequential_batches(self.ids, c.global_batch, c.rank, c.world_size)
        assert stop_step is not None, "a shuffled stream has no end of its own"
        stream = shuffled_batches(
            c.seed, self.ids, c.global_batch, c.rank, c.world_size, start_step, stop_step, c.blocks
        )
        return read_ahead(stream, c, self.dataset, self.ids) if c.blocks and reads_ahead else stream

    def epoch(self, epoch: int = 0) -> Iterator[Batch]:
        """The batches of one epoch; without shuffling every epoch is the same pass."""
        return self.batches(epoch * len(self), (epoch + 1) * len(self))

    def batches(self, start_step: int = 0, stop_step: int | None = None) -> Iterator[Batch]:
        """Batches start_step … stop_step - 1 across epochs; without shuffling, the one pass over all samples."""
        raise NotImplementedError

    def close(self) -> None:
        """Ends the threads or processes. The loader cannot be used afterwards."""
        raise NotImplementedError
