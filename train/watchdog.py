"""A rank that waits too long for another one ends the run and names the rank that it waited for.

A collective that never completes looks the same from inside whatever the cause, and with NCCL the waiting rank may
not even return to Python. So each rank has a thread that tells the others, through torchrun's store, that it runs
and how many steps it has begun:

    rank 0  step 57, beat 812        rank 2  step 57, beat 811
    rank 1  step 57, beat 815        rank 3  step 56, beat 214 and no more     ← stopped, or its machine is gone
"""

import os
import sys
import threading
import time
from datetime import timedelta

import torch.distributed as dist

from train.distributed import Ranks, start_number

BEAT_S = 5.0
EXIT_STUCK = 1


def culprits(before: dict[int, tuple[int, int]], after: dict[int, tuple[int, int]]) -> str:
    """Which ranks are waited for, in words. By rank: (steps begun, beats) at two moments some beats apart."""
    silent = [rank for rank in after if after[rank] == before[rank]]
    furthest = max(step for step, _ in after.values())
    behind = [rank for rank in after if after[rank][0] < furthest]
    if silent:
        steps = ", ".join(str(after[rank][0]) for rank in silent)
        return f"{named(silent)} no longer runs (stopped, or its machine is gone; last seen in step {steps})"
    if behind:
        steps = ", ".join(str(after[rank][0]) for rank in behind)
        return f"{named(behind)} runs but got no further than step {steps} (its data, or its disk?)"
    return "every rank runs and waits in the same step (the network between them, or different code?)"


def named(ranks: list[int]) -> str:
    """ "rank 3", or "each of the ranks 1, 3"."""
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"each of the ranks {', '.join(map(str, ranks))}"


class Watchdog:
    """As a context, watches the time between calls of `step`. Does nothing at world size 1 or with `minutes` 0."""

    def __init__(self, ranks: Ranks, minutes: float, beat_s: float = BEAT_S):
        self.ranks, self.limit_s = ranks, minutes * 60
        self.beat_s = min(beat_s, self.limit_s / 4)
        self.active = ranks.world_size > 1 and minutes > 0
        self.begun, self.since = 0, time.monotonic()
        self.beats, self.ended = 0, threading.Event()

    def step(self, step: int) -> None:
        """Called when step number `step` (from 0) begins: its batch is there, its first collective is to come."""
        self.begun, self.since = step + 1, time.monotonic()

    def __enter__(self) -> "Watchdog":
        if self.active:
            self.since = time.monotonic()
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            # A connection of its own: the process group's is busy for as long as that one waits.
            store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=max(1, 2 * self.beat_s)))
            self.store = dist.PrefixStore(f"watchdog {start_number()}", store)
            self._beat()
            self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        if self.active:
            self.ended.set()
            self.thread.join()

    def _beat(self) -> None:
        self.beats += 1
        self.store.set(f"rank {self.ranks.rank}", f"{self.begun} {self.beats}")

    def _watch(self) -> None:
        while not self.ended.wait(self.beat_s):
            try:
                self._beat()
                if time.monotonic() - self.since > self.limit_s:
                    before = self._all()
                    for _ in range(3):
                        time.sleep(self.beat_s)
                        self._beat()
                    self._end(culprits(before, self._all()))
            except (RuntimeError, ConnectionError) as error:  # the store no longer answers: its host is the lost one
                if time.monotonic() - self.since > self.limit_s:
                    self._end(
                        f"the store at {os.environ['MASTER_ADDR']} does not answer ({str(error).splitlines()[0]})"
                    )

    def _all(self) -> dict[int, tuple[int, int]]:
        """By rank: (steps begun, beats); (0, 0) for one that has not come so far."""
        found = {}
        for rank in range(self.ranks.world_size):
            key = f"rank {rank}"
            text = self.store.get(key).decode() if self.store.check([key]) else "0 0"
            steps, beats = map(int, text.split())
            found[rank] = steps, beats
        return found

    def _end(self, reason: str) -> None:
        if self.ended.is_set():
            return
        print(
            f"\nerror: rank {self.ranks.rank} waited {self.limit_s / 60:.3g} minutes in step {self.begun}: {reason}; "
            "the same command continues from the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        os._exit(EXIT_STUCK)  # the thread that trains may be inside a call that never returns
