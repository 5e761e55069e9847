"""What the stages of scripts/gpu_report.sh share: their flags, the record each keeps, means with intervals.

A record is OUT/stages/STAGE.json. It is whole at all times and is replaced after every round, so a stage that is ended
leaves what it has measured:

    rounds     how many there are so far: repeats, ways, epochs, tests; `complete` says whether that is all
    error      why there is no more; gpu_report.py adds it
    device     the GPU's name, or the CPU's kind       torch  its version
"""

import json
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy import stats

from pipeline.disk import write_whole

GB = 1e9
Interval = dict[str, float | None]


@dataclass(frozen=True)
class StageConfig:
    """Which measurement, on what."""

    stage: str
    out: Path
    """The report's folder."""
    data: Path
    """A folder with train.beton of photographs."""
    cifar: Path
    """A folder with train.beton and val.beton of CIFAR-10."""
    way: str = ""
    """How CIFAR-10 is stepped: eager, or compile, graph, together joined by +. Empty: the fastest one measured."""
    launches: Path | None = None
    """For the stage tune: a JSON list of launch settings (gpu_kernels.py)."""
    dry_run: bool = False
    """Toy size, CPU."""


def record_path(out: Path, stage: str) -> Path:
    return out / "stages" / f"{stage}.json"


class Record:
    """The record of one stage while it is measured."""

    def __init__(self, config: StageConfig):
        self.path = record_path(config.out, config.stage)
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
        self.found = {"rounds": 0, "complete": False, "device": device, "torch": torch.__version__}
        if config.dry_run:
            self.found["dry_run"] = True

    def wait_until_quiet(self) -> None:
        """Until gpu_report.py says that nothing else runs beside."""
        while not (self.path.parents[1] / "quiet").exists():
            time.sleep(0.2)

    def write(self, complete: bool = False, **found) -> None:
        """Adds or replaces entries; on disk when this returns."""
        self.found |= found | {"complete": complete}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, json.dumps(self.found, indent=1) + "\n")


def interval(values: list[float]) -> Interval:
    """Mean and the half width of its 95 % interval, None of a single value."""
    half = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)) if len(values) > 1 else None
    return {"mean": round(float(np.mean(values)), 4), "ci95": None if half is None else round(half, 4)}
