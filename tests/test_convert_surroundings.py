"""Conversions where the disk, the memory, the images or the limits of the system let them down: one clear sentence."""

import errno
import fcntl
import hashlib
import itertools
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL.PngImagePlugin import PngImageFile

from pipeline import convert
from pipeline.convert import ConvertConfig
from pipeline.errors import UserError
from pipeline.storage import beton, beton_writer, conversion, store, workers
from pipeline.storage.sources.open import open_source
from tests.conversions import drawn, stop_after
from tests.mutants import outcome


@pytest.mark.parametrize(("gone", "done"), [("file", 64), ("folder", 32), ("folder is a file", 32)])
def test_a_disk_error_is_never_skipped(images, out, forked, monkeypatch, capsys, gone, done):
    """A file that is listed and then cannot be read is no bad image: the disk or its permissions are at fault.

    What was done before it is kept, in tasks of 32 images.
    """
    folder, kept, config = images / "class_1", out.parent.parent / "kept", ConvertConfig(out, images, workers=1)
    shutil.copytree(folder, kept)  # with their times

    def remove(*_) -> None:
        if gone == "file":
            (folder / "69.jpg").unlink()
        else:
            shutil.rmtree(folder)
        if gone == "folder is a file":
            folder.write_bytes(b"")

    with monkeypatch.context() as patched, pytest.raises(UserError, match=r"cannot be read from the disk \(No[t ]"):
        patched.setattr(conversion, "check_space", remove)
        convert.main(replace(config, skip_unreadable=True))
    if gone == "folder is a file":
        folder.unlink()
    shutil.copytree(kept, folder, dirs_exist_ok=True)
    convert.main(config)
    assert f"continuing after {done} of 70" in capsys.readouterr().err


def hostile(path: Path, kind: str) -> None:
    """What is no image, at the place of one."""
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "endless":
        path.symlink_to("/dev/zero")
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listening:
            os.chdir(path.parent)  # a socket's path may not be long
            listening.bind(path.name)
    elif kind == "huge":
        path.touch()
        os.truncate(path, 1 << 40)


@pytest.mark.parametrize("kind", ["pipe", "endless", "socket", "huge"])
@pytest.mark.parametrize("name", ["class_0/00.jpg", "class_1/13.jpg"])  # the first is among those that tell the size
def test_files_that_never_end(images, out, forked, monkeypatch, name, kind):
    """Neither waited for, nor read into memory, nor left out silently."""
    monkeypatch.chdir(images)
    hostile(images / name, kind)
    found = outcome(lambda: convert.main(ConvertConfig(out, images, workers=1, skip_unreadable=True)))
    said = {"huge": "an image has at most", "socket": "cannot be read from the disk"}
    assert name in str(found) and said.get(kind, "is not a file but") in str(found)


def test_memory_that_is_short_leaves_no_image_out(images, out, tmp_path, forked, monkeypatch):
    (images / "class_1" / "33.jpg").unlink()
    drawn(images / "class_1" / "33.png", 33)

    before, parent = PngImageFile.load, os.getpid()

    def load(image):
        if os.getpid() != parent:
            raise MemoryError
        return before(image)

    monkeypatch.setattr(PngImageFile, "load", load)
    with pytest.raises(UserError, match=r"memory was too short for .*33\.png; .* fewer --workers"):
        convert.main(ConvertConfig(out, images, workers=1, skip_unreadable=True))
    monkeypatch.setattr(PngImageFile, "load", before)
    convert.main(ConvertConfig(out, images, workers=1, skip_unreadable=True))
    assert beton.open_beton(out).manifest["skipped"] == [] and len(beton.open_beton(out)) == 70
    stop_after(monkeypatch, 7, MemoryError())
    with pytest.raises(UserError, match="memory was too short after 7 of 70 images"):
        convert.main(ConvertConfig(tmp_path / "other.beton", images, workers=1))


