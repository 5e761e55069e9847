"""What the benchmarks share: candidates in turn, means with intervals, the machine's name, the records they write."""

import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from scipy import stats

from pipeline.disk import write_whole
from pipeline.errors import UserError

GB = 1e9
Interval = dict[str, float | None]
Measured = TypeVar("Measured")


def in_turn(
    candidates: dict[str, Callable[[], Measured]], repeats: int, warm_up: bool = True
) -> Iterator[dict[str, list[Measured]]]:
    """Runs all candidates one after the other, again and again, so that a busy moment of the machine meets them all.

    Yields what they have returned so far after each repeat; the first round, to warm up, does not count.
    """
    found: dict[str, list[Measured]] = {name: [] for name in candidates}
    for repeat in range(-1 if warm_up else 0, repeats):
        for name, run in candidates.items():
            value = run()
            if repeat >= 0:
                found[name].append(value)
        if repeat >= 0:
            yield found


def seconds_of(work: Callable[[], object]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def interval(values: Sequence[float], digits: int = 4) -> Interval:
    """Mean and the half width of its 95 % interval (Student's t), None for a single value; both rounded."""
    half = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)) if len(values) > 1 else None
    return {"mean": round(float(np.mean(values)), digits), "ci95": None if half is None else round(half, digits)}


def as_text(value: Interval, digits: int = 3) -> str:
    """An interval as "mean ± half width"."""
    half = value["ci95"]
    return f"{value['mean']:.{digits}f}" + ("" if half is None else f" ± {half:.{digits}f}")


def difference_summary(counts: np.ndarray) -> dict[str, float]:
    """Of the number of 8-bit values by how much they differ, 0 … 255."""
    values = int(counts.sum())
    return {
        "values": values,
        "values_that_differ": values - int(counts[0]),
        "mean_difference_255": float(f"{counts @ np.arange(256) / values:.4g}"),
        "largest_difference_255": int(np.flatnonzero(counts)[-1]),
    }


def device_name() -> str:
    """The GPU's name, or the kind of CPU where there is no GPU."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"


def machine(*packages: str) -> str:
    """The GPU if there is one, the processor, and the versions that decide the figures."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    processor = next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
    gpu = [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
    cores = f"{len(os.sched_getaffinity(0))} CPUs"
    versions = [f"{package} {version(package)}" for package in packages]
    return ", ".join([*gpu, processor, cores, f"Python {platform.python_version()}", *versions])


def class_images(folder: Path) -> list[Path]:
    """The files of a folder with one folder of images a class, sorted. Raises UserError where there are none."""
    files = sorted(path for path in folder.glob("*/*") if path.is_file())
    if not files:
        raise UserError(f"{folder} has no class folders with images; give the folder that holds the class folders")
    return files


def write_json(path: Path | None, record: object) -> None:
    """Writes a record, if a place for it was given."""
    if path is not None:
        write_whole(path, json.dumps(record, indent=1) + "\n")
