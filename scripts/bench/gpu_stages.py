"""One stage of scripts/gpu_report.sh: measures it and keeps its record up to date (gpu_record.py).

    python scripts/bench/gpu_stages.py --stage kernels --out FOLDER --data FOLDER --cifar FOLDER

    card                    versions
    gate, kernels, tune     the view kernels                                                    gpu_kernels.py
    step, ways              training steps                                                      gpu_steps.py
    tests                   pytest -m gpu
    cifar, linear           200 epochs of CIFAR-10 with kNN over time, then kNN; linear evaluation of the encoder
    decoders, loader-dali   how far DALI's pixels are from the others'; the step on images that it decodes

`--dry-run` does it at toy size on the CPU: its numbers mean nothing. A stage that fails ends with a traceback;
gpu_report.py writes the reason into its record.
"""

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from gpu_record import Record, StageConfig, record_path

from pipeline.command import REPO, run_command
from pipeline.disk import read_lines, write_whole
from pipeline.errors import UserError
from pipeline.storage.beton import manifest_path

PACKAGES = ("torch", "triton", "torchvision", "numba", "numpy", "pillow", "nvidia-dali-cuda120")
FOLLOW_S = 5  # between two looks at a run's metrics, or at pytest's output
TOY = {"arch": "test_resnet", "stem": "imagenet", "projector": "16-16", "global_batch": 8, "epochs": 1, "amp": "off"}
TOY |= {"workers": 1, "warmup_epochs": 0, "knn_every": 1, "compile": False}


# ---- card ----


def output_of(*command: str) -> str | None:
    """What a program of this machine prints; None where there is none or it fails."""
    with suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPO).stdout.strip()
    return None


