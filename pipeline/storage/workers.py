"""Worker processes for a conversion: their results in order, and memory in which they hand bytes over.

    this process    arguments of chunk 0, 1, 2 …  ─▶  a few chunks a worker ahead  ─▶  lists in that order
    a worker        reads, checks and encodes a chunk of images, puts their bytes into the chunk's slot

What is written is what the worker read, checked and hashed, whatever happens to the file meanwhile, and no image has
to pass through a pipe.
"""

import collections
import contextlib
import ctypes
import mmap
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from pipeline.errors import UserError

AHEAD_CHUNKS = 4  # a worker, made before they are asked for
SLOT_BYTES = 4 << 20  # for the images of one chunk
_PR_SET_PDEATHSIG = 1  # prctl: the signal this process gets when its parent ends

_shared: memoryview | None = None  # all slots, where workers are forked from a process that has them


def _start_worker(forked_by: int) -> None:
    """Leaves Ctrl-C to the process that wanted this one, and ends with it, however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")  # Pillow's, about damaged metadata of images that are fine
    if not forked_by:  # made by a fork server, which itself lives as long as its children
        threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != forked_by:
        os._exit(1)


def _end_with(process) -> None:
    process.join()
    os._exit(1)


@contextlib.contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Worker processes. Forked, they start at once with all that is loaded and compiled here.

    Where other threads run, as torch's do, a fork could inherit their locks: then a fork server starts them.
    """
    forked = threading.active_count() == 1 and "torch" not in sys.modules
    context = multiprocessing.get_context("fork" if forked else "forkserver")
    if not forked:
        context.set_forkserver_preload(["__main__", "pipeline.convert"])
    # Ctrl-C waits until the workers, who inherit that it is blocked, are there; it is not lost meanwhile.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    pool = ProcessPoolExecutor(workers, context, _start_worker, (os.getpid() if forked else 0,))
    try:
        try:
            pool.submit(os.getpid).result()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        yield pool
    except BrokenProcessPool:
        raise UserError(
            "a worker process died, of too little memory perhaps; run the same command again, with fewer --workers:"
            " it continues where it stopped"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _count(workers: int) -> int:
    """0 is one a core."""
    return workers or len(os.sched_getaffinity(0))


def in_order(workers: int, task: Callable, arguments: Iterable[tuple]) -> Iterator[list]:
    """task(*argument), a list each, in the order of the arguments; AHEAD_CHUNKS lists a worker ahead.

    The next argument is asked for when the list before is done with.
    """
    ahead = collections.deque()
    with _pool(_count(workers)) as pool:
        for argument in arguments:
            ahead.append(pool.submit(task, *argument))
            if len(ahead) >= AHEAD_CHUNKS * _count(workers):
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


@contextlib.contextmanager
def shared_slots(workers: int) -> Iterator[int]:
    """How many slots the workers have that are forked in this context: one for each chunk that is not yet done with."""
    global _shared
    count = AHEAD_CHUNKS * _count(workers)
    try:
        _shared = memoryview(mmap.mmap(-1, count * SLOT_BYTES))
    except OSError:
        raise out_of_memory(f"for {count * SLOT_BYTES >> 20} MB that the workers share") from None
    try:
        yield count
    finally:
        _shared = None


def write_slot(slot: int, at: int, data: bytes) -> bool:
    """In a worker, lays bytes into a slot; False where they do not fit, or no memory is shared (a fork server's)."""
    if _shared is None or at + len(data) > SLOT_BYTES:
        return False
    start = slot * SLOT_BYTES + at
    _shared[start : start + len(data)] = data
    return True


def read_slot(slot: int, at: int, size_bytes: int) -> memoryview:
    """What a worker put there; it stays until the slot's chunk is done with."""
    start = slot * SLOT_BYTES + at
    return _shared[start : start + size_bytes]


def out_of_memory(what: str) -> UserError:
    """What a user reads where memory was short, which is never an image's fault."""
    return UserError(
        f"memory was too short {what}; run the same command again, with fewer --workers: it continues where it stopped"
    )
