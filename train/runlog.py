"""The record of a run, written on rank 0: what ran, where, how it went.

    config.json     the whole configuration         env.json      versions and devices of the last start
    metrics.jsonl   one line every --log-every steps, means over those steps
    tensorboard/    the same numbers                loss.png      loss, diagonal mean, off-diagonal RMS; at the end

Reading a number from a GPU waits for it. So the metrics are added up on the device, copied out without waiting
when a line is due, and written once the copy has arrived, a step or two later.
"""

import importlib.metadata
import json
import math
import os
import platform
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from pipeline.command import RUNS, UserError
from train.checkpoint import write_atomically
from train.distributed import Ranks, say

PACKAGES = ("torch", "torchvision", "timm", "numba", "numpy", "pillow", "ffcv", "safetensors", "tyro")


def open_run_folder(folder: Path) -> None:
    """Makes the run's folder. Raises UserError where that is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make the run folder {folder}: {error.strerror}; choose another place with --run"
        ) from error


def describe_run(folder: Path, config: dict, ranks: Ranks, start_step: int) -> None:
    """Writes config.json and env.json, and points runs/latest here."""
    write_atomically(folder / "config.json", json.dumps(config, indent=2).encode())
    write_atomically(folder / "env.json", json.dumps(environment(ranks, start_step), indent=2).encode())
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
    return {
        "start_step": start_step,
        "world_size": ranks.world_size,
        "device": torch.cuda.get_device_name(ranks.device) if cuda else platform.machine() + " CPU",
        "cuda": torch.version.cuda if cuda else None,
        "cpu_cores": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }


class RunLog:
    """Metrics, TensorBoard and progress bar of one start of a run; does nothing on ranks other than 0."""

    def __init__(self, folder: Path, config, ranks: Ranks, start_step: int, stop_step: int, steps_per_epoch: int):
        self.active = ranks.rank == 0
        self.global_batch, self.log_every = config.global_batch, config.log_every
        self.steps_per_epoch, self.stop_step = steps_per_epoch, stop_step
        self.device, self.pending = ranks.device, None
        self._start_interval()
        if not self.active:
            return
        from torch.utils.tensorboard import SummaryWriter  # a second to import, and rank 0 alone needs it

        self.folder = folder
        keep_lines_before(folder / "metrics.jsonl", start_step)
        self.file = open(folder / "metrics.jsonl", "a", buffering=1)  # noqa: SIM115 (closed in close)
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step)
        interval = 0.5 if sys.stderr.isatty() else 10
        self.bar = tqdm(total=stop_step, initial=start_step, unit="step", mininterval=interval, dynamic_ncols=True)

    def _start_interval(self) -> None:
        self.totals, self.steps, self.waited_s, self.since = None, 0, 0.0, time.perf_counter()

    def record(self, step: int, metrics: dict[str, torch.Tensor], rates: dict[str, float], waited_s: float) -> None:
        """Takes in one step: 0-d tensors on the device, learning rates by group, seconds spent waiting for data."""
        if not self.active:
            return
        values = torch.stack(list(metrics.values()))
        self.totals = values if self.totals is None else self.totals + values
        self.steps += 1
        self.waited_s += waited_s
        self.bar.update()
        if (step + 1) % self.log_every == 0 or step + 1 == self.stop_step:
            self.flush()
            self._send(step + 1, list(metrics), rates)
        if self.pending and (self.pending[0] is None or self.pending[0].query()):
            self.flush()

    def _send(self, step: int, names: list[str], rates: dict[str, float]) -> None:
        """Starts the copy of this interval's means to the host, and a new interval."""
        seconds = time.perf_counter() - self.since
        line = {"step": step, "epoch": step / self.steps_per_epoch}
        speed = {
            "images_per_s": self.steps * self.global_batch / seconds,
            "data_wait_share": self.waited_s / seconds,
            **{f"lr_{name}": rate for name, rate in rates.items()},
        }
        cuda = self.device.type == "cuda"
        host = torch.empty(len(names), dtype=self.totals.dtype, pin_memory=cuda)
        host.copy_(self.totals / self.steps, non_blocking=True)
        arrived = torch.cuda.current_stream().record_event() if cuda else None
        self.pending = arrived, line, names, host, speed
        self._start_interval()

    def flush(self) -> None:
        """Writes the line that is under way, waiting for it if need be; UserError for a loss that is no number."""
        if not self.pending:
            return
        arrived, line, names, host, speed = self.pending
        self.pending = None
        if arrived is not None:
            arrived.synchronize()
        line = line | dict(zip(names, host.tolist(), strict=True)) | speed
        self.file.write(json.dumps(line) + "\n")
        for name, value in line.items():
            self.board.add_scalar(name, value, line["step"])
        self.bar.set_postfix_str(
            f"loss {line['loss']:.4g}, {line['images_per_s']:.0f} images/s, {line['data_wait_share']:.0%} data wait"
        )
        refuse_lost_loss(line["loss"], line["step"])

    def before_checkpoint(self, step: int) -> None:
        """Writes what is under way. Raises UserError where a checkpoint of this step would hold lost weights."""
        self.flush()
        if self.totals is not None:
            refuse_lost_loss(self.totals.sum().item(), step)

    def close(self) -> None:
        if self.active:
            self.bar.close()
            self.file.close()
            self.board.close()


def refuse_lost_loss(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise UserError(
            f"the loss became {loss} before step {step}; the last checkpoint is from before; "
            "lower --lr-weights and --lr-biases, lengthen --warmup-epochs or try --amp off"
        )


def keep_lines_before(path: Path, step: int) -> None:
    """Drops the lines that a resumed run writes again: those after the step it starts at, and a torn last one."""
    if not path.exists():
        return
    kept = []
    for text in path.read_text().splitlines():
        try:
            if json.loads(text)["step"] <= step:
                kept.append(text + "\n")
        except json.JSONDecodeError:
            break
    write_atomically(path, "".join(kept).encode())


def plot_loss(folder: Path) -> None:
    """Draws loss.png from metrics.jsonl."""
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    if not lines:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.5), layout="constrained")
    titles = {"loss": "loss", "diagonal_mean": "mean of C's diagonal", "off_diagonal_rms": "RMS of C off the diagonal"}
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        axis.plot([line["epoch"] for line in lines], [line[name] for line in lines], linewidth=1.2)
        axis.set(title=title, xlabel="epoch")
        axis.grid(alpha=0.3)
    figure.savefig(folder / "loss.png", dpi=110)
    pyplot.close(figure)
