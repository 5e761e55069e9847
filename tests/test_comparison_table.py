"""The table of several methods: what is averaged, what an interval is, and what is missing."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

REPO = Path(__file__).resolve().parents[1]


def run_folder(folder: Path, method: str, seed: int, value: float) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"method": method, "seed": seed, "preset": "cifar10-demo"}))
    results = [{"protocol": "knn", "encoder": "trained", "value": v} for v in (0.0, value)]  # the newest counts
    results.append({"protocol": "knn", "encoder": "raw pixels", "value": 99.0})
    (folder / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in results))
    return folder


def tabulate(out: Path, *runs: Path | str) -> subprocess.CompletedProcess:
    command = [sys.executable, REPO / "scripts" / "comparison_table.py", "--out", out, *runs]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True)


@pytest.mark.slow
def test_means_and_intervals_over_seeds(tmp_path):
    runs = [run_folder(tmp_path / f"a{seed}", "byol", seed, v) for seed, v in enumerate((10.0, 12.0, 14.0))]
    runs.append(run_folder(tmp_path / "b0", "simclr", 0, 20.0))
    done = tabulate(tmp_path / "out", *runs)
    assert done.returncode == 0, done.stderr
    half = 4.302653 * np.std([10, 12, 14], ddof=1) / np.sqrt(3)  # Student's t for two degrees of freedom
    assert f"| byol | 12.00 ± {half:.2f} | 0, 1, 2 |" in done.stdout
    assert "| simclr | 20.00 | 0 |" in done.stdout
    assert (tmp_path / "out" / "table.md").read_text() == done.stdout
    assert (tmp_path / "out" / "plot.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_a_run_without_results_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    done = tabulate(tmp_path / "out", tmp_path / "empty")
    assert done.returncode == 2 and "empty/results.jsonl is missing" in done.stderr and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_ablations_stand_beside_the_papers(tmp_path):
    named = (("no-norm-0", 30.0), ("no-norm-1", 32.0), ("baseline-0", 40.0), ("width-half-0", 35.0))
    runs = [run_folder(tmp_path / f"ablate-cifar10-demo-{n}", "barlow_twins", int(n[-1]), v) for n, v in named]
    done = tabulate(tmp_path / "out", *runs, "--rows", "ablation")
    assert done.returncode == 0, done.stderr
    assert "| no-norm | 31.00 ± " in done.stdout and "| 53.4 | 0, 1 |" in done.stdout
    assert "| baseline | 40.00 | 71.4 | 0 |" in done.stdout and "| width-half | 35.00 | – | 0 |" in done.stdout
