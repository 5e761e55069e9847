"""A run stopped anywhere and started again ends with the same bits as one that was never stopped."""

import json
import multiprocessing
import multiprocessing.connection
import os
import random
import re
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.errors import UserError
from pipeline.stopping import EXIT_INTERRUPTED, EXIT_REQUEUE
from tests.oracles_train import SyntheticLoader
from train.checkpoint import read_checkpoint
from train.config import PretrainConfig
from train.distributed import Ranks
from train.ending import finished
from train.flags import resolved
from train.methods.barlow_twins import BarlowTwins
from train.pretrain import EXIT_FINISHED, train

CPU = Ranks(0, 1, torch.device("cpu"), None)
TINY = PretrainConfig(
    arch="test_resnet", projector="24-16", resolution=16, global_batch=8, epochs=3, warmup_epochs=1, amp="off",
    lr_weights=2.0, lr_biases=0.1, lars_eta=0.02, paper_world_size=1, log_every=3, checkpoint_every_steps=5,
)  # fmt: skip
STEPS = 15


class Killed(Exception):
    """Stands for the end of the process: nothing after it in the run's code is reached."""


class StoppingLoader(SyntheticLoader):
    """Five steps an epoch; before it gives batch `at` it kills the run or sends the process a signal."""

    def __init__(self, at: int = -1, send: int = 0):
        super().__init__(images=43, global_batch=8)
        self.at, self.send = at, send

    def batches(self, start_step=0, stop_step=None):
        for batch in super().batches(start_step, stop_step):
            if batch.step == self.at and not self.send:
                raise Killed
            if batch.step == self.at:
                os.kill(os.getpid(), self.send)
            yield batch


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    monkeypatch.setattr("train.runlog.RUNS", tmp_path)


def run(folder: Path, loader=None, **flags) -> int:
    config = resolved(replace(TINY, run=str(folder), **flags))
    loader = loader or StoppingLoader()
    loader.size_px = config.resolution
    return train(config, CPU, loader)


