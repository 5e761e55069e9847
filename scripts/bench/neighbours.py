"""Counts a run's nearest-neighbour results again, by brute force in float64, from the features it kept.

    python eval/knn.py --checkpoint model.pth --data DIR --out RUN
    python eval/knn.py --checkpoint model.pth --data DIR --out RUN --features random
    python scripts/bench/neighbours.py RUN --data DIR --json checks.json

Nothing of the evaluation's own counting is used, only its file format. Exit code 1 where a number differs.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from measure import write_json

from eval.kept import find_features
from eval.splits import Dataset, open_dataset
from eval.subject import read_results
from pipeline.command import run_command
from pipeline.errors import UserError

TEMPERATURE = 0.07


@dataclass(frozen=True)
class RecountConfig:
    """What to count again."""

    run: tyro.conf.Positional[Path]
    """The folder with results.jsonl and features/."""
    data: Path
    """The dataset that they are of."""
    json: Path | None = None
    """Where to write what was found."""


def brute_force_votes(bank: np.ndarray, labels: np.ndarray, queries: np.ndarray, *, classes: int, k: int) -> np.ndarray:
    """(N, K) float64: what each class gets from the k nearest of each query, one query at a time, all sorted."""
    bank = bank / np.linalg.norm(bank, axis=1, keepdims=True)
    votes = np.zeros((len(queries), classes))
    for query, row in zip(queries, votes, strict=True):
        similarity = bank @ (query / np.linalg.norm(query))
        nearest = np.argsort(-similarity)[:k]
        row[:] = np.bincount(labels[nearest], np.exp(similarity[nearest] / TEMPERATURE), classes)
    return votes


def kept_features(run: Path, result: dict, dataset_sha256: str) -> np.ndarray | None:
    """The features of a whole split that a result was made of, float64."""
    wanted = {"dataset_sha256": dataset_sha256, "ids_sha256": "all", "key": result.get("key", "")}
    wanted |= {name: result[name] for name in ("checkpoint_sha256", "resolution_px")}
    found = find_features(run / "features", **wanted)
    return None if found is None else found.double().numpy()


def recount_result(result: dict, dataset: Dataset, run: Path) -> dict | None:
    """The recorded and the recounted top-1 of every k; None where the features were not kept."""
    digests = dataset.sha256()
    if result["dataset_sha256"] != digests:
        return None
    bank, queries = (kept_features(run, result, digest) for digest in digests.values())
    if bank is None or queries is None:
        return None
    recorded = {int(name[len("top1_k") :]): of for name, of in result["values"].items() if name.startswith("top1_k")}
    labels, truth = dataset.train.labels, dataset.val_labels
    classes, recounted = int(max(labels.max(), truth.max())) + 1, {}
    for k in recorded:
        votes = brute_force_votes(bank, labels, queries, classes=classes, k=k)
        recounted[k] = 100 * float((votes.argmax(axis=1) == truth).mean())
    about = {name: result[name] for name in ("encoder", "arch", "checkpoint_sha256")}
    return about | {"images": [len(bank), len(queries)], "recorded": recorded, "recounted": recounted}


def main(config: RecountConfig) -> None:
    dataset = open_dataset(config.data)
    results = [r for r in read_results(config.run) if r["protocol"].startswith("knn-") and r["split"] == "all"]
    found = [one for one in (recount_result(r, dataset, config.run) for r in results) if one]
    if not found:
        raise UserError(
            f"no nearest-neighbour result with kept features of {config.data} in {config.run}; run eval/knn.py"
        )
    for one in found:
        pairs = ", ".join(f"k = {k}: {v:.2f} and {one['recounted'][k]:.2f}" for k, v in one["recorded"].items())
        print(f"{one['encoder']} {one['arch']}, top-1 recorded and recounted: {pairs}")
    write_json(config.json, found)
    if any(abs(v - one["recounted"][k]) > 1e-6 for one in found for k, v in one["recorded"].items()):
        sys.exit(1)


if __name__ == "__main__":
    run_command(RecountConfig, main)
