"""Where the numbers of a run go beside metrics.jsonl: TensorBoard, Weights & Biases, the progress bar. On rank 0 only.

Each sink has `line` for a line of training metrics, `accuracy` for what was measured of the weights after a step, and
`close`. None of them can end a run, except that wandb must be installed if it is asked for.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from train.config import PretrainConfig, as_plain


class TensorBoard:
    """Numbers and pictures. A disk that does not take its file ends the pictures, not the run."""

    def __init__(self, folder: Path, start_step: int):
        from torch.utils.tensorboard import SummaryWriter  # a second to import, and rank 0 alone needs it

        self.board: SummaryWriter | None = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step)

    def line(self, line: Mapping[str, Any]) -> None:
        self.accuracy(line["step"], {name: value for name, value in line.items() if value is not None})

    def accuracy(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._add("add_scalar", name, value, step)

    def picture(self, name: str, pixels: torch.Tensor, step: int) -> None:
        """`pixels` (3, H, W) in [0, 1]."""
        self._add("add_image", name, pixels, step)

    def close(self) -> None:
        self._add("close")

    def _add(self, what: str, *arguments) -> None:
        try:
            if self.board:
                getattr(self.board, what)(*arguments)
        except OSError as error:
            self.board = None
            print(f"note: nothing more for TensorBoard ({error.strerror or error})", file=sys.stderr)


class Wandb:
    """A run on Weights & Biases under this run's name; a resumed run continues there."""

    def __init__(self, config: PretrainConfig):
        import wandb

        folder = Path(config.run)
        self.run = wandb.init(
            project=config.wandb, id=folder.name, name=folder.name, dir=folder, resume="allow", config=as_plain(config)
        )

    def line(self, line: Mapping[str, Any]) -> None:
        self.run.log(line, step=line["step"])

    def accuracy(self, step: int, values: Mapping[str, float]) -> None:
        # As its own step it may lie before the last line's, which is refused.
        self.run.log({**values, "knn_step": step})

    def close(self) -> None:
        self.run.finish()


class Bar:
    """The progress bar on stderr; `update` after every step. Into a file it writes a line every ten seconds."""

    def __init__(self, start_step: int, stop_step: int):
        interval_s = 0.5 if sys.stderr.isatty() else 10
        self.bar = tqdm(total=stop_step, initial=start_step, unit="step", mininterval=interval_s, dynamic_ncols=True)
        self.update, self.close = self.bar.update, self.bar.close

    def line(self, line: Mapping[str, Any]) -> None:
        speed, wait = f"{line['images_per_s']:.0f} images/s", f"{line['data_wait_share']:.0%} data wait"
        loss = "not finite" if line["loss"] is None else f"{line['loss']:.4g}"
        self.bar.set_postfix_str(f"loss {loss}, {speed}, {wait}")

    def accuracy(self, step: int, values: Mapping[str, float]) -> None:
        self.bar.set_description_str(f"kNN {values['knn_top1']:.1f} %")

    def warn(self, text: str) -> None:
        """Prints a line of its own."""
        self.bar.clear()
        print(f"warning: {text}", file=sys.stderr)
