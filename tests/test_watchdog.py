"""A rank that no longer answers is named by those that wait for it; lost steps are skipped on all ranks alike."""

import multiprocessing
import os
import re
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import torch

from pipeline.errors import UserError
from tests.oracles_train import SyntheticLoader
from tests.test_resume import bits
from tests.test_world_size import run
from train.checkpoint import read_checkpoint
from train.distributed import Ranks, joined_ranks
from train.watchdog import EXIT_STUCK, Watchdog, culprits

pytestmark = pytest.mark.usefixtures("training_forkserver")


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ({0: (5, 9), 1: (5, 4)}, {0: (5, 12), 1: (5, 4)}, "rank 1 no longer runs .* step 5"),
        ({0: (5, 9), 1: (4, 9)}, {0: (5, 12), 1: (4, 12)}, "rank 1 runs but got no further than step 4"),
        ({0: (5, 1), 1: (0, 0), 2: (0, 0)}, {0: (5, 4), 1: (0, 0), 2: (0, 0)}, "each of the ranks 1, 2 no longer"),
        ({0: (5, 1), 1: (5, 1)}, {0: (5, 4), 1: (5, 4)}, "every rank runs"),
    ],
)
def test_who_is_waited_for(before, after, expected):
    assert re.match(expected, culprits(before, after))


def test_one_rank_needs_no_watchdog():
    with Watchdog(Ranks(0, 1, torch.device("cpu"), None), 1) as watchdog:
        watchdog.step(0)
        assert not watchdog.active


class StoppedLoader(SyntheticLoader):
    """The last rank's process is stopped before its third batch, or only its loader is stuck."""

    stop = "process"

    def batches(self, start_step=0, stop_step=None):
        for batch in super().batches(start_step, stop_step):
            if batch.step == 2 and self.rank == self.world_size - 1:
                if self.stop != "loader":
                    os.kill(os.getpid(), signal.SIGSTOP if self.stop == "process" else signal.SIGKILL)
                time.sleep(60)
            yield batch


class StuckLoader(StoppedLoader):
    stop = "loader"


class KilledLoader(StoppedLoader):
    stop = "killed"


class LossyLoader(SyntheticLoader):
    """One step in which one image of the last rank is no number."""

    def global_views(self, step):
        views = super().global_views(step)
        if step == 3:
            views[1][-1] = float("inf")
        return views


KINDS = {"process": StoppedLoader, "loader": StuckLoader, "killed": KilledLoader, "lossy": LossyLoader}


def one_rank(rank: int, world_size: int, port: int, folder: Path, kind: str, flags: dict) -> None:
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    os.dup2(os.open(folder / f"said{rank}", os.O_WRONLY | os.O_CREAT), 2)
    torch.set_num_threads(1)
    import train.runlog

    train.runlog.RUNS = folder
    try:
        with joined_ranks() as ranks:
            sys.exit(run(folder / "r", ranks, torch.float32, KINDS[kind], **flags))
    except UserError as error:
        sys.exit(f"error: {error}")


def start(world_size: int, folder: Path, kind: str, **flags) -> list[multiprocessing.Process]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    arguments = (world_size, port, folder, kind, flags)
    processes = [context.Process(target=one_rank, args=(rank, *arguments)) for rank in range(world_size)]
    for process in processes:
        process.start()
    return processes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "expected"),
    [("process", "rank 2 no longer runs"), ("loader", "rank 2 runs but got no further than step 2")],
)
def test_a_stuck_rank_is_named(tmp_path, kind, expected):
    """Rank 2 of 3, which does not host the store, as no rank does under torchrun."""
    processes = start(3, tmp_path, kind, timeout_minutes=2 / 60)
    processes[0].join(60)
    said = "".join((tmp_path / f"said{rank}").read_text() for rank in range(3))  # whose time was over first
    for process in processes:
        process.kill()
        process.join()
    assert processes[0].exitcode == EXIT_STUCK
    line = next(line for line in said.splitlines() if " waited " in line)
    assert re.match(rf"error: rank \d waited 0.0333 minutes in step \d: {expected}", line)
    assert not (tmp_path / "r" / "checkpoint.pt").exists()


@pytest.mark.slow
def test_a_killed_rank_leaves_the_other_a_sentence(tmp_path):
    """And no traceback beside it, though the connection breaks in the middle of the network's forward pass."""
    processes = start(2, tmp_path, "killed")
    for process in processes:
        process.join(60)
    said = (tmp_path / "said0").read_text()
    assert [process.exitcode for process in processes] == [1, -signal.SIGKILL], said
    (line,) = (line for line in said.splitlines() if line.startswith("error:"))
    assert re.match(
        r"error: rank 0 lost the connection to another rank, .* \([^/]*\); the same command continues", line
    )
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_lost_step_is_skipped_on_all_ranks(tmp_path):
    processes = start(2, tmp_path, "lossy", on_nan="skip", keep=9, checkpoint_every_steps=1, epochs=2)
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0], (tmp_path / "said0").read_text()
    before, after, end = (
        read_checkpoint(tmp_path / "r" / name)
        for name in ("checkpoint-00000003.pt", "checkpoint-00000004.pt", "checkpoint.pt")
    )
    assert bits(before["model"]) == bits(after["model"]) and end["step"] == 6
    assert all(w.isfinite().all() for w in end["model"].values())
    assert "step 4 left out: loss nan" in (tmp_path / "said0").read_text()
    assert "left out" not in (tmp_path / "said1").read_text()
