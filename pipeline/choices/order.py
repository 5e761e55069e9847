"""Which samples, in which order: a pure function of (seed, epoch, step, rank, world size).

    epoch e:  order = ids sorted by a random 64-bit key of (seed, e, id)           one permutation an epoch
    step s :  order[s·G … (s+1)·G]            G = global batch; the incomplete last batch is dropped
    rank r :  the r-th of world_size equal slices of that

So a global batch holds the same samples in the same order at any world size, every sample appears at
most once an epoch, and a run can start at any step without replaying the ones before it.

What an epoch drops, N mod G images, other ones each epoch, whatever the world size:

    N            G      steps    dropped          N         G      steps    dropped
    1,281,167    256    5,004        143          50,000    256      195         80
    1,281,167   1024    1,251        143          50,000   1024       48        848
    1,281,167   2048      625      1,167          50,000   2048       24        848
    1,281,167   4096      312      3,215          50,000   4096       12        848

Block-shuffled order, for files larger than the memory: blocks of neighbours in the file take their turns in a random
order, and a window of so many blocks is shuffled as one. Every epoch its own, from seed and epoch alone, like the full
shuffle. How well it mixes, on a file sorted by class as the converter's are (ImageNet's size and classes, batches of
1024; entropy of a batch's classes in bits; correlation of the file positions of successive images):

    block × window    MB a read   GB, two windows    entropy   classes in a batch   correlation
    full shuffle            0.1               141       9.16                  641         0.000
    8 × 4096                0.9               7.2       9.04                  601         0.001
    16 × 2048               1.8               7.2       8.91                  559         0.001
    32 × 1024               3.5               7.2       8.67                  483         0.001
    32 × 4096               3.5              28.8       9.04                  601        -0.002
    256 × 128              28.2               7.2       6.94                  141         0.007
"""

from collections.abc import Iterator

import numpy as np

from pipeline.choices.rng import DOMAIN_BLOCKS, DOMAIN_ORDER, random_keys, words_array
from pipeline.errors import UserError
from pipeline.spec import Blocks


def epoch_order(seed: int, epoch: int, ids: np.ndarray, blocks: Blocks | None = None) -> np.ndarray:
    """The ids (N,) in the order of this epoch. Ties of the 64-bit keys keep the order given: stable.

    With `blocks`, window after window, each of them shuffled.
    """
    order = np.argsort(random_keys(seed, DOMAIN_ORDER, epoch, ids), kind="stable")
    if blocks:
        order = order[np.argsort(windows_of_positions(seed, epoch, len(ids), blocks)[order], kind="stable")]
    return ids[order]


def window_count(images: int, blocks: Blocks) -> int:
    """Windows an epoch."""
    return -(-images // (blocks.images * blocks.window))


def windows_of_positions(seed: int, epoch: int, images: int, blocks: Blocks) -> np.ndarray:
    """The window, counted from 0, in which each of the ids in use has its turn: (N,) int64.

    The first block begins anywhere in the file, and the last one continues at the file's start: so no two neighbours
    are in one block in every epoch.
    """
    begin = int(words_array(seed, DOMAIN_BLOCKS, epoch, [0], 1, 0)[0, 0]) % images
    numbers = np.arange(-(-images // blocks.images))
    turn = np.empty_like(numbers)
    turn[np.argsort(random_keys(seed, DOMAIN_BLOCKS, epoch, numbers), kind="stable")] = numbers
    return turn[(np.arange(images) - begin) % images // blocks.images] // blocks.window


def rank_batch(global_batch: int, world_size: int) -> int:
    """Images a rank gets of one global batch. Raises UserError if they cannot be shared equally."""
    if global_batch % world_size:
        raise UserError(
            f"--global-batch {global_batch} is not divisible by the world size {world_size}; "
            f"choose a multiple of {world_size}, for example {max(1, global_batch // world_size) * world_size}"
        )
    return global_batch // world_size


def steps_per_epoch(images: int, global_batch: int, drop_last: bool = True) -> int:
    """Steps of one epoch. Raises UserError if not even one batch fills up."""
    if drop_last and global_batch > images:
        raise UserError(
            f"--global-batch {global_batch} is larger than the dataset ({images} images); "
            f"choose at most {images} (only full batches are trained on)"
        )
    return images // global_batch if drop_last else -(-images // global_batch)


def shuffled_batches(
    seed: int,
    ids: np.ndarray,
    global_batch: int,
    rank: int,
    world_size: int,
    start_step: int,
    stop_step: int,
    blocks: Blocks | None = None,
) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yields (step, epoch, sample ids of this rank) for steps start_step … stop_step - 1, across epochs."""
    share = rank_batch(global_batch, world_size)
    per_epoch = steps_per_epoch(len(ids), global_batch)
    epoch, order = -1, ids
    for step in range(start_step, stop_step):
        if step // per_epoch != epoch:
            epoch = step // per_epoch
            order = epoch_order(seed, epoch, ids, blocks)
        first = step % per_epoch * global_batch + rank * share
        yield step, epoch, order[first : first + share]


def sequential_batches(
    ids: np.ndarray, global_batch: int, rank: int, world_size: int
) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yields (step, 0, sample ids of this rank): every id once, in the order given, the last batch short.

    Step s holds ids[s·G … (s+1)·G]; rank r takes every world_size-th of them from the r-th on, so a short
    batch is shared as evenly as it can be, and a rank's share of it may be empty.
    """
    for step in range(steps_per_epoch(len(ids), global_batch, drop_last=False)):
        yield step, 0, ids[step * global_batch : (step + 1) * global_batch][rank::world_size]
