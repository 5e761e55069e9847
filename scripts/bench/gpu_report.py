"""What scripts/gpu_report.sh runs: the stages of a slot, each in a process of its own with a time limit of its own.

    A   card  step  gate  kernels  ways  tests            the machine, steps, real images, kernels, pytest -m gpu
    B   card  cifar  linear                               200 epochs of CIFAR-10 in the fastest way found, evaluated
    C   card  decoders  loader-dali                       what NVIDIA DALI decodes, and how fast
        tune                                              by --only: launch settings of the kernels

From the start on, numba compiles the CPU's kernels, --images are converted and the tests run. Beside them `step`
compiles its networks; it and everything else is measured when the machine is quiet. A stage that fails, hangs or lacks
something keeps no other from being measured: its record has what it measured and the reason. A stage is done when its
record is complete, and is not run again.
"""

import json
import os
import platform
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from gpu_record import StageConfig, record_path
from gpu_table import markdown
from measure import write_json
from PIL import Image

from pipeline.command import REPO, run_command
from pipeline.disk import write_whole
from pipeline.errors import UserError

SLOTS = {
    "A": ("card", "step", "gate", "kernels", "ways", "tests"),
    "B": ("card", "cifar", "linear"),
    "C": ("card", "decoders", "loader-dali"),
}
# Stage → the most seconds it may take.
LIMIT_S = {
    "card": 40,
    "gate": 60,
    "kernels": 60,
    "tune": 120,
    "step": 330,
    "ways": 150,
    "tests": 200,
    "cifar": 560,
    "linear": 60,
    "decoders": 90,
    "loader-dali": 150,
}
NEED_IMAGES = {"gate", "kernels", "tune", "step", "decoders", "loader-dali"}
BEGIN_EARLY = ("card", "step")  # have something to do until the machine is quiet
LEAST_S = 15  # with less left, no further stage is begun
TO_STOP_S, TAIL_S = 10, 3  # a stage that is told to stop has these to write what it has; the report takes these
MAX_SIDE_PX = 400


@dataclass(frozen=True)
class ReportConfig(StageConfig):
    """Where things are and how long it may take."""

    stage: tyro.conf.Suppress[str] = ""
    slot: Literal["A", "B", "C"] = "A"
    """Which stages, in which order."""
    only: tuple[str, ...] = ()
    """Stages to run in place of a slot's."""
    images: Path | None = None
    """A folder with one folder of JPEGs a class; they are converted, at most 400 px large."""
    data: Path | None = None
    """A folder with a train.beton of such images, in place of --images. Neither: pictures made of noise."""
    budget_s: float = 480.0
    """Seconds after which everything is over, the report included."""


@dataclass
class Running:
    """A stage's process, and when it is ended, on the clock of time.monotonic."""

    process: subprocess.Popen
    limit_s: float
    end_s: float


