"""What the evaluations cost: nearest neighbours of a large bank, and a linear probe with and without kept features.

    python scripts/bench/evaluations.py                                            the neighbours alone
    python scripts/bench/evaluations.py --checkpoint runs/NAME --json eval.json    and the probe on that run's data

Neighbours: random features, the vote at every k of the protocol, checked against a float64 brute force on 200 queries
before a speed is given. Probe: an epoch that extracts the features of all training images again and trains on them,
an epoch on kept ones, and the whole protocol of --epochs epochs both ways: extracting once, or in every epoch.
"""

import json
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy import stats

from eval.features import centre_loader_config, extract_features
from eval.linear import standardize_
from eval.subject import SubjectConfig, open_subject
from eval.supervised import Group, Heads, feature_stream, make_head, make_optimizer, threads_for, train_epoch
from pipeline.command import run_command
from pipeline.disk import write_whole
from pipeline.errors import UserError
from train.knn_vote import knn_ranks

CHECKED_QUERIES = 200


@dataclass(frozen=True)
class BenchConfig(SubjectConfig):
    """What to measure."""

    checkpoint: Path | None = None
    """A run folder or checkpoint for the linear probe; None: it is left out."""
    bank: int = 50_000
    """Features that vote."""
    queries: int = 10_000
    """Features that are classified."""
    dimensions: int = 512
    """Of each of them."""
    classes: int = 100
    """Of the random labels."""
    epochs: int = 30
    """Of the probe's whole protocol."""
    repeats: int = 5
    """Measurements of everything."""
    json: Path | None = None
    """Where to write the records."""


def record(name: str, seconds: list[float], **facts) -> dict:
    """Mean and 95 % interval (Student's t) of some measurements, with the machine."""
    half = stats.t.ppf(0.975, len(seconds) - 1) * stats.sem(seconds) if len(seconds) > 1 else 0.0
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    machine = f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    return (
        {"name": name, "seconds": float(np.mean(seconds)), "ci95": float(half), "repeats": len(seconds)}
        | facts
        | {"machine": machine}
    )


def brute_force_ranks(bank, bank_labels, queries, query_labels, classes: int, k: int) -> np.ndarray:
    """The rank of each query's label in the float64 vote of its k nearest."""
    bank, queries = (x.double().cpu().numpy() for x in (bank, queries))
    bank = bank / np.linalg.norm(bank, axis=1, keepdims=True)
    ranks = []
    for query, label in zip(queries, query_labels.tolist(), strict=True):
        similarity = bank @ (query / np.linalg.norm(query))
        nearest = np.argsort(-similarity)[:k]
        votes = np.bincount(bank_labels.cpu().numpy()[nearest], np.exp(similarity[nearest] / 0.07), classes)
        ranks.append(int((votes > votes[label]).sum()) if votes[label] > 0 else classes)
    return np.array(ranks)


def bench_neighbours(config: BenchConfig) -> dict:
    random = torch.Generator().manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bank, queries = (torch.randn(n, config.dimensions, generator=random) for n in (config.bank, config.queries))
    labels, truth = (torch.randint(config.classes, (n,), generator=random) for n in (config.bank, config.queries))
    case = [x.to(device) for x in (bank, labels, queries, truth)]
    few = slice(0, CHECKED_QUERIES)
    found = knn_ranks(*case[:2], case[2][few], case[3][few], config.classes)
    for k, ranks in found.items():
        expected = brute_force_ranks(bank, labels, queries[few], truth[few], config.classes, k)
        assert np.array_equal(ranks.cpu().numpy(), expected), f"k = {k} disagrees with the brute force"
    seconds = []
    for _ in range(config.repeats):
        started = time.perf_counter()
        ranks = knn_ranks(*case, config.classes)
        float(ranks[max(ranks)].sum())  # waits for a GPU
        seconds.append(time.perf_counter() - started)
    size = f"{config.bank} × {config.queries} × {config.dimensions}"
    return record(f"nearest neighbours {size}", seconds, checked_queries=CHECKED_QUERIES)


def bench_probe(config: BenchConfig) -> list[dict]:
    """Alternates the two kinds of epoch, so that a busy moment meets both."""
    subject = open_subject(config)
    loading = centre_loader_config(subject.encoder, subject.dataset.train.path, None, config.loader, config.workers)
    batch, dimensions = min(256, subject.subset.images), subject.encoder.info.features
    heads = Heads({"linear": make_head(dimensions, subject.classes, 0)}).to(subject.encoder.device)
    optimizer = make_optimizer([Group(list(heads.parameters()), 3.0)], nesterov=False)

    def extract() -> torch.Tensor:
        features = extract_features(subject.encoder, loading, torch.float32).to(subject.encoder.device)
        standardize_(features)
        return features

    def train(features: torch.Tensor) -> None:
        stream = feature_stream(features, subject.train_labels(), 0, batch, 1)
        with threads_for(batch * subject.classes * dimensions):
            float(train_epoch(heads, optimizer, stream, len(features) // batch)["linear"])

    kept = extract()
    assert torch.equal(kept, extract()), "features extracted again differ"
    again_s, cached_s = [], []
    for _ in range(config.repeats):
        started = time.perf_counter()
        train(extract())
        again_s.append(time.perf_counter() - started)
        started = time.perf_counter()
        train(kept)
        cached_s.append(time.perf_counter() - started)
    again, cached = np.mean(again_s), np.mean(cached_s)
    facts = {"images": subject.subset.images, "arch": subject.encoder.info.arch}
    whole = config.epochs * again / (again + (config.epochs - 1) * cached)
    return [
        record("probe epoch, features extracted again", again_s, **facts),
        record("probe epoch, kept features", cached_s, **facts, times_faster=float(again / cached)),
        {"name": f"probe of {config.epochs} epochs, extracting once", "times_faster": float(whole)},
    ]


def main(config: BenchConfig) -> None:
    if min(config.repeats, config.epochs, config.queries, config.bank) < 1:
        raise UserError("--repeats, --epochs, --queries and --bank expect at least 1")
    records = [bench_neighbours(config)] + (bench_probe(config) if config.checkpoint else [])
    for one in records:
        seconds = f"{one['seconds']:.3f} ± {one['ci95']:.3f} s" if "seconds" in one else ""
        faster = f"{one['times_faster']:.1f} × faster" if "times_faster" in one else ""
        print(f"{one['name']:50} {seconds:22} {faster}")
    if config.json:
        write_whole(config.json, json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    run_command(BenchConfig, main)
