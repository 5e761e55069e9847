"""Files and lines are there whole or not at all, whatever the disk refuses; one process writes a thing at a time."""

import errno
import json
import multiprocessing
import os
import resource
import signal
import time

import pytest

from pipeline import disk, one_writer
from pipeline.disk import append_line, followed_once, read_lines, require_room, whole_file, write_whole
from pipeline.errors import UserError, system_errors
from pipeline.one_writer import OneWriter


@pytest.fixture
def small_files():
    """No file may grow beyond 100 kB: what a full disk looks like to a program, write by write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def no_links(monkeypatch):
    """A file system without hard links."""

    def link(*_):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", link)


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- whole files ----


def test_a_full_disk_leaves_the_file_before_untouched(tmp_path, small_files):
    path = tmp_path / "state"
    write_whole(path, b"before")
    with pytest.raises(UserError, match=r"could not write .*state \(1 MB\).*the one before it is untouched.*more room"):
        write_whole(path, bytes(1_000_000), advice="more room")
    with pytest.raises(UserError, match="nothing was left behind"):
        write_whole(tmp_path / "new", bytes(1_000_000))
    assert path.read_bytes() == b"before" and names(tmp_path) == ["state"]


@pytest.mark.parametrize("refused", [None, errno.EOPNOTSUPP, errno.EPERM])
def test_room_is_shown_without_a_file(tmp_path, small_files, monkeypatch, refused):
    """Also on a file system that cannot reserve."""

    def unknown(*_):
        raise OSError(refused, os.strerror(refused))

    if refused:
        monkeypatch.setattr(os, "posix_fallocate", unknown)
    require_room(tmp_path / "state", 90_000)
    assert names(tmp_path) == []
    with pytest.raises(UserError, match=r"could not write .*state \(2 MB\): File too large; nothing was .*; more room"):
        require_room(tmp_path / "state", 2_000_000, "more room")
    with pytest.raises(UserError, match=r"No such file or directory"):
        require_room(tmp_path / "none" / "state", 10)
    assert names(tmp_path) == []


def test_an_error_of_ours_leaves_the_file_before_untouched_and_is_not_renamed(tmp_path):
    write_whole(tmp_path / "state", b"before")
    with pytest.raises(ZeroDivisionError), whole_file(tmp_path / "state") as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert (tmp_path / "state").read_bytes() == b"before" and names(tmp_path) == ["state"]


def test_two_writers_of_one_file_do_not_mix(tmp_path):
    """In one process, as in two containers whose processes have the same number."""
    with whole_file(tmp_path / "state") as one:
        one.write(b"a" * 9)
        with whole_file(tmp_path / "state") as other:
            other.write(b"b" * 5)
    assert (tmp_path / "state").read_bytes() == b"a" * 9 and names(tmp_path) == ["state"]


@pytest.mark.parametrize("refused", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EACCES])
def test_a_disk_that_cannot_flush_is_written_all_the_same(tmp_path, monkeypatch, refused):
    def fsync(fd):
        raise OSError(refused, os.strerror(refused))

    monkeypatch.setattr(os, "fsync", fsync)
    write_whole(tmp_path / "state", "Grüße \udce9")
    append_line(tmp_path / "lines", "{}")
    assert (tmp_path / "state").read_bytes() == "Grüße ".encode() + b"\xe9"  # a name's bytes that are not UTF-8
    assert names(tmp_path) == ["lines", "state"]


def test_an_unreliable_disk_is_told_of_in_one_error(tmp_path, monkeypatch):
    """The flush fails, and so does the removal of what was written: the first error counts."""

    def broken(*_, **__):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", broken)
    monkeypatch.setattr(disk.Path, "unlink", broken)
    with pytest.raises(UserError, match="could not write .*Input/output error"):
        write_whole(tmp_path / "state", b"")


@pytest.mark.parametrize("hard_links", [True, False])
def test_the_file_before_keeps_a_second_name(tmp_path, monkeypatch, request, hard_links):
    if not hard_links:
        request.getfixturevalue("no_links")
    path, kept, seen = tmp_path / "state", tmp_path / "state-1", []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (replace(a, b), seen.append(path.exists())))
    write_whole(path, b"1")
    write_whole(path, b"2", keep_as=kept)
    write_whole(path, b"3", keep_as=kept)
    assert (path.read_bytes(), kept.read_bytes(), names(tmp_path)) == (b"3", b"2", ["state", "state-1"])
    assert all(seen) or not hard_links  # a reader never finds the name gone


def test_what_a_killed_process_left_is_removed_an_hour_later(tmp_path):
    old, young, other = (tmp_path / f".{name}.tmp" for name in ("st[a]te.1", "st[a]te.2", "state.3"))
    for path in (old, young, other):
        path.write_bytes(b"half")
    os.utime(old, (0, time.time() - 3601))
    os.utime(other, (0, 0))
    write_whole(tmp_path / "st[a]te", b"whole")
    assert names(tmp_path) == sorted([other.name, young.name, "st[a]te"])


def test_the_only_writer_removes_it_at_once(tmp_path):
    young, other = tmp_path / ".state.1.tmp", tmp_path / ".state2.1.tmp"
    for path in (young, other):
        path.write_bytes(b"half")
    write_whole(tmp_path / "state", b"whole", alone=True)
    assert names(tmp_path) == sorted([other.name, "state"])


def test_a_link_to_a_folder_is_followed_and_a_file_keeps_its_name(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "blob").write_bytes(b"")
    (tmp_path / "run" / "model.safetensors").symlink_to(tmp_path / "run" / "blob")
    (tmp_path / "latest").symlink_to(tmp_path / "run")
    assert followed_once(tmp_path / "latest") == tmp_path / "run"
    assert followed_once(tmp_path / "latest" / "model.safetensors") == tmp_path / "run" / "model.safetensors"


# ---- lines ----


def test_a_full_disk_takes_a_line_whole_or_not_at_all(tmp_path, small_files):
    path = tmp_path / "results.jsonl"
    line = json.dumps({"text": "x" * 900})
    with pytest.raises(UserError, match=r"could not be added to .*results.jsonl \(.*\); keep it"):
        for _ in range(1000):
            append_line(path, line, durable=False, advice="keep it")
    assert path.read_text() == (line + "\n") * (100_000 // (len(line) + 1))


def test_a_short_write_is_seen(tmp_path, monkeypatch):
    """`os.write` may take a part and say so, without an error."""
    path, write = tmp_path / "results.jsonl", os.write
    append_line(path, '{"a": 1}')
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:5]))
    with pytest.raises(UserError, match="No space left"):
        append_line(path, '{"a": 2}')
    monkeypatch.undo()
    append_line(path, '{"a": 3}')
    assert read_lines(path) == [{"a": 1}, {"a": 3}]


def test_torn_lines_take_no_other_with_them(tmp_path, capsys):
    path = tmp_path / "results.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": \n\xff\xfe\n[1]\n\x00\x00\n' + b"[" * 100_000 + b'\n{"a": "\xc3\xa9"}\n{"a"')
    append_line(path, '{"a": 4}')
    assert read_lines(path) == [{"a": 1}, {"a": "é"}, {"a": 4}]
    notes = capsys.readouterr().err.splitlines()
    assert [note.split(" ")[3] for note in notes] == ["2", "3", "4", "5", "6", "8"]
    assert all(str(path) in note for note in notes)


# ---- one writer ----


def hold(path, told):
    with OneWriter(path, "the run r"):
        told.set()
        signal.pause()


@pytest.fixture
def holder(tmp_path):
    """A process that holds tmp_path / lock, and how to start one more."""
    context, children = multiprocessing.get_context("fork"), []

    def start(*arguments):
        told = context.Event()
        child = context.Process(target=hold, args=(tmp_path / "lock", told, *arguments), daemon=True)
        child.start()
        children.append(child)
        assert told.wait(10)
        return child

    yield start
    for child in children:
        child.kill()
        child.join()


def test_a_second_writer_is_refused_with_the_name_of_the_first(tmp_path, holder):
    first = holder()
    with pytest.raises(UserError, match=rf"the run r is being written by process {first.pid} on .*, since 20"):
        OneWriter(tmp_path / "lock", "the run r")
    first.kill()
    first.join()
    started = time.monotonic()
    with OneWriter(tmp_path / "lock", "the run r"):  # killed: nothing to wait for on this machine
        assert time.monotonic() - started < 1
    assert names(tmp_path) == []


def test_a_killed_writer_that_nobody_waited_for_is_dead(tmp_path, holder):
    first = holder()
    os.kill(first.pid, signal.SIGKILL)  # a zombie until its parent asks
    with open(f"/proc/{first.pid}/stat") as file:
        while file.seek(0) == 0 and file.read().rpartition(")")[2].split()[0] != "Z":
            time.sleep(0.01)
    OneWriter(tmp_path / "lock", "the run r").close()


def stop_beating(writer: OneWriter) -> None:
    """As where its process or its machine stands still."""
    writer._ended.set()
    writer._thread.join()


def on_another_machine(path) -> None:
    about = json.loads(path.read_bytes())
    path.write_bytes(json.dumps(about | {"machine": "another boot", "host": "node7"}).encode())


def test_of_another_machine_the_beat_decides(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(one_writer, "WATCH_S", 0.5)
    path = tmp_path / "lock"
    stop_beating(OneWriter(path, "the run r"))
    on_another_machine(path)
    with OneWriter(path, "the run r") as writer:  # no beat: taken over
        stop_beating(writer)
        assert b"another boot" not in path.read_bytes()
        on_another_machine(path)
        clock = iter(range(100))
        content_and_time = one_writer._content_and_time
        monkeypatch.setattr(one_writer, "_content_and_time", lambda path: (content_and_time(path)[0], next(clock)))
        with pytest.raises(UserError, match="by process .* on node7"):
            OneWriter(path, "the run r")
    assert "node7" in capsys.readouterr().err


def test_a_writer_shows_that_it_lives_and_learns_that_it_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(one_writer, "BEAT_S", 0.02)
    path = tmp_path / "lock"
    with OneWriter(path, "the run r") as writer:
        before = path.stat().st_mtime_ns
        time.sleep(0.2)
        assert path.stat().st_mtime_ns > before
        path.unlink()
        time.sleep(0.2)
        assert path.exists()  # set anew
        writer.require()
        path.write_bytes(b"another's")
        time.sleep(0.2)
        with pytest.raises(UserError, match="another process took over the run r"):
            writer.require()
    assert path.read_bytes() == b"another's"


def test_a_writer_that_stood_still_looks_before_it_writes(tmp_path, monkeypatch):
    """Without the thread that beats, and after so long that another machine may have taken over."""
    path, now = tmp_path / "lock", [1000.0]
    monkeypatch.setattr(one_writer, "_clock_s", lambda: now[0])
    with OneWriter(path, "the run r") as writer:
        stop_beating(writer)
        before = path.stat().st_mtime_ns
        now[0] += one_writer.WATCH_S / 2
        writer.require()  # still its own: shows that it lives
        assert path.stat().st_mtime_ns > before
        path.write_bytes(b"another's")
        now[0] += one_writer.WATCH_S / 2
        with pytest.raises(UserError, match="another process took over the run r"):
            writer.require()


@pytest.mark.parametrize(
    "content",
    [
        b'{"host": "no',
        b"",
        b"\xff",
        b"[" * 100_000,
        b'{"host": 1, "since": [], "pid": Infinity, "machine": ""}',
        "ours",
    ],
)
def test_an_unfinished_or_damaged_file_is_watched_and_replaced(tmp_path, monkeypatch, content):
    monkeypatch.setattr(one_writer, "WATCH_S", 0.1)
    about = {"host": "", "since": "", "pid": float("inf"), "machine": one_writer._machine(), "started": 1}
    (tmp_path / "lock").write_bytes(json.dumps(about).encode() if content == "ours" else content)
    OneWriter(tmp_path / "lock", "the run r").close()
    assert names(tmp_path) == []


def test_a_lock_that_cannot_be_read(tmp_path):
    (tmp_path / "lock").mkdir()
    with pytest.raises(UserError, match=r"could not write .*lock: Is a directory"):
        OneWriter(tmp_path / "lock", "the run r")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (FileNotFoundError(errno.ENOENT, "No such file", "x.jpg"), r"^x.jpg could not be used .No such file.; do y$"),
        (OSError(errno.EIO, "I/O error"), r"^a file of the work could not be used .I/O error.; do y$"),
        (OSError("broken"), r"^a file of the work could not be used .broken.; do y$"),
        (MemoryError(), "^memory was too short for the work; end other programs, then run the same command again$"),
        (RuntimeError("can't start new thread"), "^no further thread can be started for the work; .*ulimit -u"),
    ],
)
def test_what_the_system_refuses_is_a_sentence(error, said):
    @system_errors("the work", "do y")
    def work(error):
        raise error

    with pytest.raises(UserError, match=said):
        work(error)
    for fault in (ValueError("a fault of ours"), RuntimeError("another")):
        with pytest.raises(type(fault), match=str(fault)):
            work(fault)


def test_without_hard_links_too(tmp_path, no_links):
    with OneWriter(tmp_path / "lock", "the run r"):
        assert names(tmp_path) == ["lock"]
        with pytest.raises(UserError, match="is being written by process"):
            OneWriter(tmp_path / "lock", "the run r")
    assert names(tmp_path) == []


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with pytest.raises(UserError, match="could not write .*lock"):
            OneWriter(tmp_path / "lock", "the run r")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == []


def contend(path, start, out):
    start.wait()
    try:
        writer = OneWriter(path, "the run r")
    except UserError:
        out.put(0)
        return
    time.sleep(0.3)  # the others meet a living writer
    out.put(1 if path.read_bytes() == writer._content else 100)
    writer.close()


def test_of_many_that_find_a_dead_writer_one_takes_over(tmp_path, holder):
    first = holder()
    first.kill()
    first.join()
    context = multiprocessing.get_context("fork")
    start, out = context.Event(), context.Queue()
    children = [context.Process(target=contend, args=(tmp_path / "lock", start, out)) for _ in range(12)]
    for child in children:
        child.start()
    start.set()
    assert sum(out.get(timeout=30) for _ in children) == 1
    for child in children:
        child.join()
    assert names(tmp_path) == []


def test_a_forked_child_does_not_let_go(tmp_path):
    with OneWriter(tmp_path / "lock", "the run r") as writer:
        child = multiprocessing.get_context("fork").Process(target=writer.close)
        child.start()
        child.join()
        assert names(tmp_path) == ["lock"]
