"""Worker processes for a conversion: their results in order, and memory in which they hand bytes over.

    this process    arguments of chunk 0, 1, 2 …  ─▶  a few chunks a worker ahead  ─▶  lists in that order
    a worker        reads, checks and encodes a chunk of images, puts their bytes into the chunk's slot

What is written is what the worker read, checked and hashed, whatever happens to the file meanwhile, and no image has
to pass through a pipe.
"""

import collections
import ctypes
import mmap
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from pipeline.errors import UserError
from pipeline.stopping import end_with_parent

CHUNK_IMAGES = 32  # a worker's task
AHEAD_CHUNKS = 4  # a worker, made before they are asked for
SLOT_BYTES = 4 << 20  # for the images of one chunk
START_S = 120.0  # for the first worker to answer
_PR_SET_PDEATHSIG = 1  # prctl: the signal this process gets when its parent ends

_shared: memoryview | None = None  # in a forked worker, all slots


class Workers:
    """As a context, `count` processes; 0 is one a core. `slots` is how many chunks have a slot, one behind the other.

    Forked, they start at once with all that is loaded and compiled here. If other threads run, as torch's do, a fork
    could inherit their locks: then a fork server starts them, and without slots, as it does not share memory.
    """

    def __init__(self, count: int) -> None:
        self.count = count or len(os.sched_getaffinity(0))
        self.slots = AHEAD_CHUNKS * self.count
        try:
            self._shared = memoryview(mmap.mmap(-1, self.slots * SLOT_BYTES))
        except OSError:
            raise out_of_memory(f"for {self.slots * SLOT_BYTES >> 20} MB that the workers share") from None

    def __enter__(self) -> "Workers":
        forked = threading.active_count() == 1 and "torch" not in sys.modules
        context = multiprocessing.get_context("fork" if forked else "forkserver")
        if not forked:
            context.set_forkserver_preload(["__main__", "pipeline.convert"])
        # Ctrl-C waits until the workers, who inherit that it is blocked, are there; it is not lost meanwhile.
        mask, others = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}), multiprocessing.active_children()
        try:
            given = (os.getpid(), self._shared) if forked else (0, None)
            self._pool = ProcessPoolExecutor(self.count, context, _start_worker, given)
            self._pool.submit(os.getpid).result(START_S)
        except BrokenProcessPool:
            raise _worker_died() from None
        except (OSError, EOFError, RuntimeError) as error:  # no fork, no pipe, no thread; no answer is an OSError, too
            for started in set(multiprocessing.active_children()) - set(others):
                started.kill()  # at its end Python would wait for them
                started.join()
            raise UserError(
                f"{self.count} worker processes cannot be started ({str(error) or 'no answer'}); give fewer --workers,"
                " or raise the limits of processes, open files and memory (ulimit -u, -n and -v, or the container's)"
            ) from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        return self

    def __exit__(self, *_) -> None:
        self._pool.shutdown(cancel_futures=True)

    def in_order(self, task: Callable, arguments: Iterable[tuple]) -> Iterator[list]:
        """task(*argument), a list each, in the order of the arguments; AHEAD_CHUNKS lists a worker ahead.

        The next argument is asked for when the list before is done with.
        """
        ahead: collections.deque[Future[list]] = collections.deque()
        try:
            for argument in arguments:
                ahead.append(self._pool.submit(task, *argument))
                if len(ahead) >= self.slots:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        except BrokenProcessPool:
            raise _worker_died() from None
        except MemoryError:
            raise out_of_memory("for some of the images") from None

    def read_slot(self, slot: int, at: int, size_bytes: int) -> memoryview:
        """What a worker put there; it stays until the slot's chunk is done with."""
        start = slot * SLOT_BYTES + at
        return self._shared[start : start + size_bytes]


def write_slot(slot: int, at: int, data: bytes | memoryview) -> bool:
    """In a worker, lays bytes into a slot; False if they do not fit, or no memory is shared (a fork server's)."""
    if _shared is None or at + len(data) > SLOT_BYTES:
        return False
    start = slot * SLOT_BYTES + at
    _shared[start : start + len(data)] = data
    return True


def out_of_memory(what: str) -> UserError:
    """What a user reads if memory was short, which is never an image's fault."""
    return UserError(
        f"memory was too short {what}; run the same command again, with fewer --workers: it continues where it stopped"
    )


class WorkerDiedError(UserError):
    """A worker process was killed, or has crashed."""


def _worker_died() -> UserError:
    return WorkerDiedError(
        "a worker process was killed, most likely because memory ran out; run the same command again, with fewer"
        " --workers: it continues where it stopped"
    )


def _start_worker(forked_by: int, shared: memoryview | None) -> None:
    """Leaves Ctrl-C to the process that wanted this one, and ends with it, however that ends."""
    global _shared
    _shared = shared
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")  # Pillow's, about damaged metadata of images that are fine
    if not forked_by:  # but made by a fork server
        end_with_parent()
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != forked_by:
        os._exit(1)
