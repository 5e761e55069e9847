"""Reads a file ahead of its use if the order is block-shuffled, so that the page cache has it in time.

While the images of one window are decoded, a thread reads the blocks of the next from their first byte to their last.
The bytes go nowhere; what counts is that the page cache has them. So a disk sees long reads alone, and memory is needed
for two windows. (posix_fadvise and madvise would not do: they read no more than the first few 100 kB of a range.)
"""

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from pipeline.choices.order import steps_per_epoch, window_count, windows_of_positions
from pipeline.spec import LoaderConfig
from pipeline.storage.beton import Stored
from pipeline.storage.shards import stored_ranges

READ_BYTES = 4 << 20

Stream = Iterator[tuple[int, int, np.ndarray]]  # (step, epoch, sample ids of this rank)


def read_ahead(stream: Stream, config: LoaderConfig, dataset: Stored, ids: np.ndarray) -> Stream:
    """Passes a stream on; beside it reads the window in use, if it starts inside one, and always the next.

    `ids` are the samples in use, in file order.
    """
    c, blocks, epoch, asked = config, config.blocks, -1, -1
    assert blocks is not None, "a full shuffle has no next block"
    per_epoch, windows = steps_per_epoch(len(ids), c.global_batch), window_count(len(ids), blocks)
    reader = ThreadPoolExecutor(1, "read ahead")
    try:
        for step, at_epoch, part in stream:
            if at_epoch != epoch:
                epoch = at_epoch
                counts = np.bincount(windows_of_positions(c.seed, epoch, len(ids), blocks), minlength=windows)
            position = step % per_epoch * c.global_batch
            now = epoch * windows + int(np.searchsorted(np.cumsum(counts), position, "right"))
            while asked < now + 1:
                asked = max(asked + 1, now)
                of_epoch, window = divmod(asked, windows)
                chosen = ids[windows_of_positions(c.seed, of_epoch, len(ids), blocks) == window]
                for file_range in stored_ranges(dataset, chosen):
                    reader.submit(_read, *file_range)
            yield step, at_epoch, part
    finally:
        reader.shutdown(wait=False, cancel_futures=True)


def _read(path: Path, start: int, end: int) -> None:
    """Reads bytes start … end of a file, for the page cache. A fault is said here, and met again by the decoder."""
    buffer = bytearray(READ_BYTES)
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(start)
            while start < end and (count := file.readinto(memoryview(buffer)[: end - start])):
                start += count
    except OSError as error:
        print(f"note: {path} cannot be read ahead from byte {start}: {error}", file=sys.stderr, flush=True)
