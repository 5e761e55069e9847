"""Rank, world size and the sums over ranks. A single process is world size 1 and starts no process group.

Gradients. DistributedDataParallel averages gradients over ranks, so the objective is the mean of the ranks'
losses. `sum_over_ranks` is the sum that autograd sees: the gradient of what one rank put in is the sum of the
gradients of what every rank took out. With both, one update is the same at any world size.
"""

import contextlib
import os
import signal
from collections.abc import Iterator
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.progress import say_line
from pipeline.stopping import STOP_SIGNALS
from train.launch import finding_each_other, lost_rank, own_gpu, rank_and_world_size

TIMEOUT = timedelta(minutes=30)
FAILED = 1000  # above every signal's number: a failure outranks them


class Ranks(NamedTuple):
    """Which process this is. `control` is a CPU group for small messages, None at world size 1."""

    rank: int
    world_size: int
    device: torch.device
    control: dist.ProcessGroup | None


def start_ranks(timeout_minutes: float = 0) -> Ranks:
    """Joins the processes that torchrun (or SLURM with the same variables) started; NCCL on GPUs, gloo on CPUs.

    A collective gives up after `timeout_minutes`; 0 for `TIMEOUT`. Raises UserError for variables that cannot be, and
    where the ranks do not find each other in that time.
    """
    timeout = timedelta(minutes=timeout_minutes) or TIMEOUT
    rank, world_size = rank_and_world_size()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", own_gpu(torch.cuda.device_count()))
        torch.cuda.set_device(device)
    if world_size == 1:
        return Ranks(0, 1, device, None)
    with finding_each_other(rank, world_size, timeout.total_seconds() / 60):
        store, *_ = next(dist.rendezvous("env://", timeout=timeout))
        store = dist.PrefixStore(f"start {start_number()}", store)
        backend, on = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout, device_id=on)
        control = dist.new_group(backend="gloo", timeout=timeout)
    assert isinstance(control, dist.ProcessGroup), "every rank is in the group of all"
    return Ranks(rank, world_size, device, control)


@contextlib.contextmanager
def joined_ranks(timeout_minutes: float = 0) -> Iterator[Ranks]:
    """`start_ranks`, and `stop_ranks` at the end. Where another rank is lost meanwhile, a UserError says so."""
    ranks = start_ranks(timeout_minutes)
    try:
        yield ranks
    except RuntimeError as error:
        if (lost := lost_rank(error, ranks.rank)) is None:
            raise
        raise lost from error
    finally:
        stop_ranks()


def start_number() -> str:
    """Tells apart the starts that share one store: torchrun's own outlives a restart, with the last one's addresses.

    Where rank 0 makes the store (SLURM, several machines) it is a new one each time; and there a machine that came
    back counts its starts from 0 again.
    """
    kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if kept else "0"


def stop_ranks() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's number among them."""
    return dist.get_rank() if dist.is_initialized() else 0


def say(ranks: Ranks, text: str) -> None:
    """Prints on rank 0, to stderr: stdout is for results."""
    if ranks.rank == 0:
        say_line(text)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return grad


def sum_over_ranks(x: torch.Tensor) -> torch.Tensor:
    """The sum of every rank's x, any shape, differentiable; x itself at world size 1."""
    return x if world_size() == 1 else _Sum.apply(x)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return grad.chunk(world_size())[rank()]


def gather_over_ranks(x: torch.Tensor) -> torch.Tensor:
    """Every rank's x (B, …), rank after rank, differentiable: (global batch, …); x itself at world size 1."""
    return x if world_size() == 1 else _Gather.apply(x)


def mean_over_ranks(metrics: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """0-d tensors of this rank → their means over ranks, not seen by autograd, in one message."""
    if world_size() == 1:
        return {name: value.detach() for name, value in metrics.items()}
    values = torch.stack([value.detach() for value in metrics.values()])
    dist.all_reduce(values)
    return dict(zip(metrics, (values / world_size()).unbind(), strict=True))


def largest(ranks: Ranks, value: int) -> int:
    """The largest of the ranks' values, through the control group; waits for every rank."""
    return _reduced(ranks, value, dist.ReduceOp.MAX)


def total(ranks: Ranks, value: int) -> int:
    """The sum of the ranks' values, through the control group; waits for every rank."""
    return _reduced(ranks, value, dist.ReduceOp.SUM)


def _reduced(ranks: Ranks, value: int, operation: dist.ReduceOp.RedOpType) -> int:
    if ranks.control is None:
        return value
    message = torch.tensor([value])
    dist.all_reduce(message, operation, group=ranks.control)
    return int(message)


def averaging_gradients(module: nn.Module, ranks: Ranks) -> nn.Module:
    """`module` in a DistributedDataParallel, whose backward pass averages the gradients; itself at world size 1."""
    if ranks.world_size == 1:
        return module
    devices = [ranks.device] if ranks.device.type == "cuda" else None
    wrapped = DistributedDataParallel(module, device_ids=devices, gradient_as_bucket_view=True)
    wrapped.broadcast_buffers = False  # batch norm's are equal on all ranks
    return wrapped


class StopRequest:
    """The STOP_SIGNALS as a wish to stop that all ranks grant at the same step.

    A signal may reach the ranks in different steps, and one that stopped alone would leave the others waiting
    in a collective. So every step each rank sends its wish without waiting, and acts on the answer to the wish
    sent a step before. A rank in which something failed wishes so too. A second SIGINT ends the process at once.
    The first signal is answered on rank 0 with a line.
    """

    def __init__(self, ranks: Ranks):
        self.ranks = ranks
        self.signal = 0
        self.pending: tuple[torch.Tensor, dist.Work] | None = None
        self.previous = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}

    def _note(self, number, frame):
        if not self.signal and self.ranks.rank == 0:
            again = "; another Ctrl-C ends at once" if number == signal.SIGINT else ""
            text = f"\n{signal.Signals(number).name}: the step under way ends, then a checkpoint is written{again}\n"
            with contextlib.suppress(OSError):
                os.write(2, text.encode())  # a print could be interrupted by this very signal within another print
        self.signal = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def agreed(self, failed: bool = False) -> int:
        """Called by every rank once a step: 0, or the number of the signal on which all stop now, or FAILED."""
        wish = FAILED if failed else int(self.signal)
        if self.ranks.control is None:
            return wish
        answer = 0
        if self.pending is not None:
            message, work = self.pending
            work.wait()
            answer = int(message)
        message = torch.tensor([wish])
        self.pending = message, dist.all_reduce(message, dist.ReduceOp.MAX, group=self.ranks.control, async_op=True)
        return answer

    def __enter__(self) -> "StopRequest":
        return self

    def __exit__(self, error, *_) -> None:
        if self.pending is not None and error is None:  # after an error the other ranks may never answer
            self.pending[1].wait()
        for number, handler in self.previous.items():
            signal.signal(number, handler)
