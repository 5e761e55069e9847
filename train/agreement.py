"""What all ranks settle before the first step: that they were started alike, and that the run is theirs alone.

Every rank computes its own learning rates, draws and views; only gradients and batch norm are shared. So ranks that
were started with different flags would train on without an error, towards weights of no recipe at all. And rank 0
alone writes, so it is the one that asks whether another training writes the same run.
"""

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from pipeline.command import REPO
from pipeline.compiled import source_digest
from pipeline.errors import UserError
from pipeline.one_writer import OneWriter
from train.config import PretrainConfig, as_plain
from train.distributed import Ranks, largest

MAY_DIFFER = ("data", "workers")  # by machine: where the images lie, whose digest is compared, and how many cores
WRITER = ".writer"
ASK_S = 1.0  # between two answers of rank 0 to the others, while it waits for another machine's sign of life


def require_same_start(ranks: Ranks, config: PretrainConfig, dataset_sha256: str) -> None:
    """Ends all ranks where they differ in a flag, in the images, or in the program. One sentence says in what."""
    if ranks.control is None:
        return
    flags = {"run": "name"}  # the field and its flag
    own = {f"--{flags.get(n, n).replace('_', '-')}": v for n, v in as_plain(config).items() if n not in MAY_DIFFER}
    own |= {"the digest of the images of --data": dataset_sha256[:12]}
    own |= {"the digest of the program": source_digest(REPO / "train") + source_digest(REPO / "pipeline")}
    own |= {"PyTorch": torch.__version__}
    found: list[dict] = [{}] * ranks.world_size
    dist.all_gather_object(found, own, group=ranks.control)
    other = [name for name in own if any(theirs.get(name) != found[0].get(name) for theirs in found)]
    if "--name" in other and len(other) > 1:  # an unnamed run is named by its flags
        other.remove("--name")
    if other or any(theirs.keys() != found[0].keys() for theirs in found):
        named = "; ".join(_by_rank(name, [theirs.get(name) for theirs in found]) for name in other)
        raise _end(
            ranks, f"the ranks were not started alike: {named or 'their flags'}; start all with the same command"
        )


def _by_rank(name: str, values: list) -> str:
    """ "--seed is 0 on ranks 0, 2 and 1 on rank 1"."""
    ranks: dict[str, list[str]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(str(value), []).append(str(rank))
    parts = (f"{value} on rank{'s' * (len(on) > 1)} {', '.join(on)}" for value, on in ranks.items())
    return f"{name} is {' and '.join(parts)}"


def _end(ranks: Ranks, sentence: str) -> BaseException:
    """How a rank ends when all end for the same reason: rank 0 says it."""
    return UserError(sentence) if ranks.rank == 0 else SystemExit(2)


@contextlib.contextmanager
def only_writer(folder: Path, ranks: Ranks, what: str) -> Iterator[OneWriter | None]:
    """The right to write a folder, `what` to a reader, on rank 0; None on the others. Nothing there is read before it.

    Ends all ranks where another process has it; rank 0 raises the UserError that names that process.
    """
    writer, error = _ask(folder, ranks, what)
    if largest(ranks, int(error is not None)):
        raise error or SystemExit(2)
    with writer or contextlib.nullcontext():
        yield writer


def _ask(folder: Path, ranks: Ranks, what: str) -> tuple[OneWriter | None, Exception | None]:
    """Rank 0 asks in a thread and tells the others every second that they are to wait.

    Watching another machine's process takes up to a minute, and a collective gives up after 2 × --timeout-minutes.
    """
    answer: list = [None, None]

    def ask() -> None:
        try:
            answer[0] = OneWriter(folder / WRITER, f"{what} {folder}")
        except Exception as refusal:  # it ends the run, on the thread that trains
            answer[1] = refusal

    if ranks.world_size == 1:
        ask()
        return tuple(answer)
    thread = threading.Thread(target=ask, name="asks for the run", daemon=True)
    if ranks.rank == 0:
        thread.start()
        thread.join(ASK_S)
    while largest(ranks, int(thread.is_alive())):
        time.sleep(0.01) if ranks.rank else thread.join(ASK_S)
    return tuple(answer)
