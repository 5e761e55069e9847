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
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from gpu_table import markdown
from PIL import Image

from pipeline.command import DATA, REPO, RUNS, run_command
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
NEED_IMAGES = ("gate", "kernels", "tune", "step", "decoders", "loader-dali")
BEGIN_EARLY = ("card", "step")  # have something to do until the machine is quiet
LEAST_S = 15  # with less left, nothing more is begun
TO_STOP_S, TAIL_S = 10, 3  # a stage that is told to stop has these to write what it has; the report takes these
PICTURES, DRY_PICTURES = 256, 32
MAX_SIDE_PX = 400
RESULT = re.compile(r"(PASSED|FAILED|ERROR|SKIPPED|XFAIL) (\S+::.*)|(\S+::.*) (PASSED|FAILED|ERROR|SKIPPED|XFAIL)")


@dataclass(frozen=True)
class ReportConfig:
    """Where things are and how long it may take."""

    slot: Literal["A", "B", "C"] = "A"
    """Which stages, in which order."""
    only: tuple[str, ...] = ()
    """Stages to run in place of a slot's."""
    images: Path | None = None
    """A folder with one folder of JPEGs a class; they are converted, at most 400 px large."""
    data: Path | None = None
    """A folder with a train.beton of such images, in place of --images. Neither: pictures made of noise."""
    cifar: Path = DATA / "cifar10"
    """A folder with CIFAR-10's train.beton and val.beton (scripts/demo.sh makes them)."""
    out: Path = RUNS / "gpu-report"
    """Folder for the report, the stages' records and the run."""
    way: str = ""
    """How CIFAR-10 is trained: eager, or compile, graph, together joined by +. Empty: the fastest one measured."""
    launches: Path | None = None
    """For the stage tune: a JSON list of launch settings (scripts/bench/gpu_kernels.py). None: each kernel's warps."""
    budget_s: float = 480.0
    """Seconds after which everything is over, the report included."""
    dry_run: bool = False
    """Every stage at toy size on the CPU; the numbers mean nothing."""


class Report:
    """The stages of one output folder."""

    def __init__(self, config: ReportConfig):
        self.config, self.end = config, time.monotonic() + config.budget_s - TAIL_S
        self.folder = config.out.expanduser().resolve()
        self.stages = self.folder / "stages"
        self.stages.mkdir(parents=True, exist_ok=True)
        self.log = self.folder / "log.txt"
        self.log.touch()
        self.test_log, self.tests_end = self.folder / "tests.txt", 0.0
        made = self.folder / ("noise" if config.images is None else "data")
        own = config.data.expanduser().resolve() if config.data else made
        self.data, self.cifar = own, own if config.dry_run else config.cifar.expanduser().resolve()
        self.environment = os.environ | {
            "TORCHINDUCTOR_CACHE_DIR": str(self.folder / "inductor"),
            "PYTHONUNBUFFERED": "1",
            "TQDM_DISABLE": "1",
        }
        if config.dry_run:
            self.environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        self.beside: list[subprocess.Popen] = []
        self.testing: subprocess.Popen | None = None
        self.quiet = self.folder / "quiet"
        self.quiet.unlink(missing_ok=True)

    def left_s(self) -> float:
        return self.end - time.monotonic()

    def read(self, stage: str) -> dict:
        path = self.stages / f"{stage}.json"
        return json.loads(path.read_text("utf-8")) if path.is_file() else {}

    def done(self, stage: str) -> bool:
        return self.read(stage).get("complete", False)

    # ---- processes ----

    def start(self, *arguments: object, log: Path | None = None, **environment: str) -> subprocess.Popen:
        """A Python process of ours; its output goes to OUT/log.txt, or to `log`."""
        command = [sys.executable, *(str(argument) for argument in arguments)]
        print(f"{self.left_s():4.0f} s left:", *command[1:], file=sys.stderr, flush=True)
        with open(log or self.log, "a", encoding="utf-8", errors="surrogateescape") as file:
            file.write(f"+ {' '.join(command[1:])}\n")
            file.flush()
            own = self.environment | environment
            return subprocess.Popen(command, cwd=REPO, env=own, stdout=file, stderr=file, start_new_session=True)

    def prepare(self, stages: list[str]) -> None:
        """Starts what the first stages need not wait for."""
        self.beside.append(self.start("scripts/compile_kernels.py"))
        if "tests" in stages:
            self.test_log.unlink(missing_ok=True)
            self.tests_end = time.monotonic() + LIMIT_S["tests"]
            self.testing = self.start(*self.tests(), log=self.test_log, OMP_NUM_THREADS="2")
            self.beside.append(self.testing)
        given = self.config.data or (self.data / "train.manifest.json").is_file()
        if given or not (self.config.dry_run or set(stages) & set(NEED_IMAGES)):
            return
        source = self.config.images
        if source is None:
            source = self.folder / "images"
            for i in range(DRY_PICTURES if self.config.dry_run else PICTURES):
                make_picture(source / f"class_{i % 4}" / f"{i:05d}.jpg", i, 32 if self.config.dry_run else 460)
        for split in ("train", "val") if self.config.dry_run else ("train",):
            flags = ("--max-side", MAX_SIDE_PX, "--skip-unreadable")
            to = self.data / f"{split}.beton"
            self.beside.append(self.start("pipeline/convert.py", "--source", source.resolve(), "--out", to, *flags))

    def settle(self) -> bool:
        """Whether nothing runs beside any more; then the stages that wait for it may go on."""
        if self.testing and (self.testing.poll() is not None or time.monotonic() > self.tests_end):
            end_group(self.testing)
            self.write_tests(self.testing.returncode)
            self.testing = None
        if self.quiet.exists():
            return True
        quiet = all(process.poll() is not None for process in self.beside)
        if quiet:
            self.quiet.touch()
        return quiet

    def write_tests(self, code: int) -> None:
        found = tests_found(self.test_log.read_text("utf-8", "replace"), ended=code == 0)
        if not found["complete"]:
            found["error"] = "no test passed" if code in (0, 5) else f"exit code {code}"
        self.write("tests", found)

    def run(self, stage: str) -> None:
        """One stage, to its end or its limit; afterwards its record says how it ended."""
        (self.stages / f"{stage}.json").unlink(missing_ok=True)
        log_from, limit_s = self.log.stat().st_size, max(1, self.left_s() - TO_STOP_S)
        if not self.config.dry_run:
            limit_s = min(limit_s, LIMIT_S[stage])
        flags = ["--stage", stage, "--out", self.folder, "--data", self.data, "--cifar", self.cifar]
        flags += ["--way", self.config.way] if self.config.way else []
        flags += ["--launches", self.config.launches.resolve()] if self.config.launches else []
        process = self.start("scripts/bench/gpu_stages.py", *flags, *["--dry-run"] * self.config.dry_run)
        end = time.monotonic() + limit_s
        try:
            while process.poll() is None and time.monotonic() < end:
                self.settle()
                time.sleep(0.2)
        finally:  # also when the report itself is interrupted
            code = process.poll()
            end_group(process)
        output = self.log.read_bytes()[log_from:].decode("utf-8", "replace")
        if not self.done(stage):
            lines = [line for line in output.splitlines() if line.strip()]
            why = f"stopped after {limit_s:.0f} s" if code is None else f"exit code {code}: {lines[-1][:300]}"
            found = self.read(stage)
            self.write(stage, found | {"rounds": found.get("rounds", 0), "complete": False} | {"error": why})

    def write(self, stage: str, found: dict) -> None:
        write_whole(self.stages / f"{stage}.json", json.dumps(found, indent=1) + "\n")

    def tests(self) -> tuple[str, ...]:
        """The files that have tests for a GPU, side by side; those that train, which take longest, come first."""
        paths = sorted((REPO / "tests").glob("test_*.py"), reverse=True)
        files = [str(path) for path in paths if "mark.gpu" in path.read_text("utf-8")]
        files = ["tests/test_recorded.py"] if self.config.dry_run else files
        return ("-m", "pytest", "-m", "gpu", "-n", "1" if self.config.dry_run else "8", "-v", "-W", "default", *files)

    # ---- the whole ----

    def run_all(self, stages: list[str]) -> None:
        """Every stage, in order, but none that must wait before one that need not."""
        while (stages or self.testing) and self.left_s() - TO_STOP_S > LEAST_S:
            quiet = self.settle()
            ready = [stage for stage in stages if quiet or stage in BEGIN_EARLY]
            if not ready:
                time.sleep(0.2)
                continue
            stages.remove(ready[0])
            self.run(ready[0])
            self.write_report()

    def write_report(self) -> str:
        found = {stage: of for stage in LIMIT_S if (of := self.read(stage))}
        whole = {
            "command": f"bash scripts/gpu_report.sh {' '.join(sys.argv[1:])}",
            "host_python": platform.python_version(),
        }
        text = markdown(found, list(self.config.only or SLOTS[self.config.slot]), whole["command"])
        write_whole(self.folder / "report.json", json.dumps(whole | {"stages": found}, indent=1) + "\n")
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


