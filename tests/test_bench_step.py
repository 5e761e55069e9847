"""A small run of the benchmark of a step: what it writes, that the parts make the whole, and its errors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
SMALL = ("--preset", "cifar10-demo", "--global-batch", 16, "--steps", 2, "--workers", 1)
STAGES = {"data_wait", "copy", "views", "forward", "loss", "backward", "communication", "optimizer", "step"}


def bench(*arguments: object, launcher=()) -> subprocess.CompletedProcess:
    command = [sys.executable, *launcher, REPO / "scripts" / "bench" / "step.py", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300, env=environment)


def written(path: Path, *arguments: object, launcher=()) -> dict:
    done = bench(*SMALL, "--json", path, *arguments, launcher=launcher)
    assert done.returncode == 0, done.stderr
    assert "images/s" in done.stdout
    return json.loads(path.read_text())


@pytest.mark.slow
def test_random_images(tmp_path):
    found = written(tmp_path / "step.json")
    stages = {name: stage["mean"] for name, stage in found["stages_ms"].items()}
    assert set(stages) == STAGES
    assert found["repeats"] == 5 and found["world_size"] == 1 and found["mfu"] is None
    assert all(stages[name] > 0 for name in ("forward", "loss", "backward", "optimizer", "step"))
    assert stages["copy"] == stages["views"] == stages["communication"] == 0
    assert found["images_per_s"]["mean"] == pytest.approx(16 / stages["step"] * 1000, rel=0.5)
    parts = sum(stages[name] for name in ("data_wait", "forward", "loss", "backward", "optimizer"))
    assert parts == pytest.approx(stages["step"], rel=0.5)  # timed apart, on a machine that may be busy
    # The widest layer alone: 256 × 256 in the projector, 16 images, two views, forward and twice that backward.
    assert found["tera_operations_a_step_and_rank"] * 1e12 > 2 * 256 * 256 * 16 * 2 * 3


@pytest.mark.slow
def test_real_images_on_two_ranks(tmp_path, small_beton):
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone")
    found = written(tmp_path / "step.json", "--data", small_beton, launcher=launcher)
    assert found["world_size"] == 2
    assert found["stages_ms"]["views"]["mean"] > 0 and found["config"]["data"] == str(small_beton)


@pytest.mark.slow
def test_user_errors():
    done = bench(*SMALL, "--repeats", 4)
    assert done.returncode == 2 and "at least 5" in done.stderr
