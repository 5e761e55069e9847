"""The three promised commands, verbatim but for the flags that make them small, on real JPEGs."""

import json
from pathlib import Path

import pytest

from tests.checkout import CLASSES, IMAGES_PER_CLASS, SMALL, finished, make_checkout, run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkout(tmp_path_factory, shared_data) -> Path:
    return make_checkout(tmp_path_factory.mktemp("promised"), shared_data)


def test_convert_pretrain_semisup(checkout):
    run(checkout, "bash scripts/convert_imagenet.sh")
    manifest = json.loads((checkout / "data/imagenet/train.manifest.json").read_text())
    assert manifest["images"] == CLASSES * IMAGES_PER_CLASS["train"]
    assert (checkout / "data/imagenet/val.beton").is_file()

    run(checkout, f"torchrun train/pretrain.py {SMALL} --name one")
    assert (checkout / "runs/latest").resolve() == (checkout / "runs/one").resolve()
    metrics = [json.loads(line) for line in (checkout / "runs/one/metrics.jsonl").read_text().splitlines()]
    assert metrics and all(m["loss"] > 0 for m in metrics)

    run(checkout, "python ../eval/semisup.py --fraction 0.1 --epochs 1", cwd="inside")
    result = json.loads((checkout / "runs/one/results.jsonl").read_text().splitlines()[-1])
    assert result["fraction"] == 0.1
    assert 0 <= result["value"] <= 100


def test_two_ranks_make_the_same_run_as_one(checkout):
    """Same images, same seed, same global batch: the losses of W = 1 and W = 2 agree step by step."""
    losses = []
    for ranks, name in ((1, "w1"), (2, "w2")):
        run(checkout, f"torchrun --nproc-per-node={ranks} train/pretrain.py {SMALL} --amp off --name {name}")
        lines = (checkout / f"runs/{name}/metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_python_and_the_other_evaluations(checkout):
    run(checkout, f"python train/pretrain.py {SMALL} --loader torch --name plain")
    run(checkout, "python eval/knn.py")
    run(checkout, "python eval/linear.py --epochs 1")
    protocols = [
        json.loads(line)["protocol"] for line in (checkout / "runs/plain/results.jsonl").read_text().splitlines()
    ]
    assert len(set(protocols)) >= 2


def test_a_mistake_under_torchrun(checkout):
    """torchrun makes exit code 1 of everything, and names the ranks' own codes."""
    done = finished(checkout, "torchrun --nproc-per-node=2 train/pretrain.py --epochs -1 --name never")
    assert done.returncode == 1 and "exitcode  : 2 " in done.stderr, done.stderr
    assert "error: --epochs -1 is too small" in done.stderr and not (checkout / "runs" / "never").exists()