def versions() -> dict:
    found: dict[str, object] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    found["cores"] = len(os.sched_getaffinity(0))
    found["gpu"] = output_of("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
    return found | {"commit": output_of("git", "rev-parse", "HEAD")}


def measure_card(config: StageConfig, record: Record) -> None:
    record.write(complete=True, rounds=1, versions=versions())


# ---- tests ----


def tests_found(output: str, ended: bool) -> dict:
    """Counts of pytest -v so far, and its short reasons for what failed. Complete: ended, some passed, none failed."""
    lines = re.findall(r"^\[gw\d+\].* (PASSED|FAILED|ERROR|SKIPPED) (\S+::.*)$", output, re.MULTILINE)
    by_test = {test.split(" - ")[0].strip(): result for result, test in lines}
    results = {"passed": "PASSED", "failed": "FAILED", "errors": "ERROR", "skipped": "SKIPPED"}
    counts = {name: list(by_test.values()).count(result) for name, result in results.items()}
    reasons = re.findall(r"^(?:FAILED|ERROR) (\S+::.*)$", output, re.MULTILINE)
    failed = reasons or [test for test, result in by_test.items() if result in ("FAILED", "ERROR")]
    good = ended and counts["passed"] > 0 and not failed
    return counts | {"rounds": len(by_test), "complete": good, "failed_tests": [line[:160] for line in failed]}


def measure_tests(config: StageConfig, record: Record) -> None:
    """The files that have tests for a GPU, side by side; those that train, which take longest, come first."""
    paths = sorted((REPO / "tests").glob("test_*.py"), reverse=True)
    files = [path for path in paths if "mark.gpu" in path.read_text("utf-8")]
    files, workers = ([REPO / "tests" / "test_recorded.py"], "1") if config.dry_run else (files, "8")
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-n", workers, "-v", "-W", "default", *map(str, files)]
    log = config.out / "tests.txt"
    with open(log, "wb") as file:
        tests = subprocess.Popen(command, cwd=REPO, env=os.environ | {"OMP_NUM_THREADS": "2"}, stdout=file, stderr=file)
    code = None
    while code is None:
        with suppress(subprocess.TimeoutExpired):
            code = tests.wait(FOLLOW_S)
        record.write(**tests_found(log.read_text("utf-8", "replace"), ended=code == 0))
    if not record.found["complete"]:
        raise UserError("no test passed" if code in (0, 5) else f"pytest ended with exit code {code}")


# ---- a run of CIFAR-10 ----


def chosen_way(config: StageConfig) -> str:
    """--way, else the fastest of the stage ways; "" where nothing was measured: the preset's own."""
    path = record_path(config.out, "ways")
    return config.way or (json.loads(path.read_text("utf-8")).get("fastest", "") if path.is_file() else "")


def run_so_far(run: Path, images: int) -> dict:
    """What a run's metrics say: epochs that are through, seconds of one, kNN accuracy by epoch."""
    lines = read_lines(run / "metrics.jsonl") if (run / "metrics.jsonl").is_file() else []
    speeds = [line["images_per_s"] for line in lines if "images_per_s" in line]
    config = run / "config.json"
    stepped = json.loads(config.read_text("utf-8")) if config.is_file() else {}
    return {
        "stepped": {name: stepped.get(name) for name in ("compile", "cuda_graph", "views_together", "activations")},
        "rounds": int(max((line["epoch"] for line in lines), default=0)),
        "epoch_s": round(images / float(np.median(speeds)), 3) if speeds else None,
        "knn_by_epoch": {f"{line['epoch']:g}": round(line["knn_top1"], 2) for line in lines if "knn_top1" in line},
    }


def measure_cifar(config: StageConfig, record: Record) -> None:
    """The trainer itself, in this process; a run that was stopped is resumed and its seconds are added up."""
    from gpu_steps import way_fields

    from eval.knn import KnnConfig
    from eval.knn import main as measure_knn
    from train.cards import PRESETS
    from train.pretrain import main as pretrain

    if not manifest_path(config.cifar / "train.beton").is_file():
        raise UserError(f"there is no CIFAR-10 in {config.cifar}; scripts/demo.sh makes it, --cifar says where it is")
    images = json.loads(manifest_path(config.cifar / "train.beton").read_text("utf-8"))["images"]
    run, way, spent = config.out / "cifar", chosen_way(config), config.out / "cifar-seconds.json"
    before_s = json.loads(spent.read_text("utf-8")) if spent.is_file() else 0.0
    own = {"data": config.cifar, "run": str(run), "epochs": 200, "loader": "resident"}
    own |= {"knn_every": 25, "knn_images": 10_000}
    own |= TOY if config.dry_run else way_fields(way) if way else {}
    card = replace(PRESETS["cifar10"], **own)
    start, stop = time.monotonic(), threading.Event()

    def write(**found) -> None:
        seconds = before_s + time.monotonic() - start
        write_whole(spent, json.dumps(seconds))
        about = {"way": way or "the preset's", "epochs": card.epochs, "seconds": round(seconds, 1)}
        record.write(**about, **run_so_far(run, images), **found)

    def follow() -> None:
        while not stop.wait(FOLLOW_S):
            write()

    follower = threading.Thread(target=follow)
    follower.start()
    try:
        pretrain(card)
    except SystemExit as end:
        code = end.code
    finally:
        stop.set()
        follower.join()
    write()
    if code:
        raise UserError(f"the run ended with exit code {code} after epoch {record.found['rounds']} of {card.epochs}")
    result = measure_knn(KnnConfig(checkpoint=run, data=config.cifar))
    record.write(complete=True, knn=result["value"])


def measure_linear(config: StageConfig, record: Record) -> None:
    from eval.linear import LinearConfig
    from eval.linear import main as measure

    result = measure(LinearConfig(checkpoint=config.out / "cifar", data=config.cifar, cached=True))
    record.write(complete=True, rounds=1, linear_cached=result["value"], seconds=result["seconds"])


def measure_decoders(config: StageConfig, record: Record) -> None:
    from decoders import compare, decoders

    from pipeline.storage.beton import open_beton

    found = decoders(open_beton(config.data / "train.beton"))
    record.write(complete=True, rounds=1, pairs=compare(found))


# ---- which stage ----

# Those of other files are imported when they run, so that a package that is missing ends one stage and not this file.
STAGES = {
    "card": "gpu_stages.measure_card",
    "gate": "gpu_kernels.measure_gate",
    "kernels": "gpu_kernels.measure_kernels",
    "tune": "gpu_kernels.measure_tune",
    "step": "gpu_steps.measure_step",
    "ways": "gpu_steps.measure_ways",
    "loader-dali": "gpu_steps.measure_dali",
    "cifar": "gpu_stages.measure_cifar",
    "linear": "gpu_stages.measure_linear",
    "tests": "gpu_stages.measure_tests",
    "decoders": "gpu_stages.measure_decoders",
}


def main(config: StageConfig) -> None:
    if not (torch.cuda.is_available() or config.dry_run):
        raise UserError("there is no GPU here; --dry-run walks through at toy size on the CPU")
    module, function = STAGES[config.stage].split(".")
    getattr(importlib.import_module(module), function)(config, Record(config))


if __name__ == "__main__":
    run_command(StageConfig, main)
