"""What the stages of scripts/gpu_report.sh share: their flags, and the record that each keeps.

A record is OUT/stages/STAGE.json. It is whole at all times and is replaced after every round, so a stage that is ended
leaves what it has measured:

    rounds     how many there are so far: repeats, ways, epochs, tests; `complete` says whether that is all
    error      why there is no more; gpu_report.py adds it
    device     the GPU's name, or the CPU's kind       torch  its version
"""

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from measure import device_name, write_json

from pipeline.command import DATA, RUNS


@dataclass(frozen=True)
class StageConfig:
    """Which measurement, on what."""

    stage: str = ""
    """The measurement; gpu_report.py runs several."""
    out: Path = RUNS / "gpu-report"
    """Folder for the report, the stages' records and the run."""
    data: Path | None = None
    """A folder with a train.beton of photographs."""
    cifar: Path = DATA / "cifar10"
    """A folder with CIFAR-10's train.beton and val.beton (scripts/demo.sh makes them)."""
    way: str = ""
    """How CIFAR-10 is trained: eager, or compile, graph, together joined by +. Empty: the fastest one measured."""
    launches: Path | None = None
    """For the stage tune: a JSON list of launch settings (scripts/bench/gpu_kernels.py). None: each kernel's warps."""
    dry_run: bool = False
    """Every stage at toy size on the CPU; the numbers mean nothing."""


def record_path(out: Path, stage: str) -> Path:
    return out / "stages" / f"{stage}.json"


class Record:
    """The record of one stage while it is measured."""

    def __init__(self, config: StageConfig):
        self.path = record_path(config.out, config.stage)
        self.found = {"rounds": 0, "complete": False, "device": device_name(), "torch": torch.__version__}
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
        write_json(self.path, self.found)