def test_a_file_replaced_while_it_is_converted(images, out, forked, monkeypatch):
    """Each file becomes another one when a worker has read it: what is written is what was read, and its digest.

    And old and new images do not end in one file.
    """
    read = {path.read_bytes(): path for path in images.rglob("*.jpg")}
    store_image, parent = store.store_image, os.getpid()

    def store_and_replace(data, *settings):
        stored = store_image(data, *settings)
        if os.getpid() != parent:
            read[data].write_bytes(bytes(len(data)))
        return stored

    monkeypatch.setattr(store, "store_image", store_and_replace)
    with pytest.raises(UserError, match="changed while it was converted"):
        convert.main(ConvertConfig(out, images, workers=2))
    assert not out.exists()
    monkeypatch.setattr(conversion, "go_back_to_unchanged", lambda *_: False)  # what was written is looked at
    for path in read.values():
        path.write_bytes(next(data for data, of in read.items() if of == path))
    convert.main(ConvertConfig(out, images, workers=2))
    opened = beton.open_beton(out)
    for sample, row in enumerate(beton.file_rows(opened)):
        data = beton.jpeg_bytes(opened, sample).tobytes()
        assert hashlib.sha256(data).hexdigest() == row[3] and read[data] == images / row[4]
    monkeypatch.undo()
    with pytest.raises(UserError, match="have changed since"):
        convert.main(ConvertConfig(out, images, workers=2))


@pytest.mark.parametrize(
    ("call", "at", "number"),
    [
        *[("pwrite", 40, number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EIO)],
        *[("fdatasync", 1, number) for number in (errno.ENOSPC, errno.EIO)],
        *[("fsync", 0, errno.EDQUOT), ("replace", 0, errno.EIO), ("open", 0, errno.EROFS), ("open", 0, errno.ENOSPC)],
    ],
)
def test_a_disk_that_fails(images, out, forked, monkeypatch, call, at, number):
    """At the call of that number, and at all that follow. Afterwards the same command continues."""
    calls, before = itertools.count(), getattr(os, call)

    def refuse(*arguments, **options):
        ours = call != "open" or str(arguments[0]).endswith(".journal")
        if ours and next(calls) >= at:
            raise OSError(number, os.strerror(number))
        return before(*arguments, **options)

    full = number in (errno.ENOSPC, errno.EDQUOT)
    said = "is full after" if full else f"could not be read or written .{os.strerror(number)}. after"
    with (
        monkeypatch.context() as patched,
        pytest.raises(UserError, match=rf"{said} \d+ of 70 images; .* the same command again|could not write .*"),
    ):
        patched.setattr(beton_writer, "CHECKPOINT_S", 0)
        patched.setattr(os, call, refuse)
        convert.main(ConvertConfig(out, images, workers=1))
    assert not out.exists()
    convert.main(ConvertConfig(out, images, workers=1))
    convert.verify(beton.open_beton(out), 1)


def test_a_disk_that_cannot_flush(images, out, forked, monkeypatch):
    """Some network disks refuse it."""

    def refuse(_):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    for call in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, call, refuse)
    convert.main(ConvertConfig(out, images, workers=1))
    assert len(beton.open_beton(out)) == 70


def test_a_killed_worker(images, out, forked, monkeypatch, capsys):
    """As the system does it where memory runs out."""
    store_image, parent = store.store_image, os.getpid()
    last = (images / "class_1" / "69.jpg").read_bytes()

    def store_or_die(data, *settings):
        if data == last and os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return store_image(data, *settings)

    monkeypatch.setattr(store, "store_image", store_or_die)
    with pytest.raises(UserError, match=r"killed, most likely because memory ran out; .* fewer --workers"):
        convert.main(ConvertConfig(out, images, workers=2))
    assert not multiprocessing.active_children()
    monkeypatch.setattr(store, "store_image", store_image)
    convert.main(ConvertConfig(out, images, workers=2))
    assert "continuing after " in capsys.readouterr().err and len(beton.open_beton(out)) == 70


