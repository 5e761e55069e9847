"""The three promised commands, verbatim but for the flags that make them small, on real JPEGs."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.support import REPO, lend_kernels

IMAGES_PER_CLASS = {"train": 16, "val": 4}
CLASSES = 4

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkout(tmp_path_factory, shared_data) -> Path:
    """A copy of the code alone, with $IMAGENET beside it: a folder of train/ and val/, one folder a class."""
    root = tmp_path_factory.mktemp("promised")
    code = root / "checkout"
    for name in ("pipeline", "train", "eval", "scripts"):
        shutil.copytree(REPO / name, code / name, ignore=shutil.ignore_patterns("__pycache__"))
    lend_kernels(code)
    (code / ".venv").symlink_to(Path(sys.prefix), target_is_directory=True)
    (code / "inside").mkdir()
    taken: dict[tuple[str, str], int] = {}
    with tarfile.open(shared_data / "imagenette-128.tar") as tar:
        for member in tar:
            parts = member.name.split("/")
            if not member.isfile() or len(parts) != 4:
                continue
            key = (parts[1], parts[2])
            known = {synset for _, synset in taken}
            if parts[2] not in known and len(known) == CLASSES:
                continue
            if taken.get(key, 0) < IMAGES_PER_CLASS[parts[1]]:
                taken[key] = taken.get(key, 0) + 1
                target = root / "imagenet" / "/".join(parts[1:])
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(tar.extractfile(member).read())
    assert len(taken) == 2 * CLASSES
    return code


def _finished(code: Path, command: str, cwd: str = ".") -> subprocess.CompletedProcess:
    env = {
        **os.environ,
        "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}",
        "PYTHONPATH": str(code),
        "IMAGENET": str(code.parent / "imagenet"),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(command, shell=True, cwd=code / cwd, env=env, capture_output=True, text=True)


def _run(code: Path, command: str, cwd: str = ".") -> str:
    done = _finished(code, command, cwd)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


SMALL = "--arch resnet18 --projector 32-32-32 --resolution 32 --global-batch 16 --epochs 1 --workers 1"


def test_convert_pretrain_semisup(checkout):
    _run(checkout, "bash scripts/convert_imagenet.sh")
    manifest = json.loads((checkout / "data/imagenet/train.manifest.json").read_text())
    assert manifest["images"] == CLASSES * IMAGES_PER_CLASS["train"]
    assert (checkout / "data/imagenet/val.beton").is_file()

    _run(checkout, f"torchrun train/pretrain.py {SMALL} --name one")
    assert (checkout / "runs/latest").resolve() == (checkout / "runs/one").resolve()
    metrics = [json.loads(line) for line in (checkout / "runs/one/metrics.jsonl").read_text().splitlines()]
    assert metrics and all(m["loss"] > 0 for m in metrics)

    _run(checkout, "python ../eval/semisup.py --fraction 0.1 --epochs 1", cwd="inside")
    result = json.loads((checkout / "runs/one/results.jsonl").read_text().splitlines()[-1])
    assert result["fraction"] == 0.1
    assert 0 <= result["value"] <= 100


def test_two_ranks_make_the_same_run_as_one(checkout):
    """Same images, same seed, same global batch: the losses of W = 1 and W = 2 agree step by step."""
    losses = []
    for ranks, name in ((1, "w1"), (2, "w2")):
        _run(checkout, f"torchrun --nproc-per-node={ranks} train/pretrain.py {SMALL} --amp off --name {name}")
        lines = (checkout / f"runs/{name}/metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_python_and_the_other_evaluations(checkout):
    _run(checkout, f"python train/pretrain.py {SMALL} --loader torch --name plain")
    _run(checkout, "python eval/knn.py")
    _run(checkout, "python eval/linear.py --epochs 1")
    protocols = [
        json.loads(line)["protocol"] for line in (checkout / "runs/plain/results.jsonl").read_text().splitlines()
    ]
    assert len(set(protocols)) >= 2


def test_a_mistake_under_torchrun(checkout):
    """torchrun makes exit code 1 of everything, and names the ranks' own codes."""
    done = _finished(checkout, "torchrun --nproc-per-node=2 train/pretrain.py --epochs -1 --name never")
    assert done.returncode == 1 and "exitcode  : 2 " in done.stderr, done.stderr
    assert "error: --epochs -1 is too small" in done.stderr and not (checkout / "runs" / "never").exists()
