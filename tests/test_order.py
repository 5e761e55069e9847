"""The order of samples: a permutation an epoch, the same global batch at any world size, resumable anywhere."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from pipeline.choices import order as order_module
from pipeline.choices.order import (
    epoch_order,
    rank_batch,
    sequential_batches,
    shuffled_batches,
    steps_per_epoch,
    window_count,
    windows_of_positions,
)
from pipeline.choices.subsets import balanced_subset, k_shot
from pipeline.errors import UserError
from pipeline.spec import Blocks

REPO = Path(__file__).resolve().parents[1]
IDS = np.arange(1000)
BLOCKS = Blocks(8, 16)


def _stream(world_size, start=0, stop=40, seed=3, global_batch=48, blocks=None):
    """The global batches, each as the concatenation of what the ranks get."""
    ranks = [
        list(shuffled_batches(seed, IDS, global_batch, r, world_size, start, stop, blocks)) for r in range(world_size)
    ]
    return [np.concatenate([ids for _, _, ids in parts]) for parts in zip(*ranks, strict=True)]


@pytest.mark.parametrize("blocks", [None, BLOCKS])
def test_every_epoch_is_a_permutation_of_its_own(blocks):
    orders = [epoch_order(7, epoch, IDS, blocks) for epoch in range(3)]
    for order in orders:
        assert np.array_equal(np.sort(order), IDS)
    assert not np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[0], epoch_order(8, 0, IDS, blocks))
    assert np.array_equal(orders[1], epoch_order(7, 1, IDS, blocks))


@pytest.mark.parametrize("blocks", [None, Blocks(5, 2)])
def test_positions_are_uniform(blocks):
    """Where sample 0 lands over 2,000 epochs, in ten bins: chi-square, 99.99 % level."""
    positions = [int(np.flatnonzero(epoch_order(1, epoch, IDS[:50], blocks) == 0)[0]) for epoch in range(2000)]
    counts = np.histogram(positions, bins=10, range=(0, 50))[0]
    assert stats.chisquare(counts).pvalue > 1e-4


@pytest.mark.parametrize("blocks", [None, BLOCKS])
@pytest.mark.parametrize("world_size", [2, 3, 4, 16])
def test_global_batches_do_not_depend_on_the_world_size(world_size, blocks):
    for one, many in zip(_stream(1, blocks=blocks), _stream(world_size, blocks=blocks), strict=True):
        assert np.array_equal(one, many)


def test_each_sample_at_most_once_an_epoch_and_the_rest_is_dropped():
    per_epoch = steps_per_epoch(len(IDS), 48)
    assert per_epoch == 20
    first = np.concatenate(_stream(2, 0, per_epoch))
    assert len(first) == len(np.unique(first)) == 960


@pytest.mark.parametrize(
    ("images", "global_batch", "world_size"), [(96, 48, 4), (103, 16, 1), (103, 16, 4), (50, 48, 16)]
)
def test_what_the_ranks_see_of_an_epoch(images, global_batch, world_size):
    """No sample twice, over all ranks; every sample where the batch divides them, else N mod G fewer, other ones."""
    ids, steps = np.arange(images) * 3, steps_per_epoch(images, global_batch)
    dropped = []
    for epoch in range(3):
        span = epoch * steps, (epoch + 1) * steps
        ranks = [list(shuffled_batches(2, ids, global_batch, r, world_size, *span)) for r in range(world_size)]
        assert all(len(part) == global_batch // world_size for batches in ranks for _, _, part in batches)
        seen = np.concatenate([part for batches in ranks for _, _, part in batches])
        assert len(seen) == len(np.unique(seen)) == images - images % global_batch
        dropped.append(frozenset(set(ids.tolist()) - set(seen.tolist())))
    assert images % global_batch == 0 or len(set(dropped)) > 1


def test_the_table_of_dropped_images():
    """The rows of the module's docstring against the steps that the stream really has."""
    numbers = [
        [int(x.replace(",", "")) for x in line.split()]
        for line in order_module.__doc__.splitlines()
        if re.fullmatch(r"[\d, ]+", line) and line.strip()
    ]
    rows = [row[i : i + 4] for row in numbers for i in (0, 4)]
    assert len(rows) == 8
    for images, global_batch, steps, dropped in rows:
        assert steps_per_epoch(images, global_batch) == steps
        assert images - steps * global_batch == dropped


@pytest.mark.parametrize("blocks", [None, BLOCKS])
def test_a_start_anywhere_goes_on_with_the_same_stream(blocks):
    whole = list(shuffled_batches(3, IDS, 48, 1, 2, 0, 50, blocks))
    for start in (1, 19, 20, 33):
        for (step, epoch, ids), (other_step, other_epoch, other) in zip(
            whole[start:], shuffled_batches(3, IDS, 48, 1, 2, start, 50, blocks), strict=True
        ):
            assert (step, epoch) == (other_step, other_epoch)
            assert np.array_equal(ids, other)