def test_too_few_open_files(images, out, forked):
    """From none more to enough: a sentence or a whole file, and no process left that its parent would wait for."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    said = []
    for more in range(0, 40, 2):
        free = [number for number in range(300) if not os.path.exists(f"/proc/self/fd/{number}")]
        resource.setrlimit(resource.RLIMIT_NOFILE, (free[more], hard))  # a number that no file may have
        try:
            found = outcome(lambda: convert.main(ConvertConfig(out, images, workers=2, fresh=True)))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert not multiprocessing.active_children()
        said.append(str(found))
        assert found is None or "Too many open files" in said[-1]
    assert "2 worker processes cannot be started" in " ".join(said) and said[-1] == "None"
    assert len(beton.open_beton(out)) == 70


def allow(patched: pytest.MonkeyPatch, count: int) -> None:
    """No more than `count` threads and processes are started, as if a limit were reached."""
    start, fork, left = threading.Thread.start, os.fork, iter(range(count))

    def start_thread(thread: threading.Thread) -> None:
        if next(left, None) is None:
            raise RuntimeError("can't start new thread")
        start(thread)

    def start_process() -> int:
        if next(left, None) is None:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return fork()

    patched.setattr(threading.Thread, "start", start_thread)
    patched.setattr(os, "fork", start_process)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of the pool's own thread
def test_too_few_threads_and_processes(images, out, forked, monkeypatch):
    """Wherever the limit is reached: a sentence, and no process left that its parent would wait for."""
    monkeypatch.setattr(workers, "START_S", 1.0)
    for allowed in range(12):
        with monkeypatch.context() as patched:
            allow(patched, allowed)
            found = outcome(lambda: convert.main(ConvertConfig(out, images, workers=2, fresh=True)))
        assert not multiprocessing.active_children()
        if found is None:
            break
        assert "cannot be started" in str(found) or "no further thread can be started" in str(found)
    assert found is None and allowed > 4 and len(beton.open_beton(out)) == 70


@pytest.mark.parametrize("where", ["source", "out"])
def test_names_that_are_too_long(images, out, where):
    config = ConvertConfig(out, images, workers=1)
    config = replace(config, **{where: images / ("x" * 300 + ".beton")})
    assert "File name too long" in str(outcome(lambda: convert.main(config)))


def test_a_folder_that_may_not_be_looked_into(images, out, monkeypatch):
    def scandir(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(os, "scandir", scandir)
    found = outcome(lambda: convert.main(ConvertConfig(out, images, workers=1)))
    assert str(images) in str(found) and "Permission denied" in str(found)


def test_too_little_space_is_seen_beforehand(images, out, monkeypatch):
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"0\.0 GB free, about 0\.0 GB are needed for 70 images"):
        convert.main(ConvertConfig(out, images, workers=1))
    assert not out.exists()


def test_the_predicted_size_is_about_right(imagenet_sample, out, monkeypatch):
    """Real images: it refuses where 9/10 of the true size are free, and does not where 17/10 are."""
    config = ConvertConfig(out, imagenet_sample[0].parents[1], workers=2)
    convert.main(config)
    size = out.stat().st_size
    source = open_source(config.source)
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda _: SimpleNamespace(free=size * 0.9))
    with pytest.raises(UserError, match="make room"):
        conversion.check_space(source, out.parent, convert._how(config), 500)
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda _: SimpleNamespace(free=size * 1.7))
    conversion.check_space(source, out.parent, convert._how(config), 500)


def test_two_at_once(images, out, monkeypatch):
    """On a disk without file locks: the second is told who the first is; one that died is replaced at once."""

    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    out.parent.mkdir()
    writer = beton_writer.BetonWriter(out, 70, {"any": "one"})
    with pytest.raises(UserError, match=rf"set\.beton is being written by process {os.getpid()} on "):
        convert.main(ConvertConfig(out, images, workers=1))
    writer.close()
    child = os.fork()
    if child == 0:
        beton_writer.BetonWriter(out, 70, {"any": "one"})
        os._exit(0)
    os.waitpid(child, 0)
    assert out.with_suffix(".beton.writing").exists()
    convert.main(ConvertConfig(out, images, workers=1))
    assert len(list(out.parent.iterdir())) == 3
