"""Scores of evaluations: top-k hits, those of the nearest-neighbour vote, average precision. Pure functions."""

from typing import NamedTuple

import numpy as np
import torch

from train.knn_vote import knn_ranks


class Accuracy(NamedTuple):
    """Shares of images, in percent, whose label is the first (among the first five) of the prediction."""

    top1: float
    top5: float


def rank_accuracy(ranks: torch.Tensor) -> Accuracy:
    """Ranks of the labels (N,) → Accuracy."""
    return Accuracy(*(100.0 * (ranks < k).double().mean().item() for k in (1, 5)))


def knn_accuracy(*args, **kwargs) -> dict[int, Accuracy]:
    """The arguments of `knn_ranks` → {k: Accuracy}."""
    return {k: rank_accuracy(ranks) for k, ranks in knn_ranks(*args, **kwargs).items()}


def ranked_hits(scores: np.ndarray, present: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many of the best images are present, and how many those are: (N,), (N,) bool → (N,), (N,) float64.

    Equal scores keep their order. At least one image must be present.
    """
    hits = present[np.argsort(-scores, kind="stable")].astype(np.float64).cumsum()
    return hits, np.arange(1.0, len(hits) + 1)


def eleven_point_mean(hits: np.ndarray, counted: np.ndarray, positives: int) -> float:
    """VOC 2007's average precision: the mean over recall 0, 0.1, … 1 of the best precision at that recall or beyond.

    `hits` of the `counted` best, (N,) each, in the order of falling scores. 0 where a recall is never reached.
    """
    precision = hits / np.maximum(counted, 1)
    # Recall ≥ point / 10, in whole numbers: rounding would decide where they are equal.
    return float(np.mean([precision[10 * hits >= point * positives].max(initial=0.0) for point in range(11)]))


def average_precision_11(scores: np.ndarray, present: np.ndarray) -> float:
    """`eleven_point_mean` of images: scores (N,), which are present (N,) bool → in [0, 1]."""
    return eleven_point_mean(*ranked_hits(scores, present), present.sum())


def average_precision_area(scores: np.ndarray, present: np.ndarray) -> float:
    """The area under the precision envelope over recall, in [0, 1]: VOC's since 2010, and VISSL's for its SVMs."""
    hits, counted = ranked_hits(scores, present)
    envelope = np.maximum.accumulate((hits / counted)[::-1])[::-1]
    return float((np.diff(hits / hits[-1], prepend=0.0) * envelope).sum())
