"""The state of a run: resumed to the step, and saved on rank 0 while training continues.

Model, optimizer, scaler, step and seed are all of it: order and views are functions of seed and step. With --knn-every
also the linear layer beside the model.

    training   ── step ── step ─ copy ─ step ── step ── step ─ copy ─ step ──
    thread                         └─ serialize, write, rename ─┘ └─ …

A checkpoint is due every --checkpoint-every-steps and -minutes, on a signal, at the end of the run, and at the end of
an epoch unless there was one within the last minute: CIFAR-10's epochs take seconds. Its copy in the CPU's memory is
all that training waits for, unless the one before it is still being written.
"""

import threading
import time
from dataclasses import asdict
from pathlib import Path

import torch

from pipeline.disk import require_room
from pipeline.errors import UserError
from pipeline.one_writer import OneWriter
from train.checkpoint import (
    CHECKPOINT,
    NO_ROOM,
    BackboneInfo,
    newest_checkpoint,
    remove_leftovers,
    remove_run_before,
    save_checkpoint,
)
from train.config import NORMALIZATIONS, PretrainConfig, as_plain
from train.distributed import largest, say
from train.methods.choose import view_table
from train.resuming import load_part_, refuse_other_images, refuse_other_recipe, refuse_other_views
from train.update import Update

ENTRY_BYTES = 1024  # of a tensor's names and place in torch.save's file
PLAIN_BYTES = 64 << 10  # of the configuration and all else that is no tensor
START_OVER = "give this run its own folder with --name, or start over with --resume never"
EPOCHS_APART_S = 60.0  # since the last checkpoint, for the end of an epoch to be worth another


def backbone_info(config: PretrainConfig, features: int, step: int, *, dataset_sha256: str = "") -> BackboneInfo:
    """What a file of a run says of its backbone, which has `features` outputs, after `step` updates."""
    return BackboneInfo(
        arch=config.arch,
        stem=config.stem,
        features=features,
        resolution_px=config.resolution,
        normalization=NORMALIZATIONS[config.views],
        data=str(config.data),
        seed=config.seed,
        step=step,
        epochs=config.epochs,
        dataset_sha256=dataset_sha256,
    )


def on_cpu(value):
    """A copy of nested dicts and lists with their tensors in the CPU's memory.

    Copies from a GPU are only started (into pinned memory); the caller waits for the device once.
    """
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True, non_blocking=True)
    if isinstance(value, dict):
        return {key: on_cpu(item) for key, item in value.items()}
    return [on_cpu(item) for item in value] if isinstance(value, list) else value


def checkpoint_bytes(model: torch.nn.Module) -> int:
    """At most how large a checkpoint of a run becomes, whose optimizer keeps a momentum of each weight."""
    tensors = [*model.state_dict().values(), *(p for p in model.parameters() if p.requires_grad)]
    return sum(tensor.nbytes + ENTRY_BYTES for tensor in tensors) + PLAIN_BYTES


def refuse_lost_weights(model: dict[str, torch.Tensor], step: int) -> None:
    """Raises UserError for a weight that is not finite: a finite loss does not show what its gradient was."""
    for name, weight in model.items():
        if weight.is_floating_point() and not weight.isfinite().all():
            raise UserError(
                f"{name} is no longer finite after step {step}, so no checkpoint was written; the last one is from "
                "before; lower --lr-weights and --lr-biases, lengthen --warmup-epochs or try --amp off"
            )