@pytest.mark.parametrize(("images", "block", "window"), [(1000, 8, 16), (1003, 8, 5), (17, 64, 2), (9, 1, 4)])
def test_a_window_holds_whole_blocks(images, block, window):
    """Around the file, windows change only where blocks do: every `block` positions, but for the last, short one."""
    blocks, starts = Blocks(block, window), set()
    for epoch in range(4):
        windows = windows_of_positions(5, epoch, images, blocks)
        assert set(windows) == set(range(window_count(images, blocks)))
        assert np.bincount(windows).max() <= block * window
        edges = np.flatnonzero(windows != np.roll(windows, 1))
        assert len({e % block for e in edges}) <= 1 + (images % block > 0)
        starts |= {e % block for e in edges}
        order = epoch_order(5, epoch, np.arange(images), blocks)
        assert (np.diff(windows[order]) >= 0).all()  # one window after the other
    assert block == 1 or images < 100 or len(starts) > 2  # elsewhere each epoch


def _mixing(order: np.ndarray, labels: np.ndarray, global_batch: int) -> tuple[float, float, float]:
    """Class entropy (bits) and classes of a batch, means over an epoch; correlation of neighbours' file positions."""
    entropies, counts = [], []
    for first in range(0, len(order) - global_batch + 1, global_batch):
        n = np.bincount(labels[order[first : first + global_batch]])
        share = n[n > 0] / global_batch
        entropies.append(-(share * np.log2(share)).sum())
        counts.append(len(share))
    return float(np.mean(entropies)), float(np.mean(counts)), float(np.corrcoef(order[:-1], order[1:])[0, 1])


def test_mixing_of_a_file_sorted_by_class():
    """100 classes of 200, batches of 128: in file order one class, from windows of 256 blocks nearly a full shuffle's.

    Fewer, larger blocks in a window of the same size mix less.
    """
    labels = np.repeat(np.arange(100), 200)
    ids = np.arange(len(labels))
    full, windowed, coarse = (
        _mixing(epoch_order(0, 0, ids, blocks), labels, 128) for blocks in (None, Blocks(8, 256), Blocks(64, 32))
    )
    assert _mixing(ids, labels, 128)[0] < 1
    assert windowed[0] > 0.96 * full[0] and windowed[1] > 0.88 * full[1] and abs(windowed[2]) < 0.03
    assert coarse[0] < windowed[0] - 0.5


@pytest.mark.slow
def test_the_table_of_mixing():
    """The rows of the module's docstring: ImageNet's size and classes, sorted by class, batches of 1024."""
    rows = re.findall(r"^ +(?:(\d+) × (\d+)|full shuffle) .* ([\d.]+) +(\d+) +(-?[\d.]+)$", order_module.__doc__, re.M)
    assert len(rows) == 6
    labels = np.repeat(np.arange(1000), 1282)[:1_281_167]
    for block, window, *told in rows:
        blocks = Blocks(int(block), int(window)) if block else None
        entropy, classes, correlation = _mixing(epoch_order(0, 0, np.arange(len(labels)), blocks), labels, 1024)
        assert f"{entropy:.2f} {classes:.0f} {correlation:.3f}".replace("-0.000", "0.000").split() == told


@pytest.mark.parametrize(("images", "global_batch", "world_size"), [(103, 16, 1), (103, 16, 4), (5, 16, 2)])
def test_one_pass_holds_every_sample_once_over_the_ranks(images, global_batch, world_size):
    ids = np.arange(images) * 2
    seen = [
        i
        for r in range(world_size)
        for _, _, part in sequential_batches(ids, global_batch, r, world_size)
        for i in part
    ]
    assert sorted(seen) == ids.tolist()


def test_choices_load_neither_torch_nor_the_command_line():
    """So they start at once, and a conversion, which forks, may use them."""
    code = "import sys, pipeline.choices.draws, pipeline.choices.order, pipeline.choices.subsets; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO, check=True)
    assert not {"torch", "tyro"} & set(done.stdout.split())


def test_user_errors():
    with pytest.raises(UserError, match="not divisible by the world size 3"):
        rank_batch(256, 3)
    with pytest.raises(UserError, match="larger than the dataset"):
        steps_per_epoch(100, 128)
    with pytest.raises(UserError, match="outside"):
        balanced_subset(0, np.zeros(4, np.int64), 1.5)


def test_balanced_subset_takes_its_share_of_every_class():
    labels = np.repeat(np.arange(5), [10, 20, 30, 200, 3])
    chosen = balanced_subset(0, labels, 0.1)
    assert np.bincount(labels[chosen]).tolist() == [1, 2, 3, 20, 1]
    assert np.array_equal(chosen, np.unique(chosen))
    assert not np.array_equal(chosen, balanced_subset(1, labels, 0.1))
    assert np.array_equal(balanced_subset(0, labels, 1.0), np.arange(len(labels)))


def test_k_shot_takes_as_many_of_every_class():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(5), [10, 20, 30, 200, 6]))
    sets = [k_shot(0, labels, shots) for shots in (1, 3, 6)]
    for chosen, shots in zip(sets, (1, 3, 6), strict=True):
        assert np.bincount(labels[chosen]).tolist() == [shots] * 5
        assert np.array_equal(chosen, np.unique(chosen))
    assert set(sets[0]) < set(sets[1]) < set(sets[2])
    assert not np.array_equal(sets[1], k_shot(1, labels, 3))
    for shots in (0, 7, -1):
        with pytest.raises(UserError, match="smallest class has 6 images"):
            k_shot(0, labels, shots)
