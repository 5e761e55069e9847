"""What the evaluations cost: nearest neighbours of a large bank, and a linear probe with and without kept features.

    python scripts/bench/evaluations.py                                            the neighbours alone
    python scripts/bench/evaluations.py --checkpoint runs/NAME --json eval.json    and the probe on that run's data

Neighbours: random features, the vote at every k of the protocol, checked against a float64 brute force on 200 queries
before a speed is given. Probe: an epoch that extracts the features of all training images again and trains on them,
an epoch on kept ones, and the whole protocol of --epochs epochs both ways: extracting once, or in every epoch.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from measure import as_text, in_turn, interval, machine, seconds_of, write_json
from neighbours import brute_force_votes

from eval.features import centre_loader_config, extract_features
from eval.linear import standardize_
from eval.subject import SubjectConfig, open_subject
from eval.supervised import Group, Heads, feature_stream, make_head, make_optimizer, threads_for, train_epoch
from pipeline.command import run_command
from pipeline.errors import UserError
from train.knn_vote import knn_ranks

CHECKED_QUERIES = 200


@dataclass(frozen=True)
class BenchConfig(SubjectConfig):
    """What to measure."""

    checkpoint: Annotated[Path, tyro.conf.Fixed, tyro.conf.Suppress] = Path()  # it is `probed` here
    probed: Annotated[Path | None, tyro.conf.arg(name="checkpoint")] = None
    """A run folder or checkpoint for the linear probe; None: it is left out."""
    bank: int = 50_000
    """Features that vote."""
    queries: int = 10_000
    """Features that are classified."""
    dimensions: int = 512
    """Numbers in each of these features."""
    classes: int = 100
    """How many classes the random labels have."""
    epochs: int = 30
    """Epochs of the probe's whole protocol."""
    repeats: int = 5
    """Measurements of everything."""
    json: Path | None = None
    """Where to write the records."""


def record(name: str, seconds: list[float], **facts) -> dict:
    """Mean and 95 % interval of some measurements, with the machine."""
    of = interval(seconds, 6)
    measured = {"name": name, "seconds": of["mean"], "ci95": of["ci95"], "repeats": len(seconds)}
    return measured | facts | {"machine": machine("torch")}


def brute_force_ranks(bank, labels, queries, truth, *, classes: int, k: int) -> np.ndarray:
    """The rank of each query's label in the float64 vote of its k nearest; K where no neighbour has it."""
    bank, labels, queries, truth = (x.cpu().numpy() for x in (bank.double(), labels, queries.double(), truth))
    votes = brute_force_votes(bank, labels, queries, classes=classes, k=k)
    own = votes[np.arange(len(queries)), truth]
    return np.where(own > 0, (votes > own[:, None]).sum(axis=1), classes)


def bench_neighbours(config: BenchConfig) -> dict:
    """Times the vote of random features; raises AssertionError unless the vote is the brute force's."""
    random = torch.Generator().manual_seed(0)
    bank, queries = (torch.randn(n, config.dimensions, generator=random) for n in (config.bank, config.queries))
    labels, truth = (torch.randint(config.classes, (n,), generator=random) for n in (config.bank, config.queries))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bank, labels, queries, truth = (x.to(device) for x in (bank, labels, queries, truth))
    few, few_truth = queries[:CHECKED_QUERIES], truth[:CHECKED_QUERIES]
    for k, ranks in knn_ranks(bank, labels, few, few_truth, config.classes).items():
        expected = brute_force_ranks(bank, labels, few, few_truth, classes=config.classes, k=k)
        assert np.array_equal(ranks.cpu().numpy(), expected), f"k = {k} disagrees with the brute force"

    def vote() -> None:
        ranks = knn_ranks(bank, labels, queries, truth, config.classes)
        float(ranks[max(ranks)].sum())  # waits for a GPU

    seconds = [seconds_of(vote) for _ in range(config.repeats)]
    size = f"{config.bank} × {config.queries} × {config.dimensions}"
    return record(f"nearest neighbours {size}", seconds, checked_queries=CHECKED_QUERIES)


def bench_probe(config: BenchConfig) -> list[dict]:
    """An epoch with the features extracted again and one on kept features, in turn."""
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
    turns = {"again": lambda: seconds_of(lambda: train(extract())), "kept": lambda: seconds_of(lambda: train(kept))}
    *_, seconds = in_turn(turns, config.repeats, warm_up=False)
    again, cached = np.mean(seconds["again"]), np.mean(seconds["kept"])
    facts = {"images": subject.subset.images, "arch": subject.encoder.info.arch}
    whole = config.epochs * again / (again + (config.epochs - 1) * cached)
    return [
        record("probe epoch, features extracted again", seconds["again"], **facts),
        record("probe epoch, kept features", seconds["kept"], **facts, times_faster=float(again / cached)),
        {"name": f"probe of {config.epochs} epochs, extracting once", "times_faster": float(whole)},
    ]


def main(config: BenchConfig) -> None:
    if min(config.repeats, config.epochs, config.queries, config.bank) < 1:
        raise UserError("--repeats, --epochs, --queries and --bank expect at least 1")
    records = [bench_neighbours(config)] + (
        bench_probe(replace(config, checkpoint=config.probed)) if config.probed else []
    )
    for one in records:
        seconds = f"{as_text({'mean': one['seconds'], 'ci95': one['ci95']})} s" if "seconds" in one else ""
        faster = f"{one['times_faster']:.1f} × faster" if "times_faster" in one else ""
        print(f"{one['name']:50} {seconds:22} {faster}")
    write_json(config.json, records)


if __name__ == "__main__":
    run_command(BenchConfig, main)
