"""Scores against plain NumPy in float64."""

import numpy as np
import pytest
import torch

from eval.metrics import Accuracy, knn_accuracy, rank_accuracy
from train import knn_vote
from train.knn_vote import knn_ranks, label_ranks


def oracle_ranks(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Position of the label in a stable descending sort."""
    order = np.argsort(-scores, axis=1, kind="stable")
    return np.array([int(np.flatnonzero(row == y)[0]) for row, y in zip(order, labels, strict=True)])


def oracle_votes(bank, bank_labels, query, k, classes) -> np.ndarray:
    """One query's votes, float64, all similarities sorted."""
    similarity = np.array([query @ row / (np.linalg.norm(query) * np.linalg.norm(row)) for row in bank])
    votes = np.zeros(classes)
    for i in np.argsort(-similarity)[:k]:
        votes[bank_labels[i]] += np.exp(similarity[i] / 0.07)
    return votes


@pytest.fixture
def features():
    """Two overlapping clouds a class: 600 in the bank, 150 queries, 24 dimensions, 7 classes."""
    random = np.random.default_rng(3)
    centres = random.normal(size=(7, 24))
    bank_labels, query_labels = random.integers(7, size=600), random.integers(7, size=150)
    bank = centres[bank_labels] + random.normal(0, 1.6, (600, 24))
    queries = centres[query_labels] + random.normal(0, 1.6, (150, 24))
    return bank, bank_labels, queries, query_labels


def as_tensors(features):
    bank, bank_labels, queries, query_labels = (torch.from_numpy(x) for x in features)
    return bank.float(), bank_labels, queries.float(), query_labels


def test_label_ranks_are_those_of_a_stable_sort():
    random = np.random.default_rng(0)
    scores = random.integers(0, 6, (400, 11)).astype(np.float32)  # many ties
    labels = random.integers(0, 11, 400)
    found = label_ranks(torch.from_numpy(scores), torch.from_numpy(labels))
    assert np.array_equal(found.numpy(), oracle_ranks(scores, labels))


def test_equal_scores_are_not_a_hit_for_everyone():
    """A collapsed network scores chance, not 100 %."""
    labels = torch.arange(10)
    assert rank_accuracy(label_ranks(torch.zeros(10, 10), labels)) == Accuracy(10.0, 50.0)


def test_scores_that_are_not_numbers_are_misses():
    scores = torch.eye(4)
    scores[1, 1], scores[2, 0], scores[3, 0] = torch.nan, torch.inf, torch.nan
    assert label_ranks(scores, torch.arange(4)).tolist() == [0, 4, 4, 4]


def test_accuracy_in_percent():
    assert rank_accuracy(torch.tensor([0, 1, 4, 5])) == Accuracy(25.0, 75.0)


@pytest.mark.parametrize("chunks", [(256, 131_072), (7, 64), (150, 599)])
def test_knn_agrees_with_brute_force(features, chunks, monkeypatch):
    """Every rank of every query at every k, whatever pieces the work is cut into."""
    monkeypatch.setattr(knn_vote, "QUERY_CHUNK", chunks[0])
    monkeypatch.setattr(knn_vote, "BANK_CHUNK", chunks[1])
    bank, bank_labels, queries, query_labels = features
    found = knn_ranks(*as_tensors(features), 7)
    assert list(found) == [10, 20, 100, 200]
    for k, ranks in found.items():
        votes = np.array([oracle_votes(bank, bank_labels, query, k, 7) for query in queries])
        own = votes[np.arange(150), query_labels]
        expected = np.where(own > 0, oracle_ranks(votes, query_labels), 7)
        assert np.array_equal(ranks.numpy(), expected)
        assert 20 < 100 * (expected == 0).mean() < 95, "the case decides nothing"


def test_nearest_is_exact_and_sorted(monkeypatch):
    monkeypatch.setattr(knn_vote, "BANK_CHUNK", 50)
    bank, queries = torch.randn(333, 8, dtype=torch.float64), torch.randn(9, 8, dtype=torch.float64)
    bank[5] = 0
    values, rows = knn_vote.nearest(bank.float(), knn_vote.inverse_lengths(bank), queries.float(), 60)
    lengths = np.linalg.norm(bank, axis=1)
    lengths[5] = 1
    expected = np.sort((queries @ bank.T).numpy() / lengths, axis=1)[:, ::-1][:, :60]
    assert np.allclose(values.numpy(), expected, atol=1e-5)
    assert all(len(set(row.tolist())) == 60 for row in rows)


def test_knn_leaves_out_a_k_above_the_bank(features):
    bank, bank_labels, queries, query_labels = as_tensors(features)
    assert list(knn_ranks(bank[:60], bank_labels[:60], queries, query_labels, 7)) == [10, 20]


def test_a_class_without_votes_is_no_hit():
    """Top-5 of 10 classes where only class 0 votes: the four classes that fill up the five do not count."""
    bank, labels = torch.randn(30, 4), torch.zeros(30, dtype=torch.int64)
    result = knn_accuracy(bank, labels, torch.randn(20, 4), torch.arange(20) % 10, 10)
    assert result[10] == Accuracy(10.0, 10.0)


def test_knn_does_not_depend_on_the_length_of_features(features):
    bank, bank_labels, queries, query_labels = as_tensors(features)
    lengths = torch.rand(len(bank), 1) * 100 + 0.01
    stretched = knn_accuracy(bank * lengths, bank_labels, queries, query_labels, 7)
    assert stretched == knn_accuracy(bank, bank_labels, queries, query_labels, 7)


def test_half_precision_features_are_close(features):
    bank, bank_labels, queries, query_labels = as_tensors(features)
    full = knn_accuracy(bank, bank_labels, queries, query_labels, 7)[20].top1
    half = knn_accuracy(bank.half(), bank_labels, queries.half(), query_labels, 7)[20].top1
    assert abs(full - half) <= 100 * 3 / 150
