"""The record of a run, written on rank 0: what ran, where, how it went.

    config.json     the whole configuration         env.json      command, versions and devices of the last start
    metrics.jsonl   one line every --log-every steps, at least one an epoch, means over those steps; one with each
                    nearest-neighbour accuracy

The same numbers go to TensorBoard, Weights & Biases and the progress bar (sinks.py).

Reading a number from a GPU waits for it. So the metrics stay on the device, are copied out without waiting when a
line is due, and are written once the copy has arrived, a step or two later. Only then does a loss that is not finite
show; the message names its own step.
"""

import importlib.metadata
import json
import math
import os
import platform
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from pipeline.command import RUNS
from pipeline.disk import append_line, read_lines, write_whole
from pipeline.errors import UserError
from pipeline.progress import say_line
from train.checkpoint import NO_ROOM
from train.distributed import Ranks, say, total
from train.guard import note_lost_step
from train.methods.contract import Method, Metrics
from train.sinks import Bar, TensorBoard, Wandb
from train.update import Update

METRICS = "metrics.jsonl"
PICTURED = 8  # images whose views are shown
# Metrics of a collapse: below which value it is one, and what a healthy run has. See train/methods/contract.py.
COLLAPSED = {"embedding_spread": (0.1, "about 1"), "effective_dimensions": (1.2, "well above 2")}
PACKAGES = ("torch", "torchvision", "timm", "numba", "numpy", "pillow", "ffcv", "safetensors", "tyro")


def open_run_folder(folder: Path) -> None:
    """Makes the run's folder. Raises UserError where that is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make the run folder {folder}: {error.strerror}; choose another place with --name"
        ) from error


def describe_run(folder: Path, config: dict, ranks: Ranks, *, start_step: int) -> None:
    """Writes config.json and env.json, and points runs/latest here."""
    write_whole(folder / "config.json", json.dumps(config, indent=2))
    write_whole(folder / "env.json", json.dumps(environment(ranks, start_step), indent=2))
    try:
        RUNS.mkdir(parents=True, exist_ok=True)
        link = RUNS / f".latest.{os.getpid()}"
        link.symlink_to(folder.relative_to(RUNS) if folder.is_relative_to(RUNS) else folder)
        os.replace(link, RUNS / "latest")
    except OSError as error:
        say(ranks, f"note: {RUNS / 'latest'} could not be pointed at this run ({error.strerror})")


def environment(ranks: Ranks, start_step: int) -> dict:
    """What a number depends on besides the configuration. No host names."""
    cuda = ranks.device.type == "cuda"
    local = os.environ.get("LOCAL_WORLD_SIZE")  # of torchrun
    start = ["torchrun", f"--nproc-per-node={local}"] if local else ["python"]
    return {
        "command": shlex.join([*start, *sys.argv]),
        "start_step": start_step,
        "world_size": ranks.world_size,
        "device": torch.cuda.get_device_name(ranks.device) if cuda else platform.machine() + " CPU",
        "cuda": torch.version.cuda if cuda else None,
        "cpu_cores": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: installed_version(name) for name in PACKAGES},
    }


def installed_version(package: str) -> str | None:
    """None where it is not installed: training reads and writes .beton files without FFCV itself."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


class Pending(NamedTuple):
    """A line of metrics.jsonl that waits for its metrics (steps, M), whose copy to the host is under way."""

    arrived: torch.cuda.Event | None  # None where nothing is to be waited for
    step: int
    steps: list[int]  # from 0: those with an update
    rows: torch.Tensor
    speed: dict[str, float]


