"""What this project asks of a disk: a file is there whole or not at all, so is a line, and one process writes a thing.

    write_whole, whole_file     a temporary file beside it → flush → rename → flush of the folder
    append_line, read_lines     JSON lines; one that a full disk or a kill tore takes no other with it
    OneWriter                   a small file that says who writes; a second process is refused, a dead one replaced

All of it works on network disks without file locks, and where flushing a folder is refused.
"""

import contextlib
import errno
import glob
import json
import os
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from pipeline.errors import UserError

TEMPORARY = ".tmp"
LEFTOVER_S = 3600.0  # a temporary file that nobody wrote to for so long is what a killed process left behind
BEAT_S = 10.0  # between two signs of life of a writer
WATCH_S = 60.0  # without a sign of life, seen from another machine, after which a writer is taken for dead
_REFUSED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EPERM)


def flush(fd: int) -> None:
    """`os.fsync`, where the file system knows it: some refuse it, mostly of folders."""
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _REFUSED:
            raise


def flush_folder(folder: Path) -> None:
    """Makes names in a folder survive a power failure, where the file system lets a folder be opened and flushed."""
    try:
        fd = os.open(folder, os.O_RDONLY)
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
        return
    try:
        flush(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def whole_file(path: Path, keep_as: Path | None = None, advice: str = "", size_bytes: int = 0) -> Iterator[BinaryIO]:
    """A file to write to, which gets its name when the block ends without an error; else all is as it was before.

    With `keep_as` the file that had the name stays under that one. Raises UserError, which ends in `advice`, where the
    disk or the folder does not take it; nothing half-written stays behind.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}{TEMPORARY}")  # no other machine's either
    try:
        _remove_leftovers(path)
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            flush(file.fileno())
        if keep_as is not None:
            _give_second_name(path, keep_as)
        os.replace(temporary, path)
        flush_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        kept = "the one before it is untouched" if os.path.lexists(path) else "nothing was left behind"
        advice = advice or "make room there, or choose another place, and run the same command again"
        of_size = f" ({size_bytes / 1e6:.0f} MB)" if size_bytes >= 1e6 else ""
        raise UserError(f"could not write {path}{of_size}: {error.strerror or error}; {kept}; {advice}") from error


def write_whole(path: Path, content: bytes | memoryview | str, keep_as: Path | None = None, advice: str = "") -> None:
    """`whole_file` with this content; text is written as UTF-8, and what is not text in a file's name as its bytes."""
    data = content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content
    with whole_file(path, keep_as, advice, len(data)) as file:
        file.write(data)


def _give_second_name(path: Path, name: Path) -> None:
    """At no moment is there no `path`, where the file system has hard links; elsewhere for a moment."""
    with contextlib.suppress(FileNotFoundError):
        name.unlink()
    try:
        os.link(path, name)
    except FileNotFoundError:
        raise
    except OSError:
        os.replace(path, name)


def _remove_leftovers(path: Path) -> None:
    for old in path.parent.glob(f".{glob.escape(path.name)}.*{TEMPORARY}"):
        with contextlib.suppress(OSError):
            if time.time() - old.stat().st_mtime > LEFTOVER_S:
                old.unlink()


def followed_once(path: Path) -> Path:
    """A place that stays what it is: a link to a folder, such as runs/latest, may name another one a moment later.

    A file keeps its own name, even a link's, since the name and what lies beside it may tell what the file is.
    """
    path = path.expanduser()
    return path.resolve() if path.is_dir() else path.parent.resolve() / path.name


# ---- lines ----


def append_line(path: Path, line: str, durable: bool = True, advice: str = "") -> None:
    """Appends one line in one write, so that programs running at once do not mix theirs; `durable`: and flushes it.

    After a torn last line it begins a new one. Raises UserError, which ends in `advice`, where the disk does not take
    the line; the file then ends as before.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(fd).st_size
            torn = size > 0 and os.pread(fd, 1, size - 1) != b"\n"
            data = b"\n" * torn + line.encode("utf-8", "surrogateescape") + b"\n"
            written = os.write(fd, data)
            if written < len(data):
                # Unless another program appended meanwhile: then the torn line stays, and readers pass over it.
                if os.fstat(fd).st_size == size + written:
                    os.ftruncate(fd, size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if durable:
                flush(fd)
        finally:
            os.close(fd)
    except OSError as error:
        advice = advice or "make room there and run again"
        raise UserError(f"a line could not be added to {path} ({error.strerror}); {advice}") from error


def read_lines(path: Path) -> list[dict]:
    """The JSON objects of a file of lines, in order; of any other line it says where it stands, and passes over it."""
    found = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict):
            found.append(value)
        else:
            print(
                f"note: {path}, line {number} is torn or no JSON object, and left out: {line[:60]!r}", file=sys.stderr
            )
    return found


# ---- one writer ----


class OneWriter:
    """As a context, the right to write what `what` names; the file `path` stands for it and says who has it.

    On one machine the file tells at once whether its process still runs. Of another machine's process only the beat
    tells, the file's time, set anew every BEAT_S by a thread: a second process watches it for WATCH_S. Raises UserError
    where the first one lives. Needs no file locks; creating a file that must not be there yet is enough.

    """

    def __init__(self, path: Path, what: str):
        self.path, self.what = path, what
        self.lost, self._ended, self._thread, self._shown_s = False, threading.Event(), None, _clock_s()
        about = {"host": os.uname().nodename, "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        about |= {"machine": _machine(), "started": _process_start(os.getpid()), "token": uuid.uuid4().hex}
        self._pid, self._content = os.getpid(), json.dumps(about).encode()
        while not self._create(path):
            if self._took_over():
                break
        self.start_beating()

    def __enter__(self) -> "OneWriter":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def start_beating(self) -> None:
        if self._thread is None:
            self._ended.clear()
            self._thread = threading.Thread(target=self._beat, name="one writer", daemon=True)
            self._thread.start()

    def stop_beating(self) -> None:
        """Until it is started again: where processes are forked no other thread may run."""
        if self._thread is not None:
            self._ended.set()
            self._thread.join()
            self._thread = None

    def require(self) -> None:
        """Raises UserError where another process took over meanwhile, this one having been stopped for long.

        Called before each write: it only asks the disk where the last sign of life is so old that another may have.
        """
        if _clock_s() - self._shown_s > WATCH_S / 3:
            self._look()
        if self.lost:
            raise UserError(f"another process took over {self.what} while this one stood still; this one ends here")

    def close(self) -> None:
        """Lets others write. Called in a forked child, it does nothing."""
        if os.getpid() != self._pid:
            return
        self.stop_beating()
        with contextlib.suppress(OSError):
            if self.path.read_bytes() == self._content:
                self.path.unlink()

    def _create(self, path: Path) -> bool:
        """Whether a file `path` of ours is new there; False where there is one. With hard links it appears whole."""
        own = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
        try:
            _write_new(own, self._content)
            try:
                os.link(own, path)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in (*_REFUSED, errno.EMLINK):
                    raise
                _write_new(path, self._content)
        except FileExistsError:
            return False
        except OSError as error:
            raise UserError(f"could not write {path}: {error.strerror}; make room, or choose another place") from error
        finally:
            with contextlib.suppress(OSError):
                own.unlink()
        return True

    def _took_over(self) -> bool:
        """Replaces a dead writer's file by ours. False where that is not done yet; UserError where the writer lives.

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
            raise UserError(f"{self.what} is being written by {named}; wait for it, stop it, or choose another place")
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
                return False  # and another one's file is looked at anew
            if found[1] != seen[1]:
                return True
        return False

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_S):
            self._look()

    def _look(self) -> None:
        """Shows that this process lives, if the file is still its own."""
        with contextlib.suppress(OSError, UserError):  # a disk that does not answer now will at another beat
            now_s, found = _clock_s(), _content_and_time(self.path)
            if found is not None and found[0] != self._content:
                self.lost = True
            elif found is not None:
                os.utime(self.path)
                self._shown_s = now_s
            elif self._create(self.path):
                self._shown_s = now_s


def _write_new(path: Path, content: bytes) -> None:
    """Raises FileExistsError where there is such a file, OSError where the disk does not take it."""
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
    except FileNotFoundError:
        return None


def _parsed(content: bytes) -> dict:
    """Who writes; {} where the file was never finished."""
    try:
        about = json.loads(content)
        return about if isinstance(about, dict) and {"pid", "host", "since"} <= about.keys() else {}
    except ValueError:
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
    """When a process of this machine started, in clock ticks since its boot; None where it does not run."""
    try:
        state, *rest = Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else int(rest[18])
    except (OSError, ValueError, TypeError):
        return None
