"""Subsets of a dataset with the same share, or number, of images of every class: a pure function of seed and labels.

Each image has a random key that depends on the seed and its place alone, and the lowest keys of a class are taken: so
a smaller subset of a seed lies within a larger one.
"""

from collections.abc import Callable

import numpy as np

from pipeline.choices.rng import DOMAIN_SPLIT, random_keys
from pipeline.errors import UserError


def balanced_subset(seed: int, labels: np.ndarray, fraction: float) -> np.ndarray:
    """A class-balanced share of a dataset: labels (N,) → sorted ids with round(fraction · n) ≥ 1 of each class."""
    if not 0 < fraction <= 1:
        raise UserError(f"--fraction {fraction} is outside (0, 1]; give a share such as 0.01, 0.1 or 1.0")
    return _of_each_class(seed, labels, lambda members: max(1, round(fraction * members)))


def k_shot(seed: int, labels: np.ndarray, shots: int) -> np.ndarray:
    """`shots` images of each class: labels (N,) → sorted ids. Fewer shots of the same seed are among more of them."""
    fewest = int(np.bincount(labels)[np.unique(labels)].min())
    if not 1 <= shots <= fewest:
        raise UserError(f"--shots {shots}: the smallest class has {fewest} images; give 1 … {fewest}")
    return _of_each_class(seed, labels, lambda members: shots)


def held_out_subset(seed: int, labels: np.ndarray, holdout: float) -> np.ndarray:
    """A share below 1 of a dataset, or so many images: labels (N,) → sorted ids, of each class its share and ≥ 1.

    Whatever is asked for, the number is exact: the classes take turns by Webster's method, after one image each.
    """
    wanted = holdout * len(labels) if holdout < 1 else holdout
    fewest, count = len(np.unique(labels)), round(wanted)
    count = max(count, fewest) if holdout < 1 else count
    if not fewest <= count < len(labels):
        raise UserError(
            f"--holdout {holdout:g} takes {count} of {len(labels)} images; of each of the {fewest} classes it takes one"
            " or more, and one must stay: give another number, or add images"
        )
    by_class = np.lexsort((random_keys(seed, DOMAIN_SPLIT, 0, np.arange(len(labels))), labels))
    members, first = np.bincount(labels)[labels[by_class]], np.searchsorted(labels[by_class], labels[by_class])
    turn = np.arange(len(labels)) - first
    due = np.where(turn == 0, 0, (turn + 0.5) / members)
    return np.sort(by_class[np.argsort(due, kind="stable")[:count]])


def _of_each_class(seed: int, labels: np.ndarray, keep: Callable[[int], int]) -> np.ndarray:
    """keep(n) of each class's n images, those with the lowest keys: labels (N,) → sorted ids."""
    ids = np.arange(len(labels))
    keys = random_keys(seed, DOMAIN_SPLIT, 0, ids)
    chosen = []
    for label in np.unique(labels):
        members = ids[labels == label]
        chosen.append(members[np.argsort(keys[members], kind="stable")[: keep(len(members))]])
    return np.sort(np.concatenate(chosen))
