"""What every loader has, whatever makes its batches: the open dataset, the samples in use, steps and epochs."""

import os
from collections.abc import Iterator

from pipeline.choices.order import rank_batch, steps_per_epoch
from pipeline.loaders.stream import Stream, make_stream, samples_in_use
from pipeline.spec import Batch, LoaderConfig
from pipeline.storage.shards import open_stored


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
        self.dataset = dataset = open_stored(config.data)
        self.ids = samples_in_use(config, dataset)
        self.images = len(self.ids)
        self.classes, self.labels = dataset.classes, dataset.labels
        self.sizes = (dataset.heights, dataset.widths)
        self.steps_per_epoch = steps_per_epoch(self.images, config.global_batch, drop_last=config.shuffle)
        rank_batch(config.global_batch, config.world_size)
        self.workers = config.workers or len(os.sched_getaffinity(0))

    def __len__(self) -> int:
        return self.steps_per_epoch

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def epoch(self, epoch: int = 0) -> Iterator[Batch]:
        """The batches of one epoch; without shuffling every epoch is the same pass."""
        return self.batches(epoch * len(self), (epoch + 1) * len(self))

    def batches(self, start_step: int = 0, stop_step: int | None = None) -> Iterator[Batch]:
        """Batches start_step … stop_step - 1 across epochs; without shuffling, the one pass over all samples."""
        raise NotImplementedError

    def close(self) -> None:
        """Ends the threads or processes. The loader cannot be used afterwards."""
        raise NotImplementedError

    def _stream(self, start_step: int, stop_step: int | None) -> Stream:
        return make_stream(self.config, self.dataset, self.ids, start_step, stop_step)
