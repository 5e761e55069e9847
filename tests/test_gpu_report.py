"""The report of a GPU: every stage at toy size, what is done is not done again, what is missing is called so."""

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from pipeline.command import UserError
from pipeline.disk import append_line

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def scripts():
    """The folder on the path, as for a script in it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REPO / "scripts"))
        yield import_module


def test_what_is_not_measured_is_called_so(scripts):
    table = scripts("gpu_table")
    text = table.markdown({}, ["tests", "kernels"])
    assert text.count(table.MISSING) == 1 + len(table.BARS)
    assert "Not yet measured: tests, kernels." in text
    kernels = {"views": 2, "images": 1024, "side_px": 224, "copy_gb_per_s": 4300.0, "device": "a GPU", "torch": "2"}
    ways = {"ms": {"mean": 7.125, "ci95": 0.25}, "moved_bytes": 33e8, "least_bytes": 11e8}
    kernels["bf16"] = ways | {"share_of_copy_bandwidth": 0.108}
    text = table.markdown({"kernels": kernels}, ["tests", "kernels"])
    assert "| two views of 1024 images, ms | ≤ 12 | ≤ 4 | 7.12 ± 0.25 |" in text
    assert "11% of 4300 GB/s" in text and "dry run" not in text
    assert text.count(table.MISSING) == len(table.BARS) - 1 and "Not yet measured: tests." in text


def test_bytes_of_the_kernels(scripts):
    """Of one view, by hand: a 30 × 20 px box, 8 px a side, rows of 32 bytes, height not first; blurred or not."""
    from pipeline.draws import empty_params
    from pipeline.resample_gpu import plan_views

    moved_bytes = scripts("gpu_stages").moved_bytes
    for sigma_px in (0.0, 1.0):
        params = empty_params(1, 1)
        params.box_height[:], params.box_width[:], params.resized_height[:], params.resized_width[:] = 20, 30, 8, 8
        params.sigma_px[:] = sigma_px
        plan = plan_views(params, np.array([0]), np.array([20]), np.array([30]), ["bilinear"], 8)
        found, between, plane, view = moved_bytes(plan, 2), 20 * 32 * 3, 3 * 8 * 32, 3 * 8 * 8 * 2
        assert plan.between_bytes == between and plan.taps == 5 + 8
        assert found["least_bytes"] == 20 * 30 * 3 + view
        resize = 20 * 30 * 3 + 2 * between + 3 * 13 * 8 * 4
        assert found["moved_bytes"] == resize + 2 * plane + (4 * plane + view if sigma_px else view)


def test_a_loop_over_parameters_is_lars_too(scripts):
    """The optimizer of the published way, beside which ours is timed, makes the same steps."""
    import torch

    from train.lars import LARS

    generator, ends = torch.Generator().manual_seed(0), []
    gradients = [[torch.randn(shape, generator=generator) for shape in ((4, 3), (3,))] for _ in range(3)]
    for kind in (LARS, scripts("gpu_stages").LoopLARS):
        torch.manual_seed(1)
        p = [torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.randn(3))]
        groups = [{"params": p[:1], "weight_decay": 1e-2, "lr": 2.0}, {"params": p[1:], "adapt": False, "lr": 0.1}]
        optimizer = kind(groups)
        for step in gradients:
            for parameter, gradient in zip(p, step, strict=True):
                parameter.grad = gradient.clone()
            optimizer.step()
        ends.append([parameter.detach() for parameter in p])
    assert all(torch.allclose(one, other, rtol=1e-6) for one, other in zip(*ends, strict=True))


def test_only_what_was_measured_now_counts(scripts, tmp_path):
    """The run's folder has results of an earlier step; one evaluation adds its line, another fails."""
    gpu_report = scripts("gpu_report")
    report = gpu_report.Report(gpu_report.ReportConfig(out=tmp_path))
    run = tmp_path / "run"
    run.mkdir()
    old = {"protocol": "linear-cached-modified", "value": 10.0}
    (run / "results.jsonl").write_text(json.dumps(old) + '\n{"protocol": "torn')

    def call(evaluation, *flags):
        append_line(run / "results.jsonl", json.dumps({"protocol": "knn-mmselfsup-modified", "value": 50.0}))
        return subprocess.CompletedProcess((), 3 if evaluation == "eval/linear.py" else 0)

    report.call = call
    assert report.evaluate(run, [("eval/knn.py",)]) == {"knn-mmselfsup": 50.0}
    with pytest.raises(UserError, match=r"eval/linear\.py ended with exit code 3"):
        report.evaluate(run, [("eval/linear.py", "--cached")])


@pytest.mark.slow
def test_every_stage_at_toy_size(tmp_path):
    def report(*flags: str) -> subprocess.CompletedProcess:
        command = ["bash", str(REPO / "scripts" / "gpu_report.sh"), "--dry-run", "--out", str(tmp_path), *flags]
        environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=580)

    done = report()
    assert done.returncode == 0, done.stderr + (tmp_path / "log.txt").read_text()[-4000:]
    found = json.loads((tmp_path / "report.json").read_text())
    assert set(found) == {
        *("tests", "kernels", "step", "loader-ffcv", "loader-resident", "loader-dali", "loader-torch"),
        *("cifar10-speed", "cifar10-200", "cifar10-1000"),
    }
    assert found["tests"]["tests"] == found["tests"]["skipped"] > 0
    assert found["step"]["ours_over_published"]["mean"] > 0
    assert found["loader-ffcv"]["by_cores"]["1"]["real_over_synthetic"]["mean"] > 0
    assert set(found["cifar10-200"]["results"]) == {"knn-mmselfsup"}
    assert set(found["cifar10-1000"]["results"]) == {"linear-cached"}
    assert found["cifar10-200"]["knn_by_epoch"]
    text = (tmp_path / "report.md").read_text()
    assert text in done.stdout and "These numbers mean nothing" in text
    before = (tmp_path / "log.txt").read_text()
    assert report().returncode == 0 and (tmp_path / "log.txt").read_text() == before
    assert report("--only", "nonsense").returncode == 2
