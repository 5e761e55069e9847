"""What a loader makes, and the file read ahead of it in block-shuffled order."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.choices.order import windows_of_positions
from pipeline.loader import make_loader
from pipeline.loaders import read_ahead as read_ahead_module
from pipeline.loaders.base import Loader
from pipeline.spec import BARLOW_TWINS_VIEWS, Blocks, LoaderConfig
from pipeline.storage import shards as shards_module
from pipeline.storage.beton import jpeg_bytes, open_beton
from pipeline.storage.shards import open_shards, pack_shards, stored_ranges

BLOCKS = Blocks(4, 3)


@pytest.fixture(scope="module")
def config(small_beton) -> LoaderConfig:
    return LoaderConfig(small_beton, BARLOW_TWINS_VIEWS, 32, global_batch=6, seed=1, workers=2, blocks=BLOCKS)


class AtOnce(ThreadPoolExecutor):
    """Does what it is asked before it answers."""

    def submit(self, task, *arguments):
        task(*arguments)


def test_every_window_is_asked_for_before_it_is_used_and_once(config, monkeypatch):
    beton, asked = open_beton(config.data), []
    monkeypatch.setattr(read_ahead_module, "ThreadPoolExecutor", AtOnce)
    monkeypatch.setattr(shards_module, "NEAR_BYTES", 0)
    monkeypatch.setattr(read_ahead_module, "_read", lambda path, start, end: asked.append((start, end)))
    ids = np.arange(len(beton))
    for step, epoch, part in Loader(config).stream(0, 16):
        windows = windows_of_positions(config.seed, epoch, len(ids), BLOCKS)
        soon = [s for s in ids if windows[s] in (windows[part[0]], windows[part[0]] + 1)]
        for sample in {*part.tolist(), *soon}:
            start, end = beton.offsets[sample], beton.offsets[sample] + beton.sizes_bytes[sample]
            assert any(first <= start and end <= last for first, last in asked), (step, sample)
    long = [end - start for start, end in asked]
    assert np.mean(long) > 2 * beton.sizes_bytes.mean()
    bytes_asked = np.zeros(len(beton.data), np.int64)
    for start, end in asked:
        bytes_asked[start:end] += 1
    times = bytes_asked[beton.offsets]
    third = windows_of_positions(config.seed, 2, len(ids), BLOCKS) == 0
    assert np.array_equal(times, 2 + third)  # two epochs, and the first window of the next


def test_what_is_asked_for_is_read(config, tmp_path):
    """Into the page cache: a read that may not wait finds it there."""
    path = tmp_path / "file"
    path.write_bytes(os.urandom(24 << 20))
    with open(path, "rb", buffering=0) as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

        def cached(at: int) -> bool:
            try:
                return os.preadv(file.fileno(), [bytearray(1)], at, os.RWF_NOWAIT) == 1
            except BlockingIOError:
                return False

        if cached(1 << 20):
            pytest.skip("this file system does not let go of cached pages")
        before = _bytes_read_by_this_thread()
        read_ahead_module._read(path, 1 << 20, 11 << 20)
        assert 10 << 20 <= _bytes_read_by_this_thread() - before < 11 << 20  # the kernel's read-ahead is not counted
        assert all(cached(at) for at in range(1 << 20, 11 << 20, 4096))


def _bytes_read_by_this_thread() -> int:
    """Source: man 5 proc_pid_io, ``rchar``."""
    return int(Path("/proc/thread-self/io").read_text().split()[1])


def test_ranges_of_samples(config, tmp_path):
    """Neighbours in one range, tar by tar where there are shards."""
    for path in config.data.parent.glob("train.*"):
        (tmp_path / path.name).symlink_to(path)
    beton = open_beton(tmp_path / "train.beton")
    shards = open_shards(pack_shards(beton, 10))
    ids = np.array([0, 1, 2, 8, 9, 10, 11, 30])
    for stored, expected in ((beton, 3), (shards, 4)):
        ranges = stored_ranges(stored, ids)
        assert len(ranges) == expected
        assert sum(end - start for _, start, end in ranges) >= beton.sizes_bytes[ids].sum()
        for sample in ids:
            jpeg = jpeg_bytes(stored, sample).tobytes()
            assert any(jpeg in path.read_bytes()[start:end] for path, start, end in ranges)
            assert jpeg == jpeg_bytes(beton, sample).tobytes()


@pytest.mark.slow
def test_backends_and_ranks_share_the_order(config):
    def samples(**change):
        loader = make_loader(replace(config, **change))
        try:
            return [(batch.sample, batch.views[0]) for batch in loader.batches(2, 12)]
        finally:
            loader.close()

    ours = samples()
    halves = [samples(rank=r, world_size=2) for r in range(2)]
    for (sample, view), (first, _), (second, _), (same, pixels) in zip(
        ours, *halves, samples(backend="torch", workers=1), strict=True
    ):
        assert torch.equal(sample, torch.cat([first, second])) and torch.equal(sample, same)
        assert torch.equal(view, pixels)


def test_a_file_that_cannot_be_read_is_named(tmp_path, capsys):
    read_ahead_module._read(tmp_path / "gone.beton", 0, 10)
    assert "gone.beton cannot be read ahead from byte 0" in capsys.readouterr().err
