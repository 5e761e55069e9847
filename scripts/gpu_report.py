"""What scripts/gpu_report.sh runs: stage after stage in processes of their own, as many as the time allows.

    tests           pytest -m gpu: kernels natively against numba and Pillow, streams, bf16, compile, graphs, NCCL …
    kernels, step, loader-ffcv, loader-resident, loader-dali, loader-torch, cifar10-speed      see gpu_stages.py
    cifar10-200     a run of --preset cifar10 with its kNN over time, in the fastest way cifar10-speed found; then
    cifar10-1000    eval/knn.py and eval/linear.py --cached of its encoder

A stage is done when OUT/stages/STAGE.json is there, and is not run again. What is not there is not yet measured.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gpu_table import markdown
from PIL import Image

from pipeline.beton import manifest_path
from pipeline.command import DATA, REPO, RUNS, UserError, run_command
from pipeline.disk import read_lines, write_whole

# Stage → seconds that must be left for it to begin: what it may take on a GPU of the H100's class. A run of CIFAR-10
# takes what there is.
LEAST_S = {
    "tests": 330,
    "kernels": 60,
    "step": 150,
    "loader-ffcv": 240,
    "loader-resident": 150,
    "loader-dali": 150,
    "loader-torch": 180,
    "cifar10-speed": 150,
    "cifar10-200": 60,
    "cifar10-1000": 60,
}
EPOCHS = {"cifar10-200": 200, "cifar10-1000": 1000}
EVALUATIONS = {"cifar10-200": [("eval/knn.py",)], "cifar10-1000": [("eval/knn.py",), ("eval/linear.py", "--cached")]}
IMAGES, DRY_IMAGES = 4096, 32
MAX_SIDE_PX = 400
TO_STOP_S = 30  # a run that is told to stop has these to write its checkpoint


@dataclass(frozen=True)
class ReportConfig:
    """Where things are and how long it may take."""

    images: Path | None = None
    """A folder with one folder of JPEGs a class, repeated until there are 4096. None: pictures made of noise."""
    cifar: Path = DATA / "cifar10"
    """A folder with CIFAR-10's train.beton and val.beton (scripts/demo.sh makes them)."""
    out: Path = RUNS / "gpu-report"
    """Folder for the report, the stages' records and the runs."""
    budget_s: float = 540.0
    """Seconds after which nothing more is begun and a run is stopped."""
    only: tuple[str, ...] = ()
    """Stages to run; all that are not done where none is named."""
    dry_run: bool = False
    """Every stage at toy size on the CPU; the numbers mean nothing."""


