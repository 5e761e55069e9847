"""What this project asks of a disk: a file is there whole or not at all, and so is a line.

    write_whole, whole_file     a temporary file beside it → flush → rename → flush of the folder
    append_line, read_lines     JSON lines; one torn by a full disk or a kill harms no other

All of it works on network disks without file locks, and where flushing a folder is refused.
"""

import contextlib
import errno
import glob
import json
import os
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from pipeline.errors import UserError

TEMPORARY = ".tmp"
CHUNK_BYTES = 16 << 20
LEFTOVER_S = 3600.0  # a temporary file that nobody wrote to for so long is what a killed process left behind
# How a file system says that it does not know an operation.
REFUSED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EPERM)


def flush(fd: int, *, only_data: bool = False) -> None:
    """`os.fsync`, or `os.fdatasync`, if the file system knows it: some refuse it, mostly of folders."""
    try:
        (os.fdatasync if only_data else os.fsync)(fd)
    except OSError as error:
        if error.errno not in REFUSED:
            raise


def flush_folder(folder: Path) -> None:
    """Makes names in a folder survive a power failure, if the file system lets a folder be opened and flushed."""
    try:
        fd = os.open(folder, os.O_RDONLY)
    except OSError as error:
        if error.errno not in REFUSED:
            raise
        return
    try:
        flush(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def whole_file(
    path: Path, *, keep_as: Path | None = None, advice: str = "", size_bytes: int = 0, alone: bool = False
) -> Iterator[BinaryIO]:
    """A file to write to, which gets its name when the block ends without an error; else all is as it was before.

    With `keep_as` the file that had the name before is kept under that one. What a killed process left of `path` is
    removed: at once if this one is `alone`, as it holds the only right to write (one_writer.py), else an hour later.
    Raises UserError, which ends in `advice`, if the disk or the folder refuses it; nothing half-written stays behind.
    """
    temporary = _temporary(path)
    try:
        remove_temporaries(path, older_than_s=0.0 if alone else LEFTOVER_S)
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
        raise _not_written(path, error, size_bytes, advice) from error


def _not_written(path: Path, error: OSError, size_bytes: int, advice: str) -> UserError:
    kept = "the one before it is untouched" if os.path.lexists(path) else "nothing was left behind"
    advice = advice or "make room there, or choose another place, and run the same command again"
    of_size = f" ({size_bytes / 1e6:.0f} MB)" if size_bytes >= 1e6 else ""
    return UserError(f"could not write {path}{of_size}: {error.strerror or error}; {kept}; {advice}")


def _temporary(path: Path) -> Path:
    """A name beside `path` that no other process takes, nor another machine's."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}{TEMPORARY}")


def require_room(path: Path, size_bytes: int, advice: str = "") -> None:
    """Shows that `path` could be written with so many bytes, and leaves nothing. Raises UserError as `whole_file`.

    The bytes are reserved, which takes no time; written where that is not possible.
    """
    temporary = _temporary(path)
    try:
        with open(temporary, "xb") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, size_bytes)
            except OSError as error:
                if error.errno not in REFUSED:
                    raise
                for at in range(0, size_bytes, CHUNK_BYTES):
                    file.write(bytes(min(CHUNK_BYTES, size_bytes - at)))
    except OSError as error:
        raise _not_written(path, error, size_bytes, advice) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_whole(
    path: Path, content: bytes | str, *, keep_as: Path | None = None, advice: str = "", alone: bool = False
) -> None:
    """`whole_file` with this content; text is written as UTF-8, and what is not text in a file's name as its bytes."""
    data = content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content
    with whole_file(path, keep_as=keep_as, advice=advice, size_bytes=len(data), alone=alone) as file:
        file.write(data)


def _give_second_name(path: Path, name: Path) -> None:
    """At no moment is there no `path`, if the file system has hard links; else for a moment."""
    with contextlib.suppress(FileNotFoundError):
        name.unlink()
    try:
        os.link(path, name)
    except FileNotFoundError:
        raise
    except OSError:
        os.replace(path, name)


def remove_temporaries(path: Path, *, older_than_s: float) -> None:
    """Removes what processes that were killed while they wrote `path` left behind, and wrote to so long ago."""
    for old in path.parent.glob(f".{glob.escape(path.name)}.*{TEMPORARY}"):
        with contextlib.suppress(OSError):
            if not older_than_s or time.time() - old.stat().st_mtime > older_than_s:
                old.unlink()


def followed_once(path: Path) -> Path:
    """A place that stays what it is: a link to a folder, such as runs/latest, may name another one a moment later.

    A file keeps its own name, even a link's, since the name and what lies beside it may tell what the file is.
    """
    path = path.expanduser()
    return path.resolve() if path.is_dir() else path.parent.resolve() / path.name


# ---- lines ----


def append_line(path: Path, line: str, *, durable: bool = True, advice: str = "") -> None:
    """Appends one line in one write, so that the lines of programs that run at once do not mix; `durable` flushes it.

    After a torn last line a new one is begun. Raises UserError, which ends in `advice`, if the disk refuses the line;
    the file then ends as before.
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
    """The JSON objects of a file of lines, in order. Other lines are left out, and a note names their numbers.

    Raises UserError for a file that cannot be read.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        text = f"{path} cannot be read ({error.strerror}); make it readable, or move it away"
        raise UserError(text) from error
    found = []
    for number, line in enumerate(content.split(b"\n"), 1):
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
