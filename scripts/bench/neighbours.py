"""Counts a run's nearest-neighbour results again, by brute force in float64, from the features it kept.

    python eval/knn.py --checkpoint model.pth --data DIR --out RUN
    python eval/knn.py --checkpoint model.pth --data DIR --out RUN --features random
    python scripts/bench/neighbours.py RUN --data DIR --json checks.json

Nothing of the evaluation's own counting is used, only its file format. Exit code 1 where a number differs.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from eval.kept import find_features
from eval.splits import Dataset, open_dataset
from eval.subject import read_results
from pipeline.command import run_command
from pipeline.disk import write_whole
from pipeline.errors import UserError
from train.run_data import dataset_sha256

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


def kept_features(run: Path, result: dict, dataset_sha256: str) -> np.ndarray | None:
    """The features of a whole split that a result was made of, float64."""
    wanted = {"dataset_sha256": dataset_sha256, "ids_sha256": "all", "key": result.get("key", "")}
    wanted |= {name: result[name] for name in ("checkpoint_sha256", "resolution_px")}
    found = find_features(run / "features", **wanted)
    return None if found is None else found.double().numpy()


def recount(bank: np.ndarray, labels: np.ndarray, queries: np.ndarray, truth: np.ndarray, k: int) -> float:
    """Percent of queries whose class wins the vote of the k nearest: one query at a time, all similarities sorted."""
    bank = bank / np.linalg.norm(bank, axis=1, keepdims=True)
    hits = 0
    for query, label in zip(queries, truth, strict=True):
        similarity = bank @ (query / np.linalg.norm(query))
        nearest = np.argsort(-similarity)[:k]
        hits += np.bincount(labels[nearest], np.exp(similarity[nearest] / TEMPERATURE)).argmax() == label
    return 100 * hits / len(truth)


def recount_result(result: dict, dataset: Dataset, run: Path) -> dict | None:
    """The recorded and the recounted top-1 of every k; None where the features were not kept."""
    digests = (dataset_sha256(dataset.train), dataset_sha256(dataset.val))
    if result["dataset_sha256"] != dict(zip(("train", "val"), digests, strict=True)):
        return None
    bank, queries = (kept_features(run, result, digest) for digest in digests)
    if bank is None or queries is None:
        return None
    recorded = {int(key[len("top1_k") :]): value for key, value in result["values"].items() if key.startswith("top1_k")}
    truth = dataset.val_labels
    return {
        "encoder": result["encoder"],
        "arch": result["arch"],
        "checkpoint_sha256": result["checkpoint_sha256"],
        "images": [len(bank), len(queries)],
        "recorded": recorded,
        "recounted": {k: recount(bank, dataset.train.labels, queries, truth, k) for k in recorded},
    }


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
    if config.json:
        write_whole(config.json, json.dumps(found, indent=1) + "\n")
    if any(abs(v - one["recounted"][k]) > 1e-6 for one in found for k, v in one["recorded"].items()):
        sys.exit(1)


if __name__ == "__main__":
    run_command(RecountConfig, main)
