"""Conversions that are stopped, at any moment and in any way: started again they end with the same bytes."""

import json
import os
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline import convert
from pipeline.convert import ConvertConfig
from pipeline.one_writer import _machine
from pipeline.storage import beton_writer, store
from tests.conversions import COMMAND, contents, drawn, living, run, stop_after, wait_for_bytes


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    """400 images that take a few seconds: they are resized."""
    root = tmp_path_factory.mktemp("many") / "images"
    drawn(root / "class_0" / "000.png", 0, 640)
    for i in range(1, 400):
        path = root / f"class_{i % 3}" / f"{i:03d}.png"
        path.parent.mkdir(exist_ok=True)
        os.link(root / "class_0" / "000.png", path)
    return root


@pytest.fixture(scope="module")
def straight(many, tmp_path_factory) -> dict[str, str]:
    """The result of converting them without a stop."""
    out = tmp_path_factory.mktemp("straight") / "set.beton"
    convert.main(ConvertConfig(out, many, workers=2))
    return contents(out.parent)


def start(many: Path, out: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [*COMMAND, "--source", str(many), "--out", str(out), "--workers", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell ignores it for what it runs aside
    )


def wait_for_rows(journal: Path, rows: int, process: subprocess.Popen) -> None:
    while process.poll() is None and not (
        journal.exists() and journal.stat().st_size > rows * beton_writer.ROW.itemsize
    ):
        time.sleep(0.01)


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_with_the_same_bytes(many, straight, out, record_property):
    """Killed with SIGKILL again and again, each time after some more images; no process is left behind.

    One conversion has four or five kills, unless the disk is slow to take the journal. $KILLS asks for more.
    """
    rng, kills, finished, rows = np.random.default_rng(), 0, 0, None
    journal = out.with_suffix(".beton.journal")
    while not finished or kills < int(os.environ.get("KILLS", 1)):
        process = start(many, out)
        if rows is None:
            wait_for_bytes(out, int(rng.integers(1, 20)), process)
        else:
            wait_for_rows(journal, rows + int(rng.integers(1, 50)), process)
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        _, stderr = process.communicate()
        deadline = time.monotonic() + 10
        while living(process.pid):
            assert time.monotonic() < deadline, living(process.pid)
            time.sleep(0.05)
        if process.returncode == -signal.SIGKILL:
            kills += 1
            rows = (journal.stat().st_size - 300) // beton_writer.ROW.itemsize if journal.exists() else 400
            assert not out.exists() or contents(out.parent).items() >= straight.items()
        else:
            assert process.returncode == 0, stderr
            assert contents(out.parent) == straight
            finished, rows = finished + 1, None
            shutil.rmtree(out.parent)
    for name, value in {"kills": kills, "conversions that ended alike": finished}.items():
        record_property(name, value)


def test_going_back_waits_for_what_is_being_flushed(tmp_path, monkeypatch):
    """Else rows of images that were forgotten follow in the journal, and the next start begins at the first image."""
    out, flush = tmp_path / "set.beton", beton_writer.BetonWriter._flush
    writer = beton_writer.BetonWriter(out, 4, {})
    for _ in range(4):
        writer.append(store.store_raw(np.zeros((2, 2, 3), np.uint8)), (12, 0))
    monkeypatch.setattr(writer, "_flush", lambda done: (time.sleep(0.2), flush(writer, done)))
    writer._flushing = writer._flusher.submit(writer._flush, 4)
    writer.go_back(1)
    writer.close()
    again = beton_writer.BetonWriter(out, 4, {})
    assert again.done == 1
    again.close()


def test_killed_when_the_file_had_its_name(images, out):
    """What was left beside it is removed by the next call, which finds nothing else to do."""
    convert.main(ConvertConfig(out, images, workers=1))
    finished = contents(out.parent)
    out.with_suffix(".beton.journal").write_bytes(b"of the killed one")
    out.with_suffix(".beton.writing").write_text(json.dumps({"pid": 0, "host": "", "since": "", "machine": _machine()}))
    convert.main(ConvertConfig(out, images, workers=1))
    assert contents(out.parent) == finished


@pytest.mark.slow
def test_ctrl_c_ends_cleanly(many, straight, out):
    process = start(many, out)
    wait_for_bytes(out, 12, process)  # the first 8 MB are there at once
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to parent and workers
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in stderr, stderr
    assert "the same command continues" in stderr and not out.exists()
    assert run("--source", many, "--out", out).returncode == 0
    assert contents(out.parent) == straight


def test_settings_changed_midway_start_again(images, out, tmp_path, monkeypatch):
    """What is half there with another quality is not mixed with the new one."""
    stop_after(monkeypatch, 40)
    with pytest.raises(KeyboardInterrupt):
        convert.main(ConvertConfig(out, images, workers=1, max_side=24, quality=30))
    monkeypatch.undo()
    convert.main(ConvertConfig(out, images, workers=1, max_side=24))
    convert.main(ConvertConfig(tmp_path / "straight" / "set.beton", images, workers=1, max_side=24))
    assert contents(out.parent) == contents(tmp_path / "straight")


@pytest.mark.parametrize("changed", ["other", "mended", "gone back in time"])
def test_images_changed_midway_are_not_mixed(images, out, tmp_path, monkeypatch, capsys, changed):
    """The result is that of the images as they are now, with all that was done before the first changed one kept."""
    path, config = images / "class_0" / "22.jpg", ConvertConfig(out, images, workers=1, skip_unreadable=True)
    content, times = path.read_bytes(), path.stat()
    path.write_bytes(content if changed != "mended" else content[:-100])
    stop_after(monkeypatch, 40)
    with pytest.raises(KeyboardInterrupt):
        convert.main(config)
    monkeypatch.undo()
    if changed == "mended":
        path.write_bytes(content)
    else:
        drawn(path, 5)
    if changed == "gone back in time":  # as from an archive: older than what was there
        os.utime(path, (0, times.st_mtime - 1000))
    convert.main(config)
    said = capsys.readouterr().err
    assert "22.jpg has changed since" in said and "continuing after 11 of 70" in said
    convert.main(replace(config, out=tmp_path / "straight" / "set.beton"))
    assert contents(out.parent) == contents(tmp_path / "straight")


@pytest.mark.parametrize("damage", ["row", "partial", "header", "gone"])
def test_a_damaged_journal(images, out, tmp_path, monkeypatch, damage):
    """A row cut in half is made again; a file shorter than its journal, or no journal, starts again."""
    stop_after(monkeypatch, 40)
    with pytest.raises(KeyboardInterrupt):
        convert.main(ConvertConfig(out, images, workers=1))
    monkeypatch.undo()
    journal, partial = out.with_suffix(".beton.journal"), out.with_suffix(".beton.partial")
    if damage == "row":
        os.truncate(journal, journal.stat().st_size - 7)
    elif damage == "partial":
        os.truncate(partial, partial.stat().st_size - 7)
    elif damage == "header":
        os.truncate(journal, 7)
    else:
        journal.unlink()
    convert.main(ConvertConfig(out, images, workers=1))
    convert.main(ConvertConfig(tmp_path / "straight" / "set.beton", images, workers=1))
    assert contents(out.parent) == contents(tmp_path / "straight")


def test_what_one_that_was_killed_left_of_its_small_files_goes_at_once(images, out, tmp_path):
    out.parent.mkdir()
    for name in ("set.files.tsv", "set.manifest.json"):
        (out.parent / f".{name}.0123456789ab.tmp").write_bytes(b"half")
    convert.main(ConvertConfig(out, images, workers=1))
    convert.main(ConvertConfig(tmp_path / "straight" / "set.beton", images, workers=1))
    assert contents(out.parent) == contents(tmp_path / "straight")


@pytest.mark.parametrize("step", range(9))
def test_killed_while_finishing(images, out, tmp_path, monkeypatch, step):
    """The last steps (tables, lists, names) one by one: nothing looks finished before its manifest is right."""
    steps = iter(range(100))

    class Killed(BaseException):
        pass

    def counted(function):
        def call(*arguments, **options):
            if next(steps) == step:
                raise Killed
            return function(*arguments, **options)

        return call

    finish = beton_writer.BetonWriter.finish

    def finishing(writer, *arguments):
        for name in ("replace", "fsync", "ftruncate"):
            monkeypatch.setattr(os, name, counted(getattr(os, name)))
        return finish(writer, *arguments)

    monkeypatch.setattr(beton_writer.BetonWriter, "finish", finishing)
    with pytest.raises(Killed):
        convert.main(ConvertConfig(out, images, workers=1))
    monkeypatch.undo()
    assert not out.exists()
    convert.main(ConvertConfig(out, images, workers=1))
    convert.main(ConvertConfig(tmp_path / "straight" / "set.beton", images, workers=1))
    assert contents(out.parent) == contents(tmp_path / "straight")
