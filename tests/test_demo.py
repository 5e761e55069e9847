"""The demo's script with a stand-in for Python: what runs, in which order, and what a failure leaves behind."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
PYTHON = """#!/usr/bin/env bash
echo "$*" >>calls
case "$*" in *pretrain.py*) while [[ $1 != --name ]]; do shift; done; mkdir -p "runs/$2";; esac
case "$*" in
  *demo-untrained*) [[ $* != *semisup* || $THEN != slow ]] || { echo $BASHPID >pid; exec sleep 60; } ;;
  *pixels*) [[ $THEN != slow ]] || while [[ ! -s pid ]]; do sleep 0.02; done ;;
esac
if [[ $* == *"$FAIL"* ]]; then echo "found nothing" >&2; exit 2; fi
"""


@pytest.fixture
def demo(tmp_path):
    """Runs the script in an empty checkout, where the command with `fail` in it fails; returns the finished process."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / ".venv/bin").mkdir(parents=True)
    shutil.copy(REPO / "scripts/demo.sh", tmp_path / "scripts")
    (tmp_path / "scripts/setup.sh").touch()
    (tmp_path / ".venv/bin/python").write_text(PYTHON)
    (tmp_path / ".venv/bin/python").chmod(0o755)

    def run(*, fail: str = "no command", then: str = ""):
        environment = os.environ | {"FAIL": fail, "THEN": then}
        command = ["bash", str(tmp_path / "scripts/demo.sh"), "--seed", "3"]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)

    return run


def test_the_table_has_pixels_and_both_encoders(demo, tmp_path):
    assert demo().returncode == 0
    calls = (tmp_path / "calls").read_text().splitlines()
    assert "train/pretrain.py --preset cifar10-demo --name demo --seed 3" in calls
    assert calls[-1] == "eval/report.py runs/demo-untrained runs/demo"
    measured = sorted(call.removeprefix("eval/") for call in calls[:-1] if call.startswith("eval/"))
    semisup = "--fraction 0.1 --epochs 10 --validate-every 10"
    assert measured == [
        "knn.py --checkpoint runs/demo",
        "knn.py --checkpoint runs/demo --features pixels",
        "knn.py --checkpoint runs/demo-untrained",
        "linear.py --checkpoint runs/demo --cached",
        "linear.py --checkpoint runs/demo --features pixels --cached",
        "linear.py --checkpoint runs/demo-untrained --cached",
        f"semisup.py --checkpoint runs/demo {semisup}",
        f"semisup.py --checkpoint runs/demo-untrained {semisup}",
    ]


def test_a_failure_of_the_control_ends_the_demo_with_its_words(demo, tmp_path):
    ended = demo(fail="linear.py --checkpoint runs/demo-untrained")
    assert ended.returncode == 2
    assert "found nothing" in ended.stderr
    calls = (tmp_path / "calls").read_text()
    assert "report.py" not in calls
    assert "semisup.py --checkpoint runs/demo-untrained" not in calls


def test_a_failure_leaves_no_process_behind(demo, tmp_path):
    assert demo(fail="--features pixels", then="slow").returncode == 2
    process = Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}/stat")
    deadline = time.monotonic() + 10
    while process.exists() and process.read_text().split()[2] != "Z" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not process.exists() or process.read_text().split()[2] == "Z"