def bits(value):
    """A checkpoint as nested plain values, tensors as bytes."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.dtype, value.contiguous().numpy().tobytes()
    if isinstance(value, dict):
        return {name: bits(item) for name, item in value.items() if name != "config"}
    return [bits(item) for item in value] if isinstance(value, list) else value


def end_of(folder: Path) -> dict:
    return bits(read_checkpoint(folder / "checkpoint.pt"))


def losses(folder: Path) -> list[tuple[int, float]]:
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines]


# bf16 at 32 px: below, oneDNN 3.13 gives garbage for the gradient of a stride-2 convolution on a 1×1 input.
@pytest.mark.parametrize("flags", [{"amp": "off"}, {"amp": "bf16", "resolution": 32}], ids=["off", "bf16"])
def test_killed_before_several_steps(tmp_path, flags):
    assert run(tmp_path / "whole", **flags) == EXIT_FINISHED
    for at in (0, 7, 10, 14):  # in the first epoch, inside one, at an epoch's start, at the last step
        with pytest.raises(Killed):
            run(tmp_path / "cut", StoppingLoader(at), **flags)
    assert read_checkpoint(tmp_path / "cut" / "checkpoint.pt")["step"] == 10
    assert run(tmp_path / "cut", **flags) == EXIT_FINISHED
    assert end_of(tmp_path / "cut") == end_of(tmp_path / "whole")
    assert [step for step, _ in losses(tmp_path / "cut")] == sorted({step for step, _ in losses(tmp_path / "cut")})


def test_the_comparison_sees_a_difference(tmp_path):
    run(tmp_path / "a", epochs=1)
    run(tmp_path / "b", epochs=1, seed=1)
    assert end_of(tmp_path / "a") != end_of(tmp_path / "b")


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, EXIT_REQUEUE), (signal.SIGUSR2, EXIT_REQUEUE), (signal.SIGINT, EXIT_INTERRUPTED)],
)
def test_a_signal_writes_a_checkpoint_at_the_next_step(tmp_path, number, code):
    before = signal.getsignal(number)
    assert run(tmp_path / "whole") == EXIT_FINISHED
    assert run(tmp_path / "cut", StoppingLoader(6, number)) == code
    assert signal.getsignal(number) == before
    assert read_checkpoint(tmp_path / "cut" / "checkpoint.pt")["step"] == 7
    assert run(tmp_path / "cut") == EXIT_FINISHED
    assert end_of(tmp_path / "cut") == end_of(tmp_path / "whole")


def test_a_second_interrupt_ends_at_once(tmp_path):
    class Impatient(StoppingLoader):
        def batches(self, start_step=0, stop_step=None):
            for batch in SyntheticLoader.batches(self, start_step, stop_step):
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)
                yield batch

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "r", Impatient())
    assert not list((tmp_path / "r").glob("checkpoint*"))


def test_a_network_with_dropout_resumes_to_the_same_bits(tmp_path, monkeypatch):
    from train import update

    def with_dropout(arch, stem):
        backbone, features = real(arch, stem)
        return torch.nn.Sequential(backbone, torch.nn.Dropout(0.5)), features

    real = update.make_backbone
    monkeypatch.setattr(update, "make_backbone", with_dropout)
    assert run(tmp_path / "whole", epochs=2) == EXIT_FINISHED
    assert run(tmp_path / "cut", StoppingLoader(3, signal.SIGTERM), epochs=2) == EXIT_REQUEUE
    torch.rand(100)
    assert run(tmp_path / "cut", epochs=2) == EXIT_FINISHED
    assert end_of(tmp_path / "cut") == end_of(tmp_path / "whole")


def test_a_finished_run_is_left_as_it_is(tmp_path):
    run(tmp_path / "r", epochs=1)
    before = (tmp_path / "r" / "checkpoint.pt").stat().st_mtime_ns, losses(tmp_path / "r")
    assert run(tmp_path / "r", epochs=1) == EXIT_FINISHED
    assert ((tmp_path / "r" / "checkpoint.pt").stat().st_mtime_ns, losses(tmp_path / "r")) == before


def test_a_run_that_was_begun_with_other_views_is_refused(tmp_path, monkeypatch):
    """Also where it is finished: its end is not that of this method."""
    with pytest.raises(Killed):
        run(tmp_path / "cut", StoppingLoader(7))
    run(tmp_path / "whole", epochs=1)
    whole = resolved(replace(TINY, run=str(tmp_path / "whole"), epochs=1))
    assert finished(whole, "")
    views = tuple(replace(view, p_grey=0.5) for view in BarlowTwins.VIEWS["imagenet"])
    monkeypatch.setitem(BarlowTwins.VIEWS, "imagenet", views)
    with pytest.raises(UserError, match=r"\(p_grey 0.2 there, 0.5 here\); finish it with the version that wrote it"):
        run(tmp_path / "cut")
    assert not finished(whole, "")


def test_resume_never_starts_over(tmp_path):
    run(tmp_path / "r", epochs=1)
    first = losses(tmp_path / "r"), end_of(tmp_path / "r")
    assert run(tmp_path / "r", epochs=1, resume="never") == EXIT_FINISHED
    assert (losses(tmp_path / "r"), end_of(tmp_path / "r")) == first


class SlowLoader(StoppingLoader):
    """60 steps take their time, so that kills fall everywhere."""

    def batches(self, start_step=0, stop_step=None):
        for batch in super().batches(start_step, stop_step):
            time.sleep(0.01)
            yield batch


KILLS = int(os.environ.get("KILLS", 20))  # results/README.md has a longer run
SIXTY = {"epochs": 12, "checkpoint_every_steps": 2, "keep": 3}


def run_to_be_killed(folder: Path) -> None:
    """The run in a process of its own, on a slow disk."""
    import pipeline.disk
    import train.runlog

    def slow_fsync(descriptor: int) -> None:
        time.sleep(0.01)
        fsync(descriptor)

    fsync, pipeline.disk.os.fsync = os.fsync, slow_fsync
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    torch.set_num_threads(1)
    train.runlog.RUNS = folder
    try:
        sys.exit(run(folder / "cut", SlowLoader(), **SIXTY))
    except UserError as error:
        (folder / f"refused-{os.getpid()}").write_text(str(error))
        sys.exit(2)


def start(folder: Path) -> multiprocessing.Process:
    process = multiprocessing.get_context("forkserver").Process(target=run_to_be_killed, args=(folder,))
    process.start()
    return process


@pytest.mark.slow
@pytest.mark.usefixtures("training_forkserver")
def test_two_trainings_of_one_run(tmp_path):
    """Started at the same moment, one of them ends and names the other; a third changes no byte; killed, it resumes."""
    first = [start(tmp_path), start(tmp_path)]
    multiprocessing.connection.wait([process.sentinel for process in first], timeout=60)
    (lost,) = (process for process in first if not process.is_alive())
    (writer,) = (process for process in first if process is not lost)
    os.kill(writer.pid, signal.SIGSTOP)  # alive, and it writes nothing while we look
    try:
        named = f"the run {tmp_path / 'cut'} is being written by process {writer.pid} on "
        lost.join()
        assert lost.exitcode == 2 and named in (tmp_path / f"refused-{lost.pid}").read_text()
        before = files_of(tmp_path / "cut")
        with pytest.raises(UserError, match=re.escape(named)):
            run(tmp_path / "cut", **SIXTY)
        with pytest.raises(UserError, match=re.escape(named)):
            run(tmp_path / "cut", **SIXTY | {"seed": 1, "resume": "never"})
        assert files_of(tmp_path / "cut") == before
    finally:
        writer.kill()
        writer.join()
    assert run(tmp_path / "cut", **SIXTY) == EXIT_FINISHED
    assert read_checkpoint(tmp_path / "cut" / "checkpoint.pt")["step"] == 60
    assert not (tmp_path / "cut" / ".writer").exists()


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def kill_somewhere(process: multiprocessing.Process, folder: Path, in_a_write: bool, wait_s: float) -> None:
    """After the loop began: in the next checkpoint write, or whenever `wait_s` is over."""
    metrics = folder / "metrics.jsonl"
    touched = metrics.stat().st_mtime_ns if metrics.exists() else 0
    while process.is_alive() and not (metrics.exists() and metrics.stat().st_mtime_ns > touched):
        time.sleep(0.002)
    if in_a_write:
        while process.is_alive() and not list(folder.glob(".checkpoint.pt.*.tmp")):
            time.sleep(0.001)
    else:
        time.sleep(wait_s)
    process.kill()
    process.join()


@pytest.mark.slow
@pytest.mark.usefixtures("training_forkserver")
def test_sigkill_at_random_moments(tmp_path, record_property):
    """Real kills, in a step, in a checkpoint write, at the start; every survivor equals the uninterrupted run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run(tmp_path / "whole", **SIXTY)
    torch.set_num_threads(threads)
    expected, folder, moments = end_of(tmp_path / "whole"), tmp_path / "cut", random.Random(0)
    kills = in_writes = finished = 0
    while kills < KILLS or not finished:
        process = start(tmp_path)
        if kills < KILLS:
            kill_somewhere(process, folder, in_a_write=kills % 2 == 1, wait_s=moments.uniform(0, 0.3))
        process.join()
        for path in folder.glob("checkpoint*.pt"):
            read_checkpoint(path)
        in_writes += len(list(folder.glob(".checkpoint.pt.*.tmp")))
        if process.exitcode == -signal.SIGKILL:
            kills += 1
        else:
            assert process.exitcode == EXIT_FINISHED
            assert end_of(folder) == expected
            finished += 1
            shutil.rmtree(folder)
    for name, value in {"kills": kills, "in a checkpoint write": in_writes, "runs that ended alike": finished}.items():
        record_property(name, value)
    assert in_writes >= KILLS // 4
