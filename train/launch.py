"""How the processes of one training find each other: what the launcher told this one, and what is said if they do not.

    RANK, WORLD_SIZE          which of how many processes this is; without both it is the only one
    LOCAL_RANK                which GPU of this machine is its own; without it the first
    MASTER_ADDR, MASTER_PORT  where rank 0 listens

torchrun and scripts/pretrain.slurm set them.
"""

import contextlib
import os
import re
import threading
from collections.abc import Iterator

import torch.distributed as dist

from pipeline.errors import UserError
from pipeline.progress import say_line

WAIT_SAID_S = 30.0  # after which a process says that it waits for the others
SET_THEM = "torchrun and scripts/pretrain.slurm set it; to run one process alone, unset RANK, WORLD_SIZE and LOCAL_RANK"


def _number(name: str, least: int, most: int, default: int | None = None, *, of: str = "") -> int:
    """A whole number in the environment. Raises UserError for none, unless there is a default, and for any other."""
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    with contextlib.suppress(TypeError, ValueError):
        if least <= (number := int(text)) <= most:  # type: ignore[arg-type]  # None is no number
            return number
    found = "is not set" if text is None else f"is {text!r}"
    raise UserError(f"{name} {found}; expected a whole number from {least} to {most}{of}; {SET_THEM}")


def rank_and_world_size() -> tuple[int, int]:
    """Which process this is, of how many. Raises UserError where the environment does not say it."""
    world_size = _number("WORLD_SIZE", 1, 1_000_000, 1)
    rank = _number("RANK", 0, world_size - 1, 0 if world_size == 1 else None, of=f", as WORLD_SIZE is {world_size}")
    return rank, world_size


def own_gpu(gpus: int) -> int:
    """The number of this process's GPU, of so many. Raises UserError for one that is not here."""
    return _number("LOCAL_RANK", 0, gpus - 1, 0, of=f", as PyTorch sees {gpus} GPU{'s' * (gpus > 1)} here")


@contextlib.contextmanager
def finding_each_other(rank: int, world_size: int, minutes: float) -> Iterator[None]:
    """The processes connect inside, within so many minutes. Says so if that takes long.

    Raises UserError where they do not, or where the environment does not say where to meet.
    """
    port = _number("MASTER_PORT", 1, 65535, of=", the port where rank 0 listens")
    address = os.environ.get("MASTER_ADDR", "").strip()
    if not address:
        raise UserError(f"MASTER_ADDR is not set; expected the name or address of rank 0's machine; {SET_THEM}")
    place = f"MASTER_ADDR={address} MASTER_PORT={port}"
    text = f"note: rank {rank} of {world_size} still waits for the others at {place}, for at most {minutes:.3g} minutes"
    waits = threading.Timer(WAIT_SAID_S, say_line, [text])
    waits.daemon = True
    waits.start()
    try:
        yield
    except RuntimeError as error:  # what all of PyTorch's networks raise
        if "EADDRINUSE" in str(error) or "already in use" in str(error):
            raise UserError(
                f"MASTER_PORT {port} is in use on this machine, by another training perhaps; give all ranks another one"
                " (torchrun --master-port)"
            ) from error
        raise UserError(
            f"rank {rank} of {world_size} did not find the others at {place} ({_said(error)}; the limit was"
            f" {minutes:.3g} minutes); start all ranks, with the address of rank 0's machine and a port that no"
            " firewall closes"
        ) from error
    finally:
        waits.cancel()


def lost_rank(error: RuntimeError, rank: int) -> UserError | None:
    """The sentence for an error that only says that another rank, or the way to it, is gone; None for any other.

    gloo's errors have no class of their own, but name the place in gloo's code.
    """
    if not isinstance(error, dist.DistError) and "/gloo/" not in str(error):
        return None
    return UserError(
        f"rank {rank} lost the connection to another rank, which ended, or its machine did; what that one said is"
        f" above, or in its own log ({_said(error)}); the same command continues from the last checkpoint"
    )


def _said(error: RuntimeError) -> str:
    """What PyTorch says, in one line, without its place in C++ and its advice."""
    text = re.sub(r"^\[\S+/gloo/\S+\] ", "", " ".join(str(error).split()))
    return re.split(r"Exception raised from|\.? This is typically caused by", text)[0][:300].strip()