class Report:
    """The stages of one output folder."""

    def __init__(self, config: ReportConfig):
        self.config, self.end = config, time.monotonic() + config.budget_s
        self.folder = config.out.resolve()
        self.stages = self.folder / "stages"
        self.stages.mkdir(parents=True, exist_ok=True)
        self.cifar = self.folder / "data" if config.dry_run else config.cifar.expanduser().resolve()
        cache = {"TORCHINDUCTOR_CACHE_DIR": str(self.folder / "inductor"), "PYTHONUNBUFFERED": "1"}
        toy = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"} if config.dry_run else {}
        self.environment = os.environ | cache | toy

    def left_s(self) -> float:
        return self.end - time.monotonic()

    def done(self, stage: str) -> bool:
        return (self.stages / f"{stage}.json").is_file()

    def write(self, stage: str, found: dict) -> None:
        write_whole(self.stages / f"{stage}.json", json.dumps(found, indent=1) + "\n")

    def read(self, stage: str) -> dict:
        return json.loads((self.stages / f"{stage}.json").read_text("utf-8"))

    def call(self, *arguments: object) -> subprocess.CompletedProcess:
        """A Python process of ours within the time left; its output goes through and to OUT/log.txt."""
        command = [sys.executable, *(str(argument) for argument in arguments)]
        print("+", *command[1:], file=sys.stderr, flush=True)
        with open(self.folder / "log.txt", "a", encoding="utf-8", errors="surrogateescape") as log:
            log.write(f"+ {' '.join(command[1:])}\n")
            log.flush()
            return subprocess.run(
                command, cwd=REPO, env=self.environment, stdout=log, stderr=log, timeout=max(1, self.left_s())
            )

    # ---- what is measured on ----

    def make_data(self) -> Path:
        """A folder with train.beton and val.beton of photographs at most 400 px large."""
        folder = self.folder / "data"
        source, count = self.folder / "images", DRY_IMAGES if self.config.dry_run else IMAGES
        if not manifest_path(folder / "val.beton").is_file():
            shutil.rmtree(source, ignore_errors=True)
            files = (
                sorted(path for path in self.config.images.glob("*/*") if path.is_file()) if self.config.images else []
            )
            if self.config.images and not files:
                raise UserError(f"--images {self.config.images} has no class folders with images in them")
            for i in range(count):
                target = source / f"class_{i % 4}" / f"{i:05d}.jpg"
                target.parent.mkdir(parents=True, exist_ok=True)
                if files:
                    target.symlink_to(files[i % len(files)].resolve())
                else:
                    make_picture(target, i, 32 if self.config.dry_run else 460)
            for split in ("train", "val"):
                flags = ("--max-side", MAX_SIDE_PX, "--skip-unreadable")
                self.call("pipeline/convert.py", "--source", source, "--out", folder / f"{split}.beton", *flags)
        return folder

    # ---- stages ----

    def run_tests(self) -> None:
        report = self.folder / "tests.xml"
        some = ["tests/test_recorded.py"] if self.config.dry_run else ["tests"]
        self.call("-m", "pytest", "-m", "gpu", "-q", "-W", "default", f"--junitxml={report}", *some)
        suite = xml.etree.ElementTree.parse(report).getroot().find("testsuite")
        failed = [f"{case.get('classname')}.{case.get('name')}" for case in suite if case.find("failure") is not None]
        failed += [f"{case.get('classname')} (error)" for case in suite if case.find("error") is not None]
        counts = {key: int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped")}
        self.write("tests", counts | {"failed": failed, "seconds": float(suite.get("time"))})

    def run_stages(self, stages: list[str]) -> None:
        flags = ("--data", self.make_data(), "--cifar", self.cifar, "--out", self.stages)
        dry = ("--dry-run",) if self.config.dry_run else ()
        self.call("scripts/gpu_stages.py", "--stages", *stages, *flags, *dry)

    def run_cifar(self, stage: str) -> None:
        """Goes on with the run for as long as there is time; measures its encoder when it is through."""
        speed = self.read("cifar10-speed") if self.done("cifar10-speed") else {}
        run, progress = self.folder / stage, self.folder / f"{stage}-progress.json"
        flags = ["--preset", "cifar10", "--data", self.cifar, "--run", run, "--epochs", EPOCHS[stage]]
        flags += ["--loader", "resident", "--knn-every", 10, "--knn-images", 10_000]
        if not self.config.dry_run:
            flags += speed.get("flags", [])
        else:
            flags[flags.index("--epochs") + 1] = 1
            flags += ["--arch", "test_resnet", "--stem", "imagenet", "--projector", "16-16", "--global-batch", 8]
            flags += ["--amp", "off", "--workers", 1, "--warmup-epochs", 0, "--knn-every", 1]
        before = json.loads(progress.read_text("utf-8")) if progress.is_file() else {"seconds": 0.0, "starts": 0}
        start = time.monotonic()
        code = self.train_until(self.left_s() - TO_STOP_S, "train/pretrain.py", *flags)
        spent = {"seconds": before["seconds"] + time.monotonic() - start, "starts": before["starts"] + 1}
        write_whole(progress, json.dumps(spent) + "\n")
        if code != 0:
            print(
                f"{stage}: exit code {code} after {spent['seconds']:.0f} s; see {self.folder / 'log.txt'}",
                file=sys.stderr,
            )
            return
        results = self.evaluate(run, EVALUATIONS[stage][-1 if self.config.dry_run else 0 :])
        metrics = read_lines(run / "metrics.jsonl")
        speeds = [line["images_per_s"] for line in metrics if "images_per_s" in line]
        online = {line["epoch"]: round(line["knn_top1"], 2) for line in metrics if "knn_top1" in line}
        images = json.loads(manifest_path(self.cifar / "train.beton").read_text("utf-8"))["images"]
        epoch_s = {"epoch_s": round(images / float(np.median(speeds)), 3)}
        spent |= {"dry_run": self.config.dry_run}
        self.write(stage, spent | epoch_s | {"epochs": EPOCHS[stage], "results": results, "knn_by_epoch": online})

    def evaluate(self, run: Path, evaluations: list[tuple[str, ...]]) -> dict[str, float]:
        """What these evaluations of a run measure now: the folder may hold older lines, of an earlier step.

        By protocol, without the "-modified" that every result at CIFAR-10's 32 px has.
        """
        path = run / "results.jsonl"
        before = len(read_lines(path)) if path.is_file() else 0
        for evaluation in evaluations:
            if code := self.call(*evaluation, "--checkpoint", run).returncode:
                raise UserError(f"{evaluation[0]} ended with exit code {code}; see {self.folder / 'log.txt'}")
        return {r["protocol"].removesuffix("-modified"): r["value"] for r in read_lines(path)[before:]}

    def train_until(self, seconds: float, *arguments: object) -> int:
        """The exit code of a training, told to stop after so many seconds."""
        command = [sys.executable, *(str(argument) for argument in arguments)]
        print("+", *command[1:], file=sys.stderr, flush=True)
        with open(self.folder / "log.txt", "a", encoding="utf-8", errors="surrogateescape") as log:
            process = subprocess.Popen(command, cwd=REPO, env=self.environment, stdout=log, stderr=log)
            try:
                return process.wait(max(1, seconds))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGTERM)
                return process.wait()

    def attempt(self, run: Callable[[object], None], what: str | list[str]) -> None:
        """A stage that fails does not keep the others from being measured."""
        try:
            run(what)
        except subprocess.TimeoutExpired as error:
            print(f"{what}: stopped after {error.timeout:.0f} s", file=sys.stderr)
        except UserError as error:
            print(f"{what}: {error}", file=sys.stderr)

    def run(self, stage: str) -> None:
        if stage == "tests":
            self.run_tests()
        elif stage in EPOCHS:
            if not manifest_path(self.cifar / "train.beton").is_file():
                raise UserError(
                    f"there is no CIFAR-10 in {self.cifar}; scripts/demo.sh makes it, --cifar says where it is"
                )
            self.run_cifar(stage)
        else:
            self.run_stages([stage])

    def write_report(self) -> str:
        found = {stage: self.read(stage) for stage in LEAST_S if self.done(stage)}
        text = markdown(found, list(LEAST_S))
        write_whole(self.folder / "report.json", json.dumps(found, indent=1) + "\n")
        write_whole(self.folder / "report.md", text)
        return text


