"""A small run of the benchmark: what it compares, and the records it writes."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
STAGES = ("published_recipe", "jpeg_decode_limit", "decode_once", "crop_only", "views_cpu_parity")


def run(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, REPO / "scripts" / "bench" / "loader.py", *arguments]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=400)


@pytest.mark.slow
def test_a_small_run(imagenet_sample, tmp_path):
    for path in imagenet_sample[:6]:
        folder = tmp_path / "images" / path.parent.name
        folder.mkdir(parents=True)
        os.symlink(path, folder / path.name)
    out = ("--json", tmp_path / "speeds.json", "--checks", tmp_path / "checks.json", "--no-first-batch")
    done = run("--images", tmp_path / "images", "--repeats", 2, "--stored-side", 300, *out)
    assert done.returncode == 0, done.stderr

    records = json.loads((tmp_path / "speeds.json").read_text())
    names = {record["name"] for record in records}
    assert {
        *STAGES,
        *(f"{stage}_300px" for stage in STAGES[1:]),
        "op_hue",
        "op_blur",
        "op_crop_resize",
        "loader_fast",
    } <= names
    assert ("loader_ffcv" in names) == (importlib.util.find_spec("ffcv") is not None)
    assert len(names) == len(records)
    for record in records:
        assert set(record) == {"name", "images_per_s", "ci95", "repeats", "threads", "machine"}
        assert record["images_per_s"] > 0 and record["repeats"] == 2 and record["threads"] == 1
    speed = {record["name"]: record["images_per_s"] for record in records}
    assert speed["views_cpu_parity"] > 2 * speed["published_recipe"]
    assert speed["jpeg_decode_limit"] > speed["views_cpu_parity"]

    checks = json.loads((tmp_path / "checks.json").read_text())
    assert checks["decoder"] == {"images": 6, "differ": 0}
    for row in checks["views"]:
        assert row["values"] >= 6 * 224 * 224 * 3
        assert row["mean_difference_255"] < 0.5


@pytest.mark.slow
def test_user_errors(tmp_path):
    for arguments, expected in ((("--repeats", 1), "at least 2"), ((), "no class folders")):
        done = run("--images", tmp_path, *arguments)
        assert done.returncode == 2
        assert expected in done.stderr
