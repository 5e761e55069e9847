"""Where the numbers of a run go beside metrics.jsonl: TensorBoard, Weights & Biases, the progress bar. On rank 0 only.

Each sink has `line` for a line of training metrics, `accuracy` for what was measured of the weights after a step, and
`close`. None of them can end a run, except that wandb must be installed if it is asked for.
"""

import contextlib
import math
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from pipeline.progress import progress, say_line
from train.config import PretrainConfig, as_plain
from train.curves import GROUPS

# In which group TensorBoard and Weights & Biases show a number of metrics.jsonl; all others are parts of the loss.
GROUP_OF = {
    **dict.fromkeys(GROUPS["Collapse"], "collapse"),
    **dict.fromkeys((*GROUPS["Speed"], "substituted_images"), "speed"),
    **dict.fromkeys(("knn_top1", "linear_top1", "knn_images"), "knn"),
}


def grouped(values: Mapping[str, float | None]) -> dict[str, float]:
    """The numbers by the names that charts have: lr/weights, loss/on_diagonal. Step and epoch are axes, not numbers."""
    named = {}
    for name, value in values.items():
        group, own = ("lr", name.removeprefix("lr_")) if name.startswith("lr_") else (GROUP_OF.get(name, "loss"), name)
        if name not in ("step", "epoch") and value is not None:
            named[f"{group}/{own}"] = value
    return named


class TensorBoard:
    """Numbers and pictures. A disk that does not take its file ends the pictures, not the run.

    TensorBoard writes in a thread of its own. What the disk says there it says again at the next call, so that thread's
    traceback is left out.
    """

    def __init__(self, folder: Path, start_step: int):
        from torch.utils.tensorboard import SummaryWriter  # a second to import, and rank 0 alone needs it

        self.board: SummaryWriter | None = None
        self.usual_hook, threading.excepthook = threading.excepthook, self._thread_ended
        with self._disk_may_refuse():
            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1)

    def line(self, line: Mapping[str, Any]) -> None:
        self.accuracy(line["step"], line)

    def accuracy(self, step: int, values: Mapping[str, float | None]) -> None:
        for name, value in grouped(values).items():
            self._add("add_scalar", name, value, step)

    def picture(self, name: str, pixels: torch.Tensor, step: int) -> None:
        """`pixels` (3, H, W) in [0, 1]."""
        self._add("add_image", name, pixels, step)

    def close(self) -> None:
        self._add("close")
        threading.excepthook = self.usual_hook

    def _add(self, what: str, *arguments) -> None:
        if self.board:
            with self._disk_may_refuse():
                getattr(self.board, what)(*arguments)

    @contextlib.contextmanager
    def _disk_may_refuse(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.board = None
            say_line(f"note: nothing more for TensorBoard ({error.strerror or error})")

    def _thread_ended(self, about: threading.ExceptHookArgs) -> None:
        if not (isinstance(about.exc_value, OSError) and type(about.thread).__name__ == "_AsyncWriterThread"):
            self.usual_hook(about)


class Wandb:
    """A run on Weights & Biases under this run's name; a resumed run continues there."""

    def __init__(self, config: PretrainConfig):
        import wandb

        folder = Path(config.run)
        self.run = wandb.init(
            project=config.wandb, id=folder.name, name=folder.name, dir=folder, resume="allow", config=as_plain(config)
        )

    def line(self, line: Mapping[str, Any]) -> None:
        self.run.log(grouped(line) | {"epoch": line["epoch"]}, step=line["step"])

    def accuracy(self, step: int, values: Mapping[str, float]) -> None:
        # As its own step it may lie before the last line's, which is refused.
        self.run.log(grouped(values) | {"knn/step": step})

    def close(self) -> None:
        self.run.finish()


class Bar:
    """How far the run is, on stderr: a bar on a terminal, else a line after every epoch and every few minutes."""

    def __init__(self, start_step: int, stop_step: int, steps_per_epoch: int):
        self.bar = progress(None, "", stop_step, unit="step", done=start_step, line_every=steps_per_epoch)
        self.steps_per_epoch, self.epochs = steps_per_epoch, stop_step // steps_per_epoch
        self.close = self.bar.close

    def update(self, step: int) -> None:
        """After step number `step`, counted from 1."""
        self.bar.set_description_str(f"epoch {math.ceil(step / self.steps_per_epoch)} of {self.epochs}", refresh=False)
        self.bar.update()

    def line(self, line: Mapping[str, Any]) -> None:
        speed, wait = f"{line['images_per_s']:.0f} images/s", f"{line['data_wait_share']:.0%} data wait"
        loss = "not finite" if line["loss"] is None else f"{line['loss']:.4g}"
        self.bar.set_postfix_str(f"loss {loss}, {speed}, {wait}")

    def accuracy(self, step: int, values: Mapping[str, float]) -> None:
        linear = f", linear {values['linear_top1']:.1f} %" if "linear_top1" in values else ""
        say_line(f"kNN top-1 {values['knn_top1']:.1f} %{linear} after epoch {step / self.steps_per_epoch:g}")
