"""Only one process at a time writes a dataset or a run: a small file says which. A second one is refused while the
first one lives, and takes over from one that has died.

This works on network disks without file locks: creating a file that must not be there yet is enough.
"""

import contextlib
import errno
import json
import os
import sys
import threading
import time
import uuid
from pathlib import Path

from pipeline.disk import REFUSED
from pipeline.errors import UserError

BEAT_S = 10.0  # between two signs of life of a writer
WATCH_S = 60.0  # without a sign of life, seen from another machine, after which a writer is taken for dead


class BusyError(UserError):
    """Another process lives that has the right to write."""


class OneWriter:
    """As a context, the right to write what `what` names; the file `path` stands for it and says who has it.

    On one machine the file tells at once whether its process still runs. Of a process on another machine only the
    file's time tells, which a thread of that process sets every BEAT_S: a second process watches it for WATCH_S.
    Raises BusyError, a UserError, if the first process lives.
    """

    def __init__(self, path: Path, what: str):
        self.path, self.what = path, what
        self.lost, self._ended, self._shown_s = False, threading.Event(), _clock_s()
        about = {"host": os.uname().nodename, "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        about |= {"machine": _machine(), "started": _process_start(os.getpid()), "token": uuid.uuid4().hex}
        self._pid, self._content = os.getpid(), json.dumps(about).encode()
        try:
            while not self._create(path):
                if self._took_over():
                    break
        except OSError as error:
            raise UserError(f"could not write {path}: {error.strerror}; make room, or choose another place") from error
        self._thread = threading.Thread(target=self._beat, name="one writer", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # no more threads are allowed
            path.unlink(missing_ok=True)
            raise

    def __enter__(self) -> "OneWriter":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def require(self) -> None:
        """Raises UserError if another process took over meanwhile, because this one had stood still for long.

        Called before each write: it asks the disk only if the last sign of life is old enough for that.
        """
        if _clock_s() - self._shown_s > WATCH_S / 3:
            self._look()
        if self.lost:
            raise UserError(f"another process took over {self.what} while this one stood still; this one ends here")

    def close(self) -> None:
        """Lets others write. Called in a forked child, it does nothing."""
        if os.getpid() != self._pid:
            return
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            if self.path.read_bytes() == self._content:
                self.path.unlink()

    def _create(self, path: Path) -> bool:
        """Whether a file `path` of ours is new there; False if there is one. With hard links it appears whole.

        Raises OSError.
        """
        own = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
        try:
            _write_new(own, self._content)
            try:
                os.link(own, path)
            except OSError as error:
                if error.errno not in (*REFUSED, errno.EMLINK):
                    raise
                _write_new(path, self._content)
        except FileExistsError:
            return False
        finally:
            with contextlib.suppress(OSError):
                own.unlink()
        return True

    def _took_over(self) -> bool:
        """Replaces a dead writer's file by ours. False if that is not done yet; UserError if the writer lives.

        Of several that find it dead, the one that has the file .next replaces it, if it is still the dead one's: so no
        living writer's file is ever taken away.
        """
        seen = _content_and_time(self.path)
        if seen is None:
            return False
        if seen[0] == self._content:
            return True
        if self._lives(self.path, seen):
            about = _parsed(seen[0])
            named = f"process {about['pid']} on {about['host']}, since {about['since']}" if about else "another process"
            raise BusyError(f"{self.what} is being written by {named}; wait for it, stop it, or choose another place")
        following = self.path.with_name(f"{self.path.name}.next")
        if not self._create(following):
            time.sleep(0.01)
            if (other := _content_and_time(following)) and not self._lives(following, other):
                following.unlink(missing_ok=True)
            return False
        found = _content_and_time(self.path)
        if found is None or found[0] != seen[0]:
            following.unlink(missing_ok=True)
            return False
        with contextlib.suppress(FileNotFoundError):  # a dead one's .next was removed, and this one in its place
            os.replace(following, self.path)
        found = _content_and_time(self.path)
        return found is not None and found[0] == self._content

    def _lives(self, path: Path, seen: tuple[bytes, int]) -> bool:
        """Whether the process that wrote this content of `path`, with this time, runs."""
        about = _parsed(seen[0])
        if about.get("machine") == _machine():
            return about.get("started") is not None and _process_start(about.get("pid")) == about["started"]
        where = about.get("host", "another machine")
        print(
            f"note: {self.what} was being written on {where}; waiting {WATCH_S:.0f} s for a sign of life",
            file=sys.stderr,
        )
        end = time.monotonic() + WATCH_S
        while time.monotonic() < end:
            time.sleep(min(1.0, WATCH_S / 10))
            found = _content_and_time(path)
            if found is None or found[0] != seen[0]:
                return False  # whoever wrote the other one is judged by the next look
            if found[1] != seen[1]:
                return True
        return False

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_S):
            self._look()

    def _look(self) -> None:
        """Shows that this process lives, if the file is still its own."""
        with contextlib.suppress(OSError):  # a disk that does not answer now will at another beat
            now_s, found = _clock_s(), _content_and_time(self.path)
            if found is not None and found[0] != self._content:
                self.lost = True
            elif found is not None:
                os.utime(self.path)
                self._shown_s = now_s
            elif self._create(self.path):
                self._shown_s = now_s


def _write_new(path: Path, content: bytes) -> None:
    """Raises FileExistsError if there is such a file, OSError if the disk does not take it."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        if os.write(fd, content) < len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError:
        path.unlink()
        raise
    finally:
        os.close(fd)


def _content_and_time(path: Path) -> tuple[bytes, int] | None:
    """Opened each time: a network disk asks its server for the time of a file that is opened, not of one looked at."""
    try:
        with open(path, "rb") as file:
            return file.read(), os.fstat(file.fileno()).st_mtime_ns
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ESTALE):  # the latter: removed on another machine meanwhile
            raise
        return None


def _parsed(content: bytes) -> dict:
    """Who writes; {} if the file was never finished."""
    try:
        about = json.loads(content)
        return about if isinstance(about, dict) and {"pid", "host", "since"} <= about.keys() else {}
    except (ValueError, RecursionError):
        return {}


def _clock_s() -> float:
    """Seconds that also count while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _machine() -> str:
    """This boot of this machine, and whose process numbers these are (a container has its own)."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + " " + os.readlink("/proc/self/ns/pid")
    except OSError:
        return os.uname().nodename


def _process_start(pid) -> int | None:
    """When a process of this machine started, in clock ticks since its boot; None if it does not run."""
    try:
        state, *rest = Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else int(rest[18])
    except (OSError, ValueError, TypeError, OverflowError):
        return None
