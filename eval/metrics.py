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


def precision_recall(scores: np.ndarray, present: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Precision and recall after each image in the order of falling scores: (N,), (N,) bool → (N,), (N,) float64.

    Equal scores keep their order. At least one image must be present.
    """
    hits = present[np.argsort(-scores, kind="stable")].astype(np.float64).cumsum()
    return hits / np.arange(1, len(hits) + 1), hits / hits[-1]


def average_precision_11(scores: np.ndarray, present: np.ndarray) -> float:
    """VOC 2007's: the mean over recall 0, 0.1, … 1 of the best precision at that recall or beyond, in [0, 1]."""
    precision, recall = precision_recall(scores, present)
    # Recalls are multiples of 1 / positives: a threshold such as 0.3 must not fall above its own equal by rounding.
    return float(np.mean([precision[recall >= t / 10 - 1e-9].max() for t in range(11)]))


def average_precision_area(scores: np.ndarray, present: np.ndarray) -> float:
    """The area under the precision envelope over recall, in [0, 1]: VOC's since 2010, and VISSL's for its SVMs."""
    precision, recall = precision_recall(scores, present)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float((np.diff(recall, prepend=0.0) * envelope).sum())