def tests_found(output: str, ended: bool) -> dict:
    """Counts of pytest -v so far, and its short reasons for what failed. Complete: ended, some passed, none failed."""
    by_test = {}
    for match in map(RESULT.search, output.splitlines()):
        if match:
            result, test = (match[1], match[2]) if match[1] else (match[4], match[3])
            by_test.setdefault(test.split(" - ")[0].split(" [")[0].strip(), result)
    results = {"passed": "PASSED", "failed": "FAILED", "errors": "ERROR", "skipped": "SKIPPED"}
    counts = {name: list(by_test.values()).count(result) for name, result in results.items()}
    reasons = re.findall(r"^(?:FAILED|ERROR) (\S+::.*)$", output, re.MULTILINE)
    failed = reasons or [test for test, result in by_test.items() if result in ("FAILED", "ERROR")]
    good = ended and counts["passed"] > 0 and not failed
    return counts | {"rounds": len(by_test), "complete": good, "failed_tests": [line[:300] for line in failed]}


def make_picture(path: Path, seed: int, side_px: int) -> None:
    """Noise, smooth and sharp, with about the bytes of a photograph."""
    path.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    width = side_px * (3 + seed % 3) // 4
    coarse = Image.fromarray(random.integers(0, 256, (side_px // 8, width // 8, 3), np.uint8))
    pixels = np.asarray(coarse.resize((width, side_px), Image.Resampling.BICUBIC), np.int16)
    grain = random.integers(-12, 13, pixels.shape, np.int16)
    Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8)).save(path, quality=90)


def main(config: ReportConfig) -> None:
    unknown = [stage for stage in config.only if stage not in LIMIT_S]
    if unknown:
        raise UserError(f"--only {unknown[0]} is no stage; there are {', '.join(LIMIT_S)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C: no process is left behind
    report = Report(config)
    wanted = [stage for stage in config.only or SLOTS[config.slot] if not report.done(stage)]
    try:
        if wanted:
            report.prepare(wanted)
        report.run_all([stage for stage in wanted if stage != "tests"])
    finally:
        if report.testing:
            report.tests_end = 0
            report.settle()
        for process in report.beside:
            end_group(process)
        print(report.write_report())
    missing = [stage for stage in wanted if not report.done(stage)]
    if missing:
        raise UserError(f"not completely measured: {', '.join(missing)}; the same command measures them again")


if __name__ == "__main__":
    run_command(ReportConfig, main)