class Report:
    """The stages of one output folder."""

    def __init__(self, config: ReportConfig):
        self.config, self.end_s = config, time.monotonic() + config.budget_s - TAIL_S
        self.folder = config.out.expanduser().resolve()
        (self.folder / "stages").mkdir(parents=True, exist_ok=True)
        self.log = self.folder / "log.txt"
        self.log.touch()
        made = self.folder / ("noise" if config.images is None else "data")
        self.data = config.data.expanduser().resolve() if config.data else made
        self.cifar = self.data if config.dry_run else config.cifar.expanduser().resolve()
        self.environment = os.environ | {"PYTHONUNBUFFERED": "1", "TQDM_DISABLE": "1"}
        self.environment["TORCHINDUCTOR_CACHE_DIR"] = str(self.folder / "inductor")
        if config.dry_run:
            self.environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        self.beside: list[subprocess.Popen] = []
        self.running: dict[str, Running] = {}
        self.quiet = self.folder / "quiet"  # a file, for stages that wait for it
        self.quiet.unlink(missing_ok=True)

    def left_s(self) -> float:
        return self.end_s - time.monotonic()

    def read(self, stage: str) -> dict:
        """A stage's record, {} where there is none."""
        path = record_path(self.folder, stage)
        return json.loads(path.read_text("utf-8")) if path.is_file() else {}

    def done(self, stage: str) -> bool:
        return self.read(stage).get("complete", False)

    # ---- processes ----

    def start(self, *arguments: object, log: Path | None = None) -> subprocess.Popen:
        """A Python process of ours, in a session of its own; its output goes to OUT/log.txt, or to `log`."""
        command = [sys.executable, *(str(argument) for argument in arguments)]
        print(f"{self.left_s():4.0f} s left:", *command[1:], file=sys.stderr, flush=True)
        with open(log or self.log, "a", encoding="utf-8", errors="surrogateescape") as file:
            file.write(f"+ {' '.join(command[1:])}\n")
            file.flush()
            return subprocess.Popen(
                command, cwd=REPO, env=self.environment, stdout=file, stderr=file, start_new_session=True
            )

    def prepare(self, stages: list[str]) -> None:
        """Starts what the first stages need not wait for."""
        self.beside.append(self.start("scripts/compile_kernels.py"))
        if "tests" in stages:
            self.begin("tests")
            self.beside.append(self.running["tests"].process)
        given = self.config.data or (self.data / "train.manifest.json").is_file()
        if given or not (self.config.dry_run or NEED_IMAGES & set(stages)):
            return
        source = self.config.images or make_pictures(self.folder / "images", self.config.dry_run)
        for split in ("train", "val") if self.config.dry_run else ("train",):
            flags = ("--out", self.data / f"{split}.beton", "--max-side", MAX_SIDE_PX, "--skip-unreadable")
            self.beside.append(self.start("pipeline/convert.py", "--source", source.resolve(), *flags))

    def begin(self, stage: str) -> None:
        """Starts a stage; `settle` ends it at its limit."""
        record_path(self.folder, stage).unlink(missing_ok=True)
        config, limit_s = self.config, max(1, self.left_s() - TO_STOP_S)
        if not config.dry_run:
            limit_s = min(limit_s, LIMIT_S[stage])
        flags = ["--stage", stage, "--out", self.folder, "--data", self.data, "--cifar", self.cifar]
        flags += ["--way", config.way] if config.way else []
        flags += ["--launches", config.launches.resolve()] if config.launches else []
        flags += ["--dry-run"] if config.dry_run else []
        process = self.start("scripts/bench/gpu_stages.py", *flags, log=self.log_of(stage))
        self.running[stage] = Running(process, limit_s, time.monotonic() + limit_s)

    def log_of(self, stage: str) -> Path:
        return self.folder / "stages" / f"{stage}.log"

    def settle(self) -> bool:
        """Ends the stages whose time is over; whether nothing runs beside any more, so that time may be measured."""
        for stage, of in list(self.running.items()):
            if of.process.poll() is not None or time.monotonic() > of.end_s:
                self.finish(stage)
        if not self.quiet.exists() and all(process.poll() is not None for process in self.beside):
            self.quiet.touch()
        return self.quiet.exists()

    def finish(self, stage: str) -> None:
        """Ends a stage that may have ended already; if it is not done, its record says why."""
        of = self.running.pop(stage)
        code = of.process.poll()
        end_group(of.process)
        if not self.done(stage):
            lines = [line for line in self.log_of(stage).read_text("utf-8", "replace").splitlines() if line.strip()]
            why = f"stopped after {of.limit_s:.0f} s" if code is None else f"exit code {code}: {lines[-1][:300]}"
            found = {"rounds": 0} | self.read(stage) | {"complete": False, "error": why}
            write_json(record_path(self.folder, stage), found)
        self.write_report()

    # ---- the whole ----

    def run_all(self, stages: list[str]) -> None:
        """Every stage, one at a time and in order, but none that must wait before one that need not."""
        while self.running or (stages and self.left_s() > TO_STOP_S + LEAST_S):
            quiet = self.settle()
            ready = [stage for stage in stages if quiet or stage in BEGIN_EARLY]
            busy = self.running.keys() - {"tests"}
            if ready and not busy and self.left_s() > TO_STOP_S + LEAST_S:
                stages.remove(ready[0])
                self.begin(ready[0])
            time.sleep(0.2)

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, *_) -> None:
        """Ends all processes, also when the report itself is interrupted."""
        for stage in list(self.running):
            self.finish(stage)
        for process in self.beside:
            end_group(process)

    def write_report(self) -> str:
        """The report of all records there are; returns its text."""
        found = {stage: of for stage in LIMIT_S if (of := self.read(stage))}
        command = f"bash scripts/gpu_report.sh {' '.join(sys.argv[1:])}"
        text = markdown(found, list(self.config.only or SLOTS[self.config.slot]), command)
        whole = {"command": command, "host_python": platform.python_version(), "stages": found}
        write_json(self.folder / "report.json", whole)
        write_whole(self.folder / "report.md", text)
        return text


def end_group(process: subprocess.Popen) -> None:
    """Ends a process and all that it has started, which may outlive it."""
    for number, wait_s in ((signal.SIGTERM, TO_STOP_S - 2), (signal.SIGKILL, 2)):
        try:
            os.killpg(process.pid, number)
            process.wait(wait_s)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def make_pictures(folder: Path, toy: bool) -> Path:
    """A folder of four classes of noise, smooth and sharp, with about the bytes of photographs."""
    side_px = 32 if toy else 460
    for seed in range(32 if toy else 256):
        random, width = np.random.default_rng(seed), side_px * (3 + seed % 3) // 4
        coarse = Image.fromarray(random.integers(0, 256, (side_px // 8, width // 8, 3), np.uint8))
        pixels = np.asarray(coarse.resize((width, side_px), Image.Resampling.BICUBIC), np.int16)
        grain = random.integers(-12, 13, pixels.shape, np.int16)
        path = folder / f"class_{seed % 4}" / f"{seed:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return folder


def main(config: ReportConfig) -> None:
    unknown = [stage for stage in config.only if stage not in LIMIT_S]
    if unknown:
        raise UserError(f"--only {unknown[0]} is no stage; there are {', '.join(LIMIT_S)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C: no process is left behind
    report = Report(config)
    wanted = [stage for stage in config.only or SLOTS[config.slot] if not report.done(stage)]
    try:
        with report:
            if wanted:
                report.prepare(wanted)
            report.run_all([stage for stage in wanted if stage != "tests"])
    finally:
        print(report.write_report())
    missing = [stage for stage in wanted if not report.done(stage)]
    if missing:
        raise UserError(f"not completely measured: {', '.join(missing)}; the same command measures them again")


if __name__ == "__main__":
    run_command(ReportConfig, main)
