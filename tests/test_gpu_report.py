"""The report of a GPU: every stage at toy size, partial records, what is missing or fails is called so."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gpu_kernels
import gpu_record
import gpu_report
import gpu_stages
import gpu_steps
import gpu_table
import numpy as np
import pytest
import torch

from pipeline.errors import UserError

REPO = Path(__file__).resolve().parents[1]


def test_what_is_not_measured_is_called_so():
    text = gpu_table.markdown({}, ["tests", "kernels"], "a command")
    assert text.count(gpu_table.MISSING) == 1 + len(gpu_table.BARS) + 2
    interval = {"mean": 1.7125, "ci95": 0.25}
    step = {"ours_over_published": interval, "rounds": 2, "complete": False, "error": "stopped after 9 s"}
    gate = {"values": {"bf16": 9}, "differ": {"bf16": 0}, "rounds": 8, "complete": True, "device": "H", "torch": "2"}
    text = gpu_table.markdown({"step": step, "gate": gate}, ["gate", "step"], "a command")
    assert "| 1.71 ± 0.25 (after 2 rounds, not complete) |" in text and "0 of 9 differ (bf16)" in text
    assert "step: stopped after 9 s (after 2 rounds)" in text and "gate:" not in text and "dry run" not in text


def test_the_report_is_short():
    rows = [
        {"settings": {"kernel": "resize", "ROWS": n}, "error": "no registers are left for this " * 9}
        for n in range(999)
    ]
    text = gpu_table.markdown({"tune": {"rows": rows, "rounds": 999, "complete": True}}, ["tune"], "a command")
    assert len(text) <= gpu_table.MOST_CHARACTERS and text.endswith("The rest is in report.json.\n")


def test_bytes_of_the_kernels():
    """Of one view, by hand: a 30 × 20 px box, 8 px a side, rows of 32 px, height not first; blurred or not."""
    from pipeline.choices.draws import empty_params
    from pipeline.views.gpu_plan import plan_views

    for sigma_px in (0.0, 1.0):
        params = empty_params(1, 1)
        params.box_height[:], params.box_width[:], params.resized_height[:], params.resized_width[:] = 20, 30, 8, 8
        params.sigma_px[:] = sigma_px
        plan = plan_views(params, np.array([0]), np.array([20]), np.array([30]), ["bilinear"], 8)
        between, colours, plane, view = 20 * 32 * 4, 8 * 32 * 4, 3 * 8 * 32, 3 * 8 * 8 * 2
        assert plan.between_px * 4 == between and plan.taps == 5 + 8
        assert gpu_kernels.least_bytes(plan, 2) == 20 * 30 * 3 + view
        resize = 20 * 30 * 3 + 2 * between + 3 * 13 * 8 * 4
        total = resize + 2 * colours + (4 * plane + view if sigma_px else view)
        assert sum(gpu_kernels.moved_bytes(plan, 2).values()) == total


def test_launches_are_named_and_changed():
    """Whatever a kernel is given by its [grid], one of them with another grid and keyword."""
    import triton.runtime.jit as jit

    seen = []

    class Kernel(jit.KernelInterface):
        def __init__(self, name):
            self.__name__ = name

        def run(self, *arguments, grid, warmup, **keywords):
            seen.append((self.__name__, grid, keywords))

    def work():
        for kernel in map(Kernel, ("resize", "blur", "blur")):
            kernel[(2, 3)](1, num_warps=4)

    assert list(gpu_kernels.apart_ms(work)) == ["resize", "blur", "blur 2"]
    gpu_kernels.apart_ms(work, {"kernel": "blur", "grid": [None, 7], "num_warps": 2, "ROWS": 8})
    assert seen[3:5] == [("resize", (2, 3), {"num_warps": 4}), ("blur", (2, 7), {"num_warps": 2, "ROWS": 8})]
    work()
    assert seen[-1] == ("blur", (2, 3), {"num_warps": 4})


def test_a_loop_over_parameters_is_lars_too():
    """The optimizer of the published way, beside which ours is timed, makes the same steps."""
    from train.lars import LARS

    generator, ends = torch.Generator().manual_seed(0), []
    gradients = [[torch.randn(shape, generator=generator) for shape in ((4, 3), (3,))] for _ in range(3)]
    for kind in (LARS, gpu_steps.LoopLARS):
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


def test_ways_of_stepping():
    assert gpu_steps.way_fields("compile+graph") | {"views_together": False} == {
        "compile": True,
        "cuda_graph": True,
        "views_together": False,
    }
    assert not any(gpu_steps.way_fields("eager").values())
    with pytest.raises(UserError, match="--way eager\\+fast has the part 'fast'"):
        gpu_steps.way_fields("eager+fast")


PASSED = """[gw0] [ 33%] PASSED tests/test_a.py::test_one[a-1]
[gw1] [ 66%] SKIPPED tests/test_a.py::test_two
"""
FAILED = (
    PASSED + "[gw1] [100%] FAILED tests/test_b.py::test_three\nFAILED tests/test_b.py::test_three - assert 1 == 2\n"
)


@pytest.mark.parametrize(
    ("output", "ended", "complete"),
    [(PASSED, True, True), (PASSED, False, False), (FAILED, True, False), ("usage: pytest", True, False)],
)
def test_tests_that_pass_are_needed(output, ended, complete):
    found = gpu_stages.tests_found(output, ended)
    assert found["complete"] == complete
    if output == FAILED:
        assert (found["passed"], found["failed"], found["errors"], found["skipped"], found["rounds"]) == (1, 1, 0, 1, 3)
        assert found["failed_tests"] == ["tests/test_b.py::test_three - assert 1 == 2"]


def test_a_stage_that_ends_early_leaves_what_it_has(tmp_path, monkeypatch):
    """One fails after a round, one hangs after a round with a child of its own, one cannot even begin."""
    report = gpu_report.Report(gpu_report.ReportConfig(out=tmp_path))
    monkeypatch.setitem(gpu_report.LIMIT_S, "step", 3)
    record = 'import pathlib, sys; pathlib.Path(sys.argv[1]).write_text(\'{"rounds": 1, "complete": false}\')\n'
    hang = 'import subprocess; subprocess.run(["sleep", "99"])'
    programs = {"gate": record + "raise MemoryError(9)", "step": record + hang, "ways": "import nonsense"}
    start = report.start

    def stand_in(script, _, stage, *flags, log):
        return start("-c", programs[stage], gpu_record.record_path(report.folder, stage), log=log)

    monkeypatch.setattr(report, "start", stand_in)
    monkeypatch.setattr(gpu_report, "BEGIN_EARLY", tuple(programs))
    with report:
        report.run_all(list(programs))
    found = json.loads((tmp_path / "report.json").read_text())["stages"]
    assert found["gate"] == {"rounds": 1, "complete": False, "error": "exit code 1: MemoryError: 9"}
    assert found["step"] == {"rounds": 1, "complete": False, "error": "stopped after 3 s"}
    assert found["ways"]["rounds"] == 0 and found["ways"]["error"].endswith("No module named 'nonsense'")
    assert "gate: exit code 1: MemoryError: 9 (after 1 rounds)" in (tmp_path / "report.md").read_text()


def test_reasons_and_counts_of_tests_stand_beside_each_other():
    output = PASSED + "[gw0] [100%] ERROR tests/test_c.py::test_four\n"
    record = gpu_stages.tests_found(output, ended=False) | {"error": "exit code 1: as pytest"}
    text = gpu_table.markdown({"tests": record}, ["tests"], "a command")
    assert "- tests: passed 1, failed 0, errors 1, skipped 1\n" in text
    assert "- tests, failed_tests: tests/test_c.py::test_four\n" in text
    assert "\ntests: exit code 1: as pytest (after 3 rounds)\n" in text


def test_an_interrupt_leaves_no_process_behind(tmp_path, monkeypatch):
    report, started = gpu_report.Report(gpu_report.ReportConfig(out=tmp_path)), []
    start = report.start

    def stand_in(*_, log=None):
        started.append(start("-c", "import time; time.sleep(99)", log=log))
        return started[-1]

    def interrupted():
        if report.running.keys() == {"step", "tests"}:
            raise KeyboardInterrupt

    monkeypatch.setattr(report, "start", stand_in)
    monkeypatch.setattr(report, "settle", interrupted)
    with pytest.raises(KeyboardInterrupt), report:
        report.prepare(["tests"])
        report.run_all(["step"])
    assert len(started) == 3 and all(process.wait(1) < 0 for process in started)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """(stage) → its record, measured in this process at toy size."""
    from pipeline.convert import ConvertConfig
    from pipeline.convert import main as convert

    out = tmp_path_factory.mktemp("report")
    gpu_report.make_pictures(out / "images", toy=True)
    for split in ("train", "val"):
        convert(ConvertConfig(out / "data" / f"{split}.beton", out / "images", workers=1))
    (out / "quiet").touch()
    config = gpu_record.StageConfig(out=out, data=out / "data", cifar=out / "data", dry_run=True)

    def measure(stage: str, **flags) -> dict:
        gpu_stages.main(replace(config, stage=stage, **flags))
        found = json.loads(gpu_record.record_path(out, stage).read_text())
        assert found["complete"] and found["rounds"] > 0 and found["dry_run"]
        return found

    return measure


def test_card_and_gate(toy):
    card, gate = toy("card"), toy("gate")
    assert {"python", "torch", "numba"} <= set(card["versions"])
    assert gate["passed"] and gate["values"]["bf16"] == gate["values"]["float32"] > 0


def test_a_gate_that_fails_is_not_done(toy, monkeypatch):
    images = gpu_kernels.Images
    monkeypatch.setattr(images, "views_by_numba", lambda self, epochs: [torch.full((2, 2, 8, 8, 3), 9.0)])
    with pytest.raises(UserError, match="768, .* of .*768.* values differ from numba's"):
        toy("gate")


@pytest.mark.slow
def test_kernels_and_tuning(toy, tmp_path):
    found = toy("kernels")
    assert found["copy_gb_per_s"] > 0
    assert {"resize_once", "blur_lines 2"} <= set(found["bf16"]["kernels"]) and found["float32"]["ms"]["mean"] > 0
    launches = [{"kernel": "finish_colours", "num_warps": 8}, {"kernel": "finish_colours", "grid": [1]}]
    (tmp_path / "launches.json").write_text(json.dumps(launches))
    rows = toy("tune", launches=tmp_path / "launches.json")["rows"]
    assert rows[-2]["equal"] and rows[-2]["ms"]["mean"] > 0 and "error" in rows[-1]


@pytest.mark.slow
def test_steps(toy):
    step, ways = toy("step"), toy("ways")
    assert step["ours_over_published"]["mean"] > 0 and step["ours_full"]["images_per_s"]["mean"] > 0
    assert ways["fastest"] in ways["by_way"] and all(of["epoch_s"] > 0 for of in ways["by_way"].values())
    assert step["by_cores"]["1"]["real_over_synthetic"]["mean"] > 0


@pytest.mark.slow
def test_cifar(toy):
    found = toy("cifar")
    assert found["knn"] > 0 and found["knn_by_epoch"] and found["rounds"] == found["epochs"] == 1
    assert toy("linear")["linear_cached"] > 0


@pytest.mark.slow
def test_the_command(tmp_path):
    def report(*flags: str) -> subprocess.CompletedProcess:
        command = ["bash", str(REPO / "scripts" / "gpu_report.sh"), "--dry-run", "--out", str(tmp_path), *flags]
        environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=580)

    done = report("--only", "card", "tests", "gate")
    assert done.returncode == 2 and "not completely measured: tests" in done.stderr, done.stderr
    found = json.loads((tmp_path / "report.json").read_text())["stages"]
    assert (
        found["card"]["complete"]
        and found["gate"]["passed"]
        and found["tests"]["error"] == "exit code 2: error: no test passed"
    )
    text = (tmp_path / "report.md").read_text()
    assert text in done.stdout and "These numbers mean nothing" in text
    before = (tmp_path / "log.txt").read_text()
    assert report("--only", "card", "gate").returncode == 0 and (tmp_path / "log.txt").read_text() == before
    assert report("--only", "nonsense").returncode == 2