class RunState:
    """What a run's checkpoints hold (`Update.state`), saved and resumed.

    As a context it lets a write under way end, also where an error ends the run; the second Ctrl-C waits for nothing.

        images           size of the training set, which decides the order of samples
        dataset_sha256   of these images, which a checkpoint must share with the run that resumes it; "" where unknown
        writer           rank 0's right to write the folder, asked for before each checkpoint
    """

    def __init__(self, update: Update, images: int, *, dataset_sha256: str = "", writer: OneWriter | None = None):
        self.update, self.config, self.ranks = update, update.config, update.ranks
        self.images, self.dataset_sha256, self.writer = images, dataset_sha256, writer
        self.folder = Path(self.config.run)
        self.on_disk: int | None = None  # the step of the good checkpoint.pt that is there
        self.thread: threading.Thread | None = None
        self.error: Exception | None = None
        self.since = time.monotonic()

    def resume(self) -> int:
        """Loads the newest good checkpoint, where there is one and --resume allows it; returns its step, else 0."""
        step, mark, found = 0, 0, newest_checkpoint(self.folder) if self.config.resume == "auto" else None
        if found:
            saved, path, sha256 = found
            refuse_other_recipe(saved, as_plain(self.config), self.images, path)
            refuse_other_views(saved, view_table(self.config), path)
            if not refuse_other_images(saved, self.config.data, self.dataset_sha256, path):
                text = "is from before checkpoints named their images; it is taken on trust that they are those of"
                say(self.ranks, f"note: {path} {text} {self.config.data}")
            if saved["step"] > self.update.stop_step:
                text = f"{path} is of step {saved['step']}, and this run has {self.update.stop_step} steps"
                raise UserError(f"{text}; {START_OVER}")
            if path.name != CHECKPOINT:
                say(self.ranks, f"note: {self.folder / CHECKPOINT} is damaged or missing; continuing from {path.name}")
            for name, part in self.update.state.items():
                if name in saved or name != "online_linear":
                    load_part_(part, saved.get(name), name, path, START_OVER)
                else:  # the run had no --knn-every then, or is older
                    say(self.ranks, f"note: {path} has no linear layer for linear_top1; it begins at random weights")
            step, mark = saved["step"], int(sha256[:15], 16)
            self.on_disk = step if path.name == CHECKPOINT else None
        if largest(self.ranks, mark) != mark or -largest(self.ranks, -mark) != mark:
            raise UserError(f"the ranks see different checkpoints in {self.folder}; put it on a disk that all share")
        if self.ranks.rank == 0:
            remove_leftovers(self.folder)
        return step

    def begin(self) -> None:
        """Before the first step: shows now, not after an epoch, whether the disk takes a checkpoint, and then removes
        the run that this one starts over. Called by all ranks: where it does not, every one ends, as in `finish`.
        """
        if self.ranks.rank == 0:
            try:
                networks = [self.update.method, *([self.update.linear.layer] if self.update.linear else [])]
                require_room(self.folder / CHECKPOINT, sum(map(checkpoint_bytes, networks)), NO_ROOM)
            except UserError as error:
                self.error = error
        self.finish()
        if self.ranks.rank == 0 and self.config.resume == "never":
            remove_run_before(self.folder)

    def due(self, step: int) -> bool:
        """Whether a checkpoint belongs after `step` updates. By the clock, ranks may differ: only rank 0 writes."""
        every, minutes = self.config.checkpoint_every_steps, self.config.checkpoint_every_minutes
        since_s = time.monotonic() - self.since
        if step == self.update.stop_step or (every > 0 and step % every == 0):
            return True
        return 0 < minutes <= since_s / 60 or (step % self.update.steps_per_epoch == 0 and since_s >= EPOCHS_APART_S)

    def save(self, step: int) -> None:
        """Starts to write the state after `step` updates. An error shows in `failed` and is raised by `finish`."""
        if self.ranks.rank != 0:
            return
        self._join()
        if self.error:
            return
        about = {"config": as_plain(self.config), "backbone": asdict(self.info(step))}
        parts = on_cpu({name: part.state_dict() for name, part in self.update.state.items()})
        if self.ranks.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        views = [asdict(view) for view in view_table(self.config)]
        content = {"step": step, "images": self.images, "views": views, **about, **parts}
        self.thread = threading.Thread(target=self._write, args=(content,), name="checkpoint", daemon=True)
        self.thread.start()
        self.since = time.monotonic()

    def info(self, step: int) -> BackboneInfo:
        """`backbone_info` of this run."""
        return backbone_info(self.config, self.update.features, step, dataset_sha256=self.dataset_sha256)

    def _write(self, content: dict) -> None:
        try:
            self._require_writer()
            refuse_lost_weights(content["model"], content["step"])
            save_checkpoint(self.folder, content, before=self.on_disk, keep=self.config.keep)
            self.on_disk = content["step"]
        except Exception as error:  # it ends the run, on the thread that trains
            self.error = error

    def _join(self) -> None:
        if self.thread:
            self.thread.join()

    def _require_writer(self) -> None:
        if self.writer is not None:
            self.writer.require()

    @property
    def failed(self) -> bool:
        """Whether this rank must end: a checkpoint could not be written, or another process took the run over."""
        return self.error is not None or (self.writer is not None and self.writer.lost)

    def finish(self) -> None:
        """Waits until the last checkpoint is written. Called by all ranks: where it could not be, every one ends."""
        self._join()
        if largest(self.ranks, int(self.failed)):
            self._require_writer()
            raise self.error or SystemExit(2)

    def __enter__(self) -> "RunState":
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is not KeyboardInterrupt:
            self._join()
