"""The doctor: a stage made slow is the one it names, and its arithmetic on made-up machines."""

import importlib.util
import platform
import re
import subprocess
import sys
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def doctor():
    spec = importlib.util.spec_from_file_location("doctor", REPO / "scripts" / "doctor.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["doctor"] = module  # where dataclasses look up their module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def stages(doctor, small_beton):
    from pipeline.storage.beton import open_beton

    config = doctor.DoctorConfig(small_beton, "resnet10_narrow", "32-32", resolution=32, rank_batch=8)
    return doctor.Stages(open_beton(small_beton), config)


SLOW_S = 0.05  # an image: more than any stage takes on these small pictures


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "bound"),
    [
        ("read", "read"),
        ("decode", "decode"),
        ("crop", "crop"),
        ("views", "colour and blur"),
        ("train", "train"),
        pytest.param("to_device", "to_device", marks=pytest.mark.gpu),
        pytest.param("views_gpu", "views_gpu", marks=pytest.mark.gpu),
    ],
)
def test_the_stage_that_is_slowed_is_named(doctor, stages, monkeypatch, name, bound):
    if torch.cuda.is_available() and name in ("crop", "views"):
        pytest.skip("a machine with a GPU makes the views there")
    run = stages.run[name]

    def slowed(ids):
        time.sleep(SLOW_S * stages.images(name))
        run(ids)

    monkeypatch.setitem(stages.run, name, slowed)
    if name != "train":  # the step's own time is left out: beside other programs it can be a hundred times longer
        monkeypatch.setitem(stages.run, "train", lambda ids: None)
    times = doctor.measure(stages, 0.01)
    assert times[name] >= SLOW_S
    machine = doctor.this_machine(stages.beton.path)
    if name == "read":
        machine = replace(machine, memory_bytes=machine.file_bytes - 1)
    assert doctor.answer(times, machine).bound == bound


TIMES = {"read": 1e-4, "decode": 1e-3, "crop": 4e-4, "views": 1.4e-3, "train": 1e-2}
GPU_TIMES = TIMES | {"to_device": 5e-5, "views_gpu": 1e-4, "train": 3e-4}


def test_cores_a_gpu_needs(doctor):
    """2,500 images/s of training at 1 ms of decoding each are 2.5 cores."""
    few = doctor.answer(GPU_TIMES, doctor.Machine(2, True, 10**9, 10**10))
    assert (few.bound, few.cores_needed) == ("decode", 3)
    assert few.images_per_s["cpu"] == pytest.approx(2000)
    assert few.images_per_s["train"] == pytest.approx(2500)
    assert any("--loader dali" in line for line in few.words)
    many = doctor.answer(GPU_TIMES, doctor.Machine(3, True, 10**9, 10**10))
    assert (many.bound, many.cores_needed) == ("train", 3)
    assert any("--compile" in line for line in many.words)


@pytest.mark.parametrize(
    ("stage", "bound", "flag"),
    [
        ("to_device", "to_device", "--loader dali"),
        ("views_gpu", "views_gpu", "--views-on cpu"),
        ("decode", "decode", "dali"),
    ],
)
def test_a_slow_stage_of_a_gpu_machine_is_named(doctor, stage, bound, flag):
    """What the throttled stages above show, on the times of a made-up GPU: a stage of 50 ms an image bounds it."""
    machine = doctor.Machine(64, True, 10**9, 10**10)
    assert doctor.answer(GPU_TIMES, machine).bound == "train"
    slowed = doctor.answer(GPU_TIMES | {stage: 0.05 * (64 if stage == "decode" else 1)}, machine)
    assert slowed.bound == bound and min(slowed.images_per_s.values()) == pytest.approx(20, rel=0.01)
    assert flag in slowed.words[-1]


def test_a_file_larger_than_the_memory_means_the_disk(doctor):
    times = GPU_TIMES | {"read": 1e-3}
    fits = doctor.answer(times, doctor.Machine(8, True, 10**9, 10**10))
    assert fits.bound == "train" and "read" not in fits.images_per_s
    assert any("first epoch only" in line for line in fits.words)
    large = doctor.answer(times, doctor.Machine(8, True, 10**11, 10**10))
    assert large.bound == "read"
    assert any("--order blocks" in line for line in large.words)


def test_without_a_gpu_the_larger_share_of_the_cores_is_named(doctor):
    machine = doctor.Machine(2, False, 10**9, 10**10)
    assert doctor.answer(TIMES, machine).bound == "train"
    assert doctor.answer(TIMES | {"train": 1e-4, "views": 1.2e-3}, machine).bound == "decode"
    assert doctor.answer(TIMES | {"train": 1e-4, "crop": 3e-3, "views": 4e-3}, machine).bound == "crop"
    assert doctor.answer(TIMES | {"train": 1e-4, "views": 4e-3}, machine).bound == "colour and blur"


@pytest.mark.slow
def test_the_command(small_beton):
    command = [
        sys.executable,
        REPO / "scripts" / "doctor.py",
        "--data",
        small_beton.parent,
        "--arch",
        "resnet10_narrow",
    ]
    flags = ["--projector", "32-32", "--resolution", "32", "--rank-batch", "8", "--seconds", "0.05"]
    done = subprocess.run([*command, *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for word in ("read", "decode", "crop", "views", "train", "What bounds this machine", "Cores:", "Memory:"):
        assert word in done.stdout
    wrong = subprocess.run([*command, "--seconds", "0"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "error:" in wrong.stderr


@pytest.mark.slow
def test_what_a_report_of_a_fault_needs(tmp_path):
    """Versions by pip's own account of them; not whose machine it is, nor where anything lies."""
    command = [sys.executable, REPO / "scripts" / "doctor.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for package in ("torch", "numba", "pillow", "barlow-at-speed"):
        assert f"{package} {version(package)}," in done.stdout
    assert not {platform.node(), str(REPO), str(Path.home()), str(tmp_path)} & set(re.split("[ ,\n]", done.stdout))
    assert "--data FOLDER" in done.stdout and "What bounds" not in done.stdout
