"""Where the time of a training step goes, and how many images a second come out.

    python scripts/bench/step.py                                        random images, already on the device
    python scripts/bench/step.py --global-batch 16 --steps 3            the same on a CPU: 1024 need over 24 GB
    python scripts/bench/step.py --data data/imagenet --views-on gpu    real ones, through the loader
    torchrun --nproc-per-node=8 scripts/bench/step.py --data data/imagenet --json step.json

Every flag of train/pretrain.py is one here. A repeat is --steps steps as the trainer makes them, which give the
images a second, then the same with marks between the stages. Figures are means over the repeats with 95 % intervals.

    data_wait      the step waits for its batch
    copy           decoded pixels to the GPU, apart from the rest; 0 where the views are made on the CPU
    views          the loader alone, a batch: decoding, views, copy. It works beside the steps: no part of their sum
    forward        both views through backbone and heads, batch norm's messages to other ranks included
    loss           the rest of the method
    backward       with the gradients' way to the other ranks
    communication  by how much backward is shorter when the gradients are not sent
    optimizer      LARS, the schedule of its rates left out

MFU is the share of the GPU's dense bf16 peak that the operations of one forward and backward pass would need.
"""

import contextlib
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import device_name, interval, machine, write_json
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from pipeline.choices.order import rank_batch
from pipeline.command import run_command
from pipeline.errors import UserError
from pipeline.loader import Loader, make_loader
from train.config import AMP, PretrainConfig, as_plain
from train.distributed import Ranks, say, start_ranks, stop_ranks
from train.flags import chosen_preset, resolved
from train.methods.choose import make_method
from train.model import make_backbone
from train.run_data import loader_config, view_type
from train.update import Update, Views, make_update

SYNTHETIC = Path("synthetic")
# At step 0 of a warm-up the learning rate is 0: however many steps are timed, the weights stay as they are.
AT_REST: dict[str, Any] = {"epochs": 1, "warmup_epochs": 1, "on_nan": "stop", "init_from": None}
READY = 3  # batches that a loader may have ready when nobody has asked for a while; they are not timed
# Dense bf16 peak, operations a second. Source: NVIDIA's data sheets (without sparsity).
PEAK = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}


@dataclass(frozen=True)
class BenchConfig(PretrainConfig):
    """What to measure; flags of pretraining that make no difference here are ignored."""

    data: Path = SYNTHETIC
    """synthetic: random images on the device. Else a folder that holds train.beton, or a .beton file."""
    steps: int = 20
    """Steps of a repeat."""
    repeats: int = 5
    """Repeats, at least 5; one more at the start warms up and is not counted."""
    json: Path | None = None
    """Where to write the record."""


def operations(config: PretrainConfig, ranks: Ranks, views: Views) -> float:
    """Floating-point operations of this rank's forward and backward pass, from two images: they grow with the batch.

    In a network of its own: a compiled one cannot be counted, and one that recomputes would count twice.
    """
    method = make_method(*make_backbone(config.arch, config.stem), config)
    method.to(ranks.device).to(memory_format=torch.channels_last)
    autocast = torch.autocast(ranks.device.type, AMP[config.amp], enabled=config.amp != "off")
    with FlopCounterMode(display=False) as counter:
        with autocast:
            loss, _ = method(tuple(view[:2] for view in views))
        loss.backward()
    return counter.get_total_flops() * len(views[0]) / 2