class RunLog:
    """Writes metrics.jsonl on rank 0, and gives the same numbers to the sinks, which the other ranks have none of."""

    def __init__(self, update: Update, *, ids: np.ndarray, start_step: int):
        self.config, self.ranks, self.ids = update.config, update.ranks, ids
        self.steps_per_epoch, self.stop_step = update.steps_per_epoch, update.stop_step
        self.every_steps = min(self.config.log_every, self.steps_per_epoch)  # an epoch's line on stderr tells its loss
        self.pending: Pending | None = None
        self.sinks: list[TensorBoard | Bar | Wandb] = []
        self.said_collapse = False
        self._start_interval()
        if self.ranks.rank == 0:
            folder = Path(self.config.run)
            self.lines = folder / METRICS
            keep_lines_before(self.lines, start_step)
            self.board = TensorBoard(folder, start_step)
            self.bar = Bar(start_step, self.stop_step, self.steps_per_epoch)
            self.sinks = [self.board, self.bar, *([Wandb(self.config)] if self.config.wandb else [])]

    def _start_interval(self) -> None:
        self.rows: dict[int, torch.Tensor] = {}  # the metrics (M,) of a step, from 0, on the device
        self.steps, self.skipped, self.substituted = 0, 0, 0
        self.waited_s, self.since = 0.0, time.perf_counter()

    def record(
        self,
        step: int,
        metrics: Metrics | None,
        rates: dict[str, float],
        *,
        waited_s: float = 0.0,
        substituted: int = 0,
    ) -> None:
        """Takes in one step: 0-d tensors on the device by name, learning rates by group, seconds of waiting for data.

        `metrics` is None for a step without an update: only its number is recorded. `substituted` counts the images of
        this rank that stand in for others; every rank calls this, and a line has the sum of all.
        """
        due = (step + 1) % self.every_steps == 0 or step + 1 == self.stop_step
        self.substituted += substituted
        if due and self.config.on_bad_image == "substitute":
            self.substituted = total(self.ranks, self.substituted)
        if self.sinks:
            self._take(metrics, step, waited_s)
        if due and self.sinks:
            self._send(step + 1, rates)
        elif due:
            self._start_interval()
        if self.sinks:
            self.bar.update(step + 1)

    def _take(self, metrics: Metrics | None, step: int, waited_s: float) -> None:
        if metrics is not None:
            self.names = list(metrics)
            self.rows[step] = torch.stack(list(metrics.values()))
        self.steps += 1
        self.skipped += metrics is None
        self.waited_s += waited_s
        if self.pending and (self.pending.arrived is None or self.pending.arrived.query()):
            self.flush()

    def _send(self, step: int, rates: dict[str, float]) -> None:
        """Starts the copy of this interval's metrics to the host, and a new interval."""
        self.flush()
        if not self.rows:  # no update was kept
            return self._start_interval()
        seconds = time.perf_counter() - self.since
        speed = {
            "images_per_s": self.steps * self.config.global_batch / seconds,
            "data_wait_share": self.waited_s / seconds,
            **{f"lr_{name}": rate for name, rate in rates.items()},
            **({"skipped_steps": self.skipped} if self.config.on_nan == "skip" else {}),
            **({"substituted_images": self.substituted} if self.config.on_bad_image == "substitute" else {}),
        }
        cuda = self.ranks.device.type == "cuda"
        values = torch.stack(list(self.rows.values()))
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=cuda)
        host.copy_(values, non_blocking=True)
        arrived = torch.cuda.current_stream().record_event() if cuda else None
        self.pending = Pending(arrived, step, list(self.rows), host, speed)
        self._start_interval()
        if arrived is None:
            self.flush()

    def flush(self) -> None:
        """Writes the line that is under way, waiting for it if need be; UserError for a loss that is not finite."""
        if not self.pending:
            return
        pending, self.pending = self.pending, None
        if pending.arrived is not None:
            pending.arrived.synchronize()
        values = dict(zip(self.names, pending.rows.double().mean(0).tolist(), strict=True))
        # Where fp16's scaler left a step out, its gradient was not finite: null in JSON.
        written = {name: value if math.isfinite(value) else None for name, value in values.items()}
        line = self._append(pending.step, written | pending.speed)
        for sink in self.sinks:
            sink.line(line)
        self._refuse_lost_loss(pending.steps, pending.rows)
        self._name_collapse(values)

    def _append(self, step: int, values: Mapping[str, float | None]) -> dict:
        """Writes a line of metrics.jsonl, and returns it."""
        line = {"step": step, "epoch": step / self.steps_per_epoch, **values}
        append_line(self.lines, json.dumps(line), durable=False, advice=NO_ROOM)
        return line

    def _name_collapse(self, values: dict[str, float]) -> None:
        """Says so once when the embeddings have shrunk to a point or a line."""
        symptoms = [
            f"{name.replace('_', ' ')} {values[name]:.3g}, healthy is {healthy}"
            for name, (least, healthy) in COLLAPSED.items()
            if values.get(name, math.inf) < least
        ]
        if symptoms and not self.said_collapse:
            self.said_collapse = True
            say_line(
                f"warning: the embeddings collapse ({'; '.join(symptoms)}): every image looks the same to the network; "
                "lower the learning rates, or check what --loss, --stop-gradient and --without take out"
            )

    def pictures(self, step: int, views: tuple[torch.Tensor, ...], method: Method) -> None:
        """To TensorBoard, after an epoch: the views (B, 3, H, W) of some images, and what the method has to show."""
        if not self.sinks or step % self.steps_per_epoch:
            return
        rows = [view[:PICTURED].detach().float().nan_to_num(0, 0, 0).cpu() for view in views]
        pixels = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)  # side by side, a row a view
        low, high = pixels.amin(), pixels.amax()
        self.board.picture("views", (pixels - low) / (high - low).clamp(min=1e-6), step)
        for name, matrix in method.pictures().items():
            self.board.picture(name, red_and_blue(matrix.float().nan_to_num(0, 0, 0).cpu()), step)

    def note_accuracy(self, step: int, values: dict[str, float]) -> None:
        """Writes a line of its own for what was measured of the weights after `step` updates."""
        self._append(step, values)
        for sink in self.sinks:
            sink.accuracy(step, values)

    def before_checkpoint(self) -> None:
        """Writes what is under way. Raises UserError where a checkpoint of now would hold lost weights."""
        self.flush()
        if self.rows:
            self._refuse_lost_loss(list(self.rows), torch.stack(list(self.rows.values())))

    def _refuse_lost_loss(self, steps: list[int], values: torch.Tensor) -> None:
        """values (steps, metrics): raises UserError for the first step whose loss is not finite."""
        losses = values[:, self.names.index("loss")].tolist()
        for step, loss in zip(steps, losses, strict=True):
            if not math.isfinite(loss):
                raise UserError(
                    f"the loss became {loss} in step {step + 1}; {note_lost_step(self.config, self.ids, step)}; "
                    "the last checkpoint is from before; lower --lr-weights and --lr-biases, lengthen "
                    "--warmup-epochs, try --amp off, or leave such steps out with --on-nan skip"
                )

    def close(self) -> None:
        """Ends the sinks."""
        for sink in self.sinks:
            sink.close()


def red_and_blue(matrix: torch.Tensor) -> torch.Tensor:
    """(H, W) in [-1, 1] → (3, H, W) in [0, 1]: white is 0, red 1, blue -1."""
    up, down = matrix.clamp(0, 1), (-matrix).clamp(0, 1)
    return torch.stack([1 - down, 1 - up - down, 1 - up])


def keep_lines_before(path: Path, step: int) -> None:
    """Drops the lines that a resumed run writes again, those after the step it starts at, and torn ones.

    Afterwards there is a file, if an empty one.
    """
    lines = read_lines(path) if path.exists() else []
    kept = [line for line in lines if not (isinstance(line.get("step"), int | float) and line["step"] > step)]
    write_whole(path, "".join(json.dumps(line) + "\n" for line in kept))
