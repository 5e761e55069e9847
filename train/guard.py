"""Updates that are not finite: what --on-nan skip leaves out, and which images a lost step had.

A loss or gradient that is not finite stays so in every weight it reaches. By default the run then ends
(train/runlog.py, which reads the losses a few steps later, without waiting for the device). With --on-nan skip
every step asks before its update, at one host sync, and a lost one leaves no trace: the optimizer does not step,
and the buffers (batch norm's running statistics) are put back.
"""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from pipeline.choices.order import shuffled_batches
from pipeline.disk import write_whole
from pipeline.errors import UserError
from train.config import PretrainConfig, order_blocks
from train.distributed import Ranks, say

MOST_IN_A_ROW = 10  # skipped updates after which the weights, not a batch, must be the cause


def samples_of_step(config: PretrainConfig, ids: np.ndarray, step: int) -> np.ndarray:
    """Sample ids (global batch,) of a step counted from 0, those of all ranks; `ids` are the samples in use."""
    blocks = order_blocks(config)
    return next(shuffled_batches(config.seed, ids, config.global_batch, 0, 1, step, step + 1, blocks))[2]


def note_lost_step(config: PretrainConfig, ids: np.ndarray, step: int) -> str:
    """Writes the sample ids of a step (from 0) into the run's folder, one a line; a phrase that says so."""
    lost = samples_of_step(config, ids, step)
    path = Path(config.run) / f"lost-step-{step + 1}.txt"
    told = f"its {len(lost)} images, {', '.join(map(str, lost[:4]))}, …, are listed in"
    try:
        write_whole(path, "".join(f"{sample}\n" for sample in lost))
    except UserError:
        return f"{told} (not written)"
    return f"{told} {path}"


class UpdateGuard:
    """Asked once a step on every rank; the answer is the same on all, since loss and gradients are."""

    def __init__(self, method: nn.Module, config: PretrainConfig, ranks: Ranks, *, ids: np.ndarray):
        self.active = config.on_nan == "skip"
        self.config, self.ranks, self.ids = config, ranks, ids
        self.parameters = [p for p in method.parameters() if p.requires_grad]
        self.buffers = list(method.buffers())
        self.in_a_row = 0

    @torch.no_grad()
    def before_step(self) -> None:
        """Keeps a copy of the buffers, which a forward pass changes."""
        if self.active:
            self.kept = [buffer.clone() for buffer in self.buffers]

    @torch.no_grad()
    def keeps(self, loss: torch.Tensor, step: int) -> bool:
        """Whether the update of this step is to be made. Raises UserError after MOST_IN_A_ROW that are not.

        loss is 0-d and equal on all ranks. With fp16 the gradients are the loss scaler's to judge.
        """
        if not self.active:
            return True
        values = [loss]
        if self.config.amp != "fp16":
            values += torch._foreach_norm([p.grad for p in self.parameters if p.grad is not None])
        if torch.stack([value.float() for value in values]).isfinite().all():
            self.in_a_row = 0
            return True
        for buffer, kept in zip(self.buffers, self.kept, strict=True):
            buffer.copy_(kept)
        self.in_a_row += 1
        what = f"loss {loss.item():.4g}" if not loss.isfinite() else "a gradient that is not finite"
        if self.ranks.rank == 0:
            say(self.ranks, f"step {step + 1} left out: {what}; {note_lost_step(self.config, self.ids, step)}")
        if self.in_a_row == MOST_IN_A_ROW:
            raise UserError(
                f"{MOST_IN_A_ROW} steps in a row, up to {step + 1}, had no finite loss and gradient; "
                "lower --lr-weights and --lr-biases, lengthen --warmup-epochs or try --amp off"
            )
        return False