class Bench:
    """One rank's updates, as train/update.py makes them, and the batches that they get."""

    def __init__(self, config: BenchConfig, ranks: Ranks, make: Callable[..., Update] = make_update):
        self.cuda, self.ranks = ranks.device.type == "cuda", ranks
        self.steps = config.steps
        self.update = make(replace(config, **AT_REST), ranks)
        self.config = self.update.config
        self.loader = None if config.data == SYNTHETIC else make_loader(loader_config(self.config, ranks))
        shape = rank_batch(config.global_batch, ranks.world_size), 3, config.resolution, config.resolution
        kind = view_type(config, ranks.device)
        pixels = (torch.randn(shape, dtype=kind, device=ranks.device) for _ in range(2))
        self.views = tuple(view.contiguous(memory_format=torch.channels_last) for view in pixels)
        self.operations = operations(self.config, ranks, self.views)
        self.marks: list[tuple[str, Any]] | None = None
        self.update.mark = self._mark
        if not self.config.compile:  # hooks would be compiled away
            for part in self.update.method.children():
                part.register_forward_pre_hook(lambda *_: self._mark("loss"))
                part.register_forward_hook(lambda *_: self._mark("forward"))
        self.batches = self.batches_of(self.loader)

    def _mark(self, stage: str) -> None:
        """Notes that `stage` ended here. On a GPU an event, which makes nothing wait."""
        if self.marks is None or (self.update.recorded and stage in ("forward", "loss", "backward")):
            return  # within a recorded step an event would become a part of it
        now: Any = time.perf_counter()
        if self.cuda:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        self.marks.append(("forward" if stage == "loss" and self.config.compile else stage, now))

    def _wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def batches_of(self, loader: Loader | None) -> Generator[Views, None, None]:
        """The views of step after step; without a loader always the same."""
        while loader is None:
            yield self.views
        yield from (batch.views for batch in loader.batches(0, sys.maxsize))

    def together(self, batches: Generator[Views, None, None] | None = None) -> dict[str, float]:
        """Milliseconds of a step, and of its wait for data, with nothing between the stages."""
        batches = batches or self.batches
        for _ in range(READY):
            self.update(next(batches))
        self._wait()
        start, waited = time.perf_counter(), 0.0
        for _ in range(self.steps):
            asked = time.perf_counter()
            views = next(batches)
            waited += time.perf_counter() - asked
            self.update(views)
        self._wait()
        seconds = time.perf_counter() - start
        return {"step": 1000 * seconds / self.steps, "data_wait": 1000 * waited / self.steps}

    def apart(self) -> dict[str, float]:
        """Milliseconds a step of every stage on the device."""
        self.marks = []
        for _ in range(self.steps):
            self._mark("begin")
            self.update(self.views)
        self._wait()
        marks, self.marks = self.marks, None
        total: defaultdict[str, float] = defaultdict(float)
        for (_, begin), (stage, end) in pairwise(marks):
            total[stage] += begin.elapsed_time(end) if self.cuda else 1000 * (end - begin)
        return {stage: total[stage] / self.steps for stage in ("forward", "loss", "backward", "optimizer")}

    def measured(self) -> dict[str, float]:
        """One repeat: milliseconds by stage."""
        found = self.apart() | self.together()
        found["communication"] = 0.0
        if isinstance(self.update.model, DistributedDataParallel):
            with self.update.model.no_sync():
                found["communication"] = max(0.0, found["backward"] - self.apart()["backward"])
        found["copy"] = found["views"] = 0.0
        if self.loader is not None:
            found["views"], found["copy"] = self._loader_alone(), self._copy(*self.loader.sizes)
        return found

    def mfu(self, step_ms: float) -> float | None:
        """The share of the GPU's dense bf16 peak that a step needs; None for float32, or if the peak is not known."""
        peak = next((peak for part, peak in PEAK.items() if part in device_name()), None)
        if peak is None or self.config.amp == "off":
            return None
        return round(self.operations / (step_ms / 1000) / peak, 4)

    def _loader_alone(self) -> float:
        """Milliseconds a batch when no step is made."""
        for _ in range(READY):
            next(self.batches)

        def load() -> None:
            next(self.batches)
            self._wait()

        return self._ms_of(load)

    def _copy(self, heights: np.ndarray, widths: np.ndarray) -> float:
        """Milliseconds for the bytes of a batch of decoded images from pinned memory to the GPU."""
        if not self.cuda:
            return 0.0
        nbytes = int((heights * widths).mean() * 3 * len(self.views[0]))
        pixels = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        return self._ms_of(lambda: pixels.to(self.ranks.device, non_blocking=True))

    def _ms_of(self, work: Callable[[], object]) -> float:
        """Milliseconds of one of --steps calls."""
        self._wait()
        start = time.perf_counter()
        for _ in range(self.steps):
            work()
        self._wait()
        return 1000 * (time.perf_counter() - start) / self.steps

    def close(self) -> None:
        """Ends the loader."""
        self.batches.close()
        if self.loader is not None:
            self.loader.close()


def record(bench: Bench, found: list[dict[str, float]]) -> dict:
    """Of some repeats: speed, milliseconds by stage, and what they depend on."""
    stages = {stage: interval([one[stage] for one in found]) for stage in found[0]}
    return {
        "images_per_s": interval([1000 * bench.config.global_batch / one["step"] for one in found]),
        "stages_ms": stages,
        "mfu": bench.mfu(stages["step"]["mean"]),
        "tera_operations_a_step_and_rank": round(bench.operations / 1e12, 4),
        "repeats": len(found),
        "steps": bench.steps,
        "world_size": bench.ranks.world_size,
        "device": device_name(),
        "machine": machine("torch"),
        "torch_threads": torch.get_num_threads(),
        "config": as_plain(bench.config) | {"json": None},
    }


def print_record(result: dict) -> None:
    """A line a stage, and one for the speed."""
    for stage in ("data_wait", "copy", "views", "forward", "loss", "backward", "communication", "optimizer", "step"):
        print("{0:14s} {mean:10.2f} ± {ci95:<8.2f} ms".format(stage, **result["stages_ms"][stage]))
    mfu = f", MFU {result['mfu']:.1%}" if result["mfu"] else ""
    print("{mean:.1f} ± {ci95:.1f} images/s{0}, {1} × {2}".format(
        mfu, result["world_size"], result["device"], **result["images_per_s"]
    ))  # fmt: skip


def main(config: BenchConfig) -> None:
    """Measures on every rank that torchrun started; rank 0 prints and writes the record."""
    if config.repeats < 5 or config.steps < 1:
        raise UserError(f"--repeats {config.repeats} and --steps {config.steps}: give at least 5 and 1")
    synthetic = config.data == SYNTHETIC
    config = resolved(config)
    config = replace(config, data=SYNTHETIC if synthetic else config.data)
    ranks = start_ranks()
    try:
        with contextlib.closing(Bench(config, ranks)) as bench:
            say(ranks, f"{config.repeats} × {config.steps} steps of {config.global_batch} images")
            found = [bench.measured() for _ in range(config.repeats + 1)][1:]
            result = record(bench, found)
    finally:
        stop_ranks()
    if ranks.rank == 0:
        print_record(result)
        write_json(config.json, result)


if __name__ == "__main__":
    card = asdict(chosen_preset(sys.argv)) | {"data": SYNTHETIC}
    run_command(BenchConfig, main, BenchConfig(**card))
