"""What a loader is to make: the stream of (step, epoch, sample ids) that its configuration means.

In block-shuffled order the file is read ahead of its use: while the images of one window are decoded, a thread reads
the blocks of the next from their first byte to their last. The bytes go nowhere; what counts is that the page cache has
them. So a disk sees long reads alone, and memory is needed for two windows. (posix_fadvise and madvise would not do:
they read no more than the first few 100 kB of a range.)
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from pipeline.choices.order import (
    sequential_batches,
    shuffled_batches,
    steps_per_epoch,
    window_count,
    windows_of_positions,
)
from pipeline.spec import LoaderConfig
from pipeline.storage.beton import Beton
from pipeline.storage.shards import Shards, stored_ranges

READ_BYTES = 4 << 20

Plan = Iterator[tuple[int, int, np.ndarray]]


def samples_in_use(config: LoaderConfig, stored: Beton | Shards) -> np.ndarray:
    """The ids that a loader draws its batches from."""
    return np.arange(len(stored)) if config.ids is None else np.asarray(config.ids, np.int64)


def make_order(config: LoaderConfig, ids: np.ndarray, start_step: int, stop_step: int | None) -> Plan:
    """Yields (step, epoch, sample ids of this rank); `ids` are the samples in use, in file order."""
    c = config
    if not c.shuffle:
        assert c.on_bad_image == "stop", "a pass over all samples has no room for stand-ins"
        return sequential_batches(ids, c.global_batch, c.rank, c.world_size)
    assert stop_step is not None, "a shuffled stream has no end of its own"
    return shuffled_batches(c.seed, ids, c.global_batch, c.rank, c.world_size, start_step, stop_step, c.blocks)


def make_plan(
    config: LoaderConfig, stored: Beton | Shards, ids: np.ndarray, start_step: int, stop_step: int | None
) -> Plan:
    """The same, with the file read ahead of its use in block-shuffled order: to be asked for as batches are used."""
    plan = make_order(config, ids, start_step, stop_step)
    return read_ahead(plan, config, stored, ids) if config.shuffle and config.blocks else plan


def read_ahead(plan: Plan, config: LoaderConfig, stored: Beton | Shards, ids: np.ndarray) -> Plan:
    """Passes a plan on; beside it reads the window in use, where it starts inside one, and always the next."""
    c, epoch, asked = config, -1, -1
    per_epoch, windows = steps_per_epoch(len(ids), c.global_batch), window_count(len(ids), c.blocks)
    reader = ThreadPoolExecutor(1, "read ahead")
    try:
        for step, at_epoch, part in plan:
            if at_epoch != epoch:
                epoch = at_epoch
                counts = np.bincount(windows_of_positions(c.seed, epoch, len(ids), c.blocks), minlength=windows)
            position = step % per_epoch * c.global_batch
            now = epoch * windows + int(np.searchsorted(np.cumsum(counts), position, "right"))
            while asked < now + 1:
                asked = max(asked + 1, now)
                of_epoch, window = divmod(asked, windows)
                chosen = ids[windows_of_positions(c.seed, of_epoch, len(ids), c.blocks) == window]
                for file_range in stored_ranges(stored, chosen):
                    reader.submit(_read, *file_range)
            yield step, at_epoch, part
    finally:
        reader.shutdown(wait=False, cancel_futures=True)


def _read(path: Path, start: int, end: int) -> None:
    """Reads bytes start … end of a file, for the page cache."""
    buffer = bytearray(READ_BYTES)
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        while start < end and (count := file.readinto(memoryview(buffer)[: end - start])):
            start += count