def make_picture(path: Path, seed: int, side_px: int) -> None:
    """Noise, smooth and sharp, with about the bytes of a photograph."""
    random = np.random.default_rng(seed)
    width = side_px * (3 + seed % 3) // 4
    coarse = Image.fromarray(random.integers(0, 256, (side_px // 8, width // 8, 3), np.uint8))
    pixels = np.asarray(coarse.resize((width, side_px), Image.Resampling.BICUBIC), np.int16)
    grain = random.integers(-12, 13, pixels.shape, np.int16)
    Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8)).save(path, quality=90)


def main(config: ReportConfig) -> None:
    unknown = [stage for stage in config.only if stage not in LEAST_S]
    if unknown:
        raise UserError(f"--only {unknown[0]} is no stage; there are {', '.join(LEAST_S)}")
    report = Report(config)
    wanted = [stage for stage in config.only or LEAST_S if not report.done(stage)]
    measured = [stage for stage in wanted if stage != "tests" and stage not in EPOCHS]
    if config.dry_run and measured:  # together: most of the time is each process's start
        report.attempt(report.run_stages, measured)
    for stage in wanted:
        if report.done(stage):
            continue
        if report.left_s() < LEAST_S[stage] and not config.dry_run:
            print(f"{stage}: not begun, {report.left_s():.0f} s are left", file=sys.stderr)
            continue
        report.attempt(report.run, stage)
        if not report.done(stage):
            print(f"{stage}: not done; {report.folder / 'log.txt'} has its output", file=sys.stderr)
        report.write_report()
    print(report.write_report())
    missing = [stage for stage in wanted if not report.done(stage)]
    if missing:
        raise UserError(f"not yet measured: {', '.join(missing)}; the same command goes on")


if __name__ == "__main__":
    run_command(ReportConfig, main)
