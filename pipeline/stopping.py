"""The signals that ask a program to stop, and what it then ends with.

    75    SIGTERM, SIGUSR1, SIGUSR2: sysexits' EX_TEMPFAIL, worth another try; the same command continues
    130   SIGINT, which is Ctrl-C

A loop grants the wish at its next step (train.distributed.StopRequest). While a program still imports what it needs, or
waits for others, there is nothing to save: with `end_at_signals` it ends at once. A worker process ends with the one
that wanted it: `end_with_parent`. Imports nothing that takes time.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
EXIT_REQUEUE, EXIT_INTERRUPTED = 75, 130

_ending = threading.Lock()


def exit_code(number: int) -> int:
    """What a program ends with that such a signal stopped."""
    return EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_REQUEUE


def end_at_signals() -> None:
    """From now on they end the process, unless somebody else handles them at the time. Called on the main thread.

    Python runs a handler once the main thread is back from whatever library it is in, and one that waits for the other
    ranks may stay there for half an hour. So a second thread hears of each signal by a pipe.
    """
    heard, told = os.pipe()
    os.set_blocking(told, False)
    signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    threading.Thread(target=_listen, args=(heard,), name="signals", daemon=True).start()
    for number in STOP_SIGNALS:
        signal.signal(number, _end)
    os.register_at_fork(after_in_child=_leave_to_parent)


def _leave_to_parent() -> None:
    """A forked child has the same pipe: a signal to it alone would end this process."""
    signal.set_wakeup_fd(-1)
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is _end:
            signal.signal(number, signal.SIG_DFL)


def end_with_parent() -> None:
    """In a process that a fork server made: it ends with the one that wanted it, however that ends.

    The fork server lives as long as its children, so it does not end them.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has one"

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, name="ends with its parent", daemon=True).start()


def _listen(heard: int) -> None:
    while True:
        for number in os.read(heard, 64):
            if signal.getsignal(number) is _end:
                _end(number, None)


def _end(number: int, _frame: FrameType | None) -> None:
    if not _ending.acquire(blocking=False):  # the other thread is at it
        return
    if os.environ.get("RANK", "0") == "0":
        name = signal.Signals(number).name
        with contextlib.suppress(OSError):
            os.write(2, f"\n{name}: no step was under way, nothing is lost; run the same command again\n".encode())
    os._exit(exit_code(number))
