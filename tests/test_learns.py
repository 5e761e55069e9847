"""Pretraining learns: on CIFAR-10 the neighbours of a short run become better, and no worse after any quarter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.command import DATA, REPO

QUARTERS = 4


def run(*command: object) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    parts = [sys.executable, *map(str, command)]
    return subprocess.run(parts, capture_output=True, text=True, cwd=REPO, env=environment, timeout=900)


@pytest.fixture(scope="module")
def cifar10(tmp_path_factory) -> Path:
    """CIFAR-10 as the demo has left it in data/; where it has not, fetched and converted."""
    if (DATA / "cifar10" / "val.manifest.json").is_file():
        return DATA / "cifar10"
    folder = tmp_path_factory.mktemp("cifar10")
    fetched = run("scripts/fetch_cifar10.py", "--out", folder / "source")
    if fetched.returncode:
        pytest.skip(f"CIFAR-10 cannot be fetched here: {fetched.stderr.strip()[-300:]}")
    converted = run("pipeline/convert.py", "--source", folder / "source", "--out", folder)
    assert converted.returncode == 0, converted.stderr
    return folder


@pytest.mark.slow
def test_neighbours_become_better(cifar10, tmp_path):
    flags = "--preset cifar10-demo --arch resnet10_narrow --fraction 0.3 --knn-every 1 --workers 1".split()
    done = run("train/pretrain.py", *flags, "--data", cifar10, "--epochs", QUARTERS, "--run", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    accuracies = [line["knn_top1"] for line in lines if "knn_top1" in line]
    assert len(accuracies) == QUARTERS
    assert accuracies == sorted(accuracies), accuracies
    assert accuracies[-1] > accuracies[0] + 3, accuracies
