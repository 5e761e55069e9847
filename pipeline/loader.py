"""One way to get batches: `make_loader(config)` picks the backend and imports it only then."""

from collections.abc import Iterator
from typing import Protocol

import numpy as np

from pipeline.errors import UserError
from pipeline.spec import Batch, LoaderConfig
from pipeline.storage.shards import SUFFIX as SHARDS


class Loader(Protocol):
    """What every backend offers. The same config gives the same samples and the same draws on each.

    ids  images      the samples in use (config.ids, or all of the file), (images,) int64
    steps_per_epoch  full batches an epoch when shuffled; all batches of one pass otherwise
    classes          class names        labels  (N,) int64 of the whole file
    sizes            heights and widths of the stored images, each (N,) int64, px
    """

    ids: np.ndarray
    images: int
    steps_per_epoch: int
    classes: list[str]
    labels: np.ndarray
    sizes: tuple[np.ndarray, np.ndarray]

    def batches(self, start_step: int = 0, stop_step: int | None = None) -> Iterator[Batch]: ...

    def close(self) -> None: ...


def make_loader(config: LoaderConfig) -> Loader:
    """The loader of `config.backend`. Raises UserError for a dataset, batch size or backend that cannot work."""
    if config.backend != "dali" and config.data.name.endswith(SHARDS):
        raise UserError(f"{config.data} are shards, which --loader dali reads; give --data a .beton, or choose that")
    if config.backend == "fast":
        from pipeline.loaders.threads import FfcvLoader as FastLoader

        return FastLoader(config)
    if config.backend == "ffcv":
        from pipeline.loaders.ffcv import FfcvLoader

        return FfcvLoader(config)
    if config.backend == "torch":
        from pipeline.loaders.reference import TorchLoader

        return TorchLoader(config)
    if config.backend == "dali":
        from pipeline.loaders.dali import DaliLoader

        return DaliLoader(config)
    if config.backend == "resident":
        from pipeline.loaders.resident import ResidentLoader

        return ResidentLoader(config)
    raise UserError(f"--loader {config.backend} is unknown; choose fast, ffcv, resident, torch or dali")
