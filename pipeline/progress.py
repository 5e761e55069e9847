"""How far a long job is, on stderr: tqdm's bar on a terminal, plain lines in a file or a pipe.

    train.beton: image 12000 of 50000, 1100 a second, 35 s left            a line every few minutes
    epoch 3 of 300: step 3750 of 375000, loss 812, 2770 images/s, 1 % data wait, 38 h 20 min left

The environment's TQDM_DISABLE=1 turns both off. Of the processes that torchrun starts on a machine, the first one shows
its progress.
"""

import os
import sys
import time
from collections.abc import Iterable, Iterator

from tqdm import tqdm

LINE_S = 120.0  # between two lines
tqdm.monitor_interval = 0  # its thread would keep the converter's workers from being forked


def progress(
    items: Iterable | None,
    what: str,
    total: int,
    *,
    unit: str,
    done: int = 0,
    delay_s: float = 0,
    line_every: int = 0,
) -> "tqdm | Lines":
    """Shows how many of `total` units are done; `what` is being made. Over `items`, or with `update` after each unit.

    `done` of them were done before. On a terminal nothing is shown in the first `delay_s`; elsewhere a line also
    follows each multiple of `line_every` units.
    """
    hidden = os.environ.get("LOCAL_RANK", "0") != "0"
    if sys.stderr is None or not sys.stderr.isatty():  # None: it is closed
        hidden = hidden or bool(os.environ.get("TQDM_DISABLE"))
        return Lines(items, what, total, unit=unit, done=done, line_every=line_every, hidden=hidden)
    how = {"unit": unit, "initial": done, "delay": delay_s, "dynamic_ncols": True, "mininterval": 0.5, "miniters": 1}
    return tqdm(items, what, total, **how, **({"disable": True} if hidden else {}))


def say_line(text: str) -> None:
    """Prints a line to stderr, above the bar if there is one."""
    tqdm.write(text, file=sys.stderr)


def duration_text(seconds: float) -> str:
    """The two largest units: 38 h 20 min, 3 min 5 s, 12 s."""
    whole = round(seconds)
    parts = ((whole // 3600, "h"), (whole // 60 % 60, "min"), (whole % 60, "s"))
    first = next((i for i, (count, _) in enumerate(parts) if count), len(parts) - 1)
    return " ".join(f"{count} {unit}" for count, unit in parts[first : first + 2] if count or first == len(parts) - 1)


class Lines:
    """What stands in for tqdm's bar where there is no terminal, with the methods that are called of it here."""

    def __init__(
        self, items: Iterable | None, what: str, total: int, *, unit: str, done: int, line_every: int, hidden: bool
    ):
        self.items, self.what, self.total, self.unit, self.n = items, what, total, unit, done
        self.line_every, self.hidden = line_every, hidden
        self.postfix, self.said_s = "", time.monotonic()
        self.since: tuple[int, float] | None = None  # units and time at the last line; before it, at the first unit

    def __iter__(self) -> Iterator:
        for item in self.items or ():
            yield item
            self.update()

    def update(self, units: int = 1) -> None:
        """Counts, and prints a line if the last one is long ago."""
        self.n += units
        if time.monotonic() - self.said_s >= LINE_S or (self.line_every and self.n % self.line_every == 0):
            self.say()
        elif self.since is None:  # the first one may have waited for a compiler: its time says nothing of the others'
            self.since = self.n, time.monotonic()

    def say(self) -> None:
        """Prints a line now. Speed and time left are those of the work since the last one."""
        now_s = time.monotonic()
        n, then_s = self.since or (self.n, now_s)
        per_s = (self.n - n) / max(now_s - then_s, 1e-9)
        self.since, self.said_s = (self.n, now_s), now_s
        if self.hidden:
            return
        about = [f"{self.unit} {self.n} of {self.total}"]
        if self.postfix or per_s:
            about.append(self.postfix or f"{per_s:.4g} a second")
        if per_s and self.n < self.total:
            about.append(f"{duration_text((self.total - self.n) / per_s)} left")
        say_line(f"{self.what}: {', '.join(about)}" if self.what else ", ".join(about))

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        """What else a line says, in place of the speed in units."""
        self.postfix = text

    def set_description_str(self, text: str, refresh: bool = True) -> None:
        """What a line begins with."""
        self.what = text

    def close(self) -> None:
        """Prints nothing: whoever does the work says what came of it."""

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *_) -> None:
        self.close()
