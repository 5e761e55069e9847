"""Conversions as a user runs them: what comes out, interrupted or not, and what a wrong input is told."""

import errno
import fcntl
import hashlib
import itertools
import json
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from pipeline import convert
from pipeline.convert import ConvertConfig
from pipeline.errors import UserError
from pipeline.one_writer import _machine
from pipeline.storage import beton, beton_writer, conversion, store, workers
from pipeline.storage.sources.open import open_source
from pipeline.storage.sources.source import Source
from tests.mutants import outcome

REPO = Path(__file__).resolve().parents[1]
COMMAND = [sys.executable, str(REPO / "pipeline" / "convert.py")]


def run(*arguments, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, env={**os.environ, **environment}
    )


def contents(folder: Path) -> dict[str, str]:
    """Name → sha256 of every file in a folder."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def drawn(path: Path, seed: int, side: int = 40) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (side // 8, side // 8, 3), np.uint8)
    Image.fromarray(pixels.repeat(8, 0).repeat(8, 1)).save(path)


@pytest.fixture
def images(tmp_path) -> Path:
    """70 small images of two classes: three chunks of work."""
    for i in range(70):
        drawn(tmp_path / "images" / f"class_{i % 2}" / f"{i:02d}.jpg", i)
    return tmp_path / "images"


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out" / "set.beton"


@pytest.fixture
def forked(monkeypatch) -> None:
    """Workers are forked, as in a process of its own, where torch is not loaded: they inherit what a test replaces."""
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(workers.threading, "active_count", lambda: 1)


# ---- what comes out ----


def test_real_images_round_trip(imagenet_sample, out):
    """Every kept JPEG is its file byte for byte; the sizes, labels and checksums of all are right."""
    convert.main(ConvertConfig(out, imagenet_sample[0].parents[1], workers=2))
    opened, rows = beton.open_beton(out), beton.file_rows(beton.open_beton(out))
    assert len(opened) == 500
    for sample, path in enumerate(imagenet_sample):
        data = beton.jpeg_bytes(opened, sample).tobytes()
        number, label, how, sha256, name = rows[sample]
        assert (int(number), int(label)) == (sample, opened.labels[sample]) and name.endswith(path.name)
        assert opened.classes[opened.labels[sample]] == path.parent.name
        assert hashlib.sha256(data).hexdigest() == sha256
        with Image.open(path) as image:
            small = max(image.size) <= 500
            assert how == ("kept" if small else "resized")
            if small:
                assert data == path.read_bytes()
                assert (opened.widths[sample], opened.heights[sample]) == image.size
            else:
                assert max(opened.widths[sample], opened.heights[sample]) == 500


def test_the_manifest(images, out, capsys):
    drawn(images / "class_0" / "large.png", 1, 640)
    drawn(images / "loose.jpg", 2)
    for name in ("class_1/notes.txt", "class_1/more.txt", "@eaDir/thumb.jpg"):
        (images / name).parent.mkdir(exist_ok=True)
        (images / name).write_text("no image")
    convert.main(ConvertConfig(out, images, workers=1, quality=80))
    manifest = json.loads(beton.manifest_path(out).read_text())
    assert manifest["images"] == 71 and manifest["classes"] == ["class_0", "class_1"]
    assert manifest["images_by_class"] == {"class_0": 36, "class_1": 35}
    assert manifest["settings"] == {"max_side_px": 500, "quality": 80, "check": "quick"}
    assert manifest["stored"] == {"kept": 70, "resized": 1, "recoded": 0, "raw": 0} and manifest["skipped"] == []
    left_out = {".jpg beside the class folders": 1, ".txt": 2, "@eaDir/ beside the class folders": 1}
    assert manifest["left_out"] == left_out
    last_line = capsys.readouterr().out.splitlines()[-1]
    assert last_line.endswith("left out: " + ", ".join(f"{count} {what}" for what, count in left_out.items()))
    assert manifest["bytes"] == out.stat().st_size
    assert sorted(path.name for path in out.parent.iterdir()) == ["set.beton", "set.files.tsv", "set.manifest.json"]


def test_workers_do_not_matter(images, tmp_path):
    for count in (1, 3):
        convert.main(ConvertConfig(tmp_path / str(count) / "set.beton", images, workers=count, max_side=24))
    assert contents(tmp_path / "1") == contents(tmp_path / "3")


def test_raw_pixels(out):
    """A source of pixels, as CIFAR-10 is: they come out unchanged."""
    pixels = np.random.default_rng(0).integers(0, 256, (100, 32, 32, 3), np.uint8)
    names = [f"train/{i:05d}" for i in range(100)]
    source = Source("cifar-10", "train", ["a", "b"], names, np.arange(100) % 2, out.parent, pixels=pixels)
    convert.convert(source, out, ConvertConfig(out))
    opened = beton.open_beton(out)
    stored = np.stack([beton.jpeg_bytes(opened, i).reshape(32, 32, 3) for i in range(100)])
    assert (opened.modes == beton.MODE_RAW).all() and np.array_equal(stored, pixels)
    convert.verify(beton.open_beton(out), 1)


def test_both_splits(images, tmp_path, capsys):
    (tmp_path / "both").mkdir()
    for split in ("train", "val"):
        os.symlink(images, tmp_path / "both" / split)
    convert.main(ConvertConfig(tmp_path / "out", tmp_path / "both", workers=1, verify=True))
    made = contents(tmp_path / "out")
    assert made["train.beton"] == made["val.beton"] and len(made) == 6
    assert "val.beton: all 70 images are in order" in capsys.readouterr().out


def test_again_is_nothing_to_do(images, out, capsys):
    convert.main(ConvertConfig(out, images, workers=1))
    before = out.stat().st_mtime_ns
    convert.main(ConvertConfig(out, images, workers=2))
    assert "nothing to do" in capsys.readouterr().out and out.stat().st_mtime_ns == before


def test_without_a_progress_bar(images, out):
    """TQDM_DISABLE, which scripts set, stops tqdm's clock; the speed is looked at every 64 images."""
    done = run("--source", images, "--out", out, "--workers", 1, TQDM_DISABLE="1")
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and len(beton.open_beton(out)) == 70


def as_source(kind: str, root: Path) -> Source:
    """The images as a folder, as a tar keeps them (here one after the other in a file), or as pixels."""
    source = open_source(root / "images")
    if kind == "tar":
        if not (root / "all.tar").exists():
            (root / "all.tar").write_bytes(b"".join((source.where / name).read_bytes() for name in source.names))
        sizes = np.array([(source.where / name).stat().st_size for name in source.names])
        extents = np.stack([np.zeros(len(sizes), int), np.cumsum(sizes) - sizes, sizes], 1)
        return replace(source, where=root / "all.tar", files=[root / "all.tar"], extents=extents)
    if kind == "pixels":
        pixels = [np.array(Image.open(source.where / name).convert("RGB")) for name in source.names]
        return replace(source, pixels=np.stack(pixels))
    return source


@pytest.mark.parametrize("kind", ["folder", "tar", "pixels"])
def test_images_that_changed_are_not_already_converted(images, out, capsys, kind):
    """Of the same names and sizes. Where they lie does not matter, nor what a manifest of before did not note."""
    root, config = images.parent, ConvertConfig(out, workers=1)
    convert.convert(as_source(kind, root), out, config)
    before = contents(out.parent)
    shutil.copytree(root, root / "moved", ignore=shutil.ignore_patterns("out", "moved"))  # with their times
    convert.convert(as_source(kind, root / "moved"), out, config)
    what = "pixels" if kind == "pixels" else "size and time"
    assert f"nothing to do (compared: names, settings, and {what} of 70 images)" in capsys.readouterr().out
    if kind == "tar":
        with open(root / "all.tar", "r+b") as file:
            head = file.read(100)
            file.seek(0)
            file.write(head)
    else:
        drawn(images / "class_1" / "33.jpg", 1000)
    with pytest.raises(UserError, match=rf"have changed since \({what} of 70 compared\); pass --fresh"):
        convert.convert(as_source(kind, root), out, config)
    assert contents(out.parent) == before
    manifest = json.loads(beton.manifest_path(out).read_text())
    del manifest["source"]["state_sha256"]
    beton.manifest_path(out).write_text(json.dumps(manifest))
    convert.convert(as_source(kind, root), out, config)
    assert f"the {what} of its images were not yet noted" in capsys.readouterr().out
    convert.convert(as_source(kind, root), out, replace(config, fresh=True))
    after = contents(out.parent)
    if kind == "tar":  # other times, and the same images: but for the manifest the same bytes
        assert {name for name in after if after[name] != before[name]} == {"set.manifest.json"}


def test_other_settings_do_not_replace_a_finished_file(images, out):
    convert.main(ConvertConfig(out, images, workers=1))
    with pytest.raises(UserError, match="quality 90, asked for is 50; pass --fresh"):
        convert.main(ConvertConfig(out, images, workers=1, quality=50))
    drawn(images / "class_0" / "more.jpg", 9)
    with pytest.raises(UserError, match="pass --fresh"):
        convert.main(ConvertConfig(out, images, workers=1))
    convert.main(ConvertConfig(out, images, workers=1, fresh=True))
    assert len(beton.open_beton(out)) == 71


# ---- unreadable images ----


def test_an_unreadable_image_stops_it(images, out):
    (images / "class_1" / "33.jpg").write_text("<html>not found</html>")
    with pytest.raises(UserError, match=r"class_1/33\.jpg is not a readable image .*--skip-unreadable"):
        convert.main(ConvertConfig(out, images, workers=2))
    assert not out.exists() and not beton.manifest_path(out).exists()
    with pytest.raises(UserError, match="is missing"):
        beton.open_beton(out)


def test_mended_it_goes_on(images, out, tmp_path, capsys):
    path = images / "class_1" / "33.jpg"
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    with pytest.raises(UserError, match=r"33\.jpg"):
        convert.main(ConvertConfig(out, images, workers=1))
    path.write_bytes(content)
    convert.main(ConvertConfig(out, images, workers=1))
    assert "continuing after 51 of 70" in capsys.readouterr().err
    convert.main(ConvertConfig(tmp_path / "straight" / "set.beton", images, workers=1))
    assert contents(out.parent) == contents(tmp_path / "straight")


def test_skipped_images_are_listed(images, out):
    for name in ("class_0/00.jpg", "class_1/33.jpg"):
        (images / name).write_bytes(b"")
    convert.main(ConvertConfig(out, images, workers=2, skip_unreadable=True))
    opened = beton.open_beton(out)
    assert opened.manifest["skipped"] == ["class_0/00.jpg", "class_1/33.jpg"] and len(opened) == 68
    names = opened.file_names()
    assert "class_1/33.jpg" not in names and names[0] == "class_0/02.jpg"
    for sample in (0, 30, 50, 67):
        assert beton.jpeg_bytes(opened, sample).tobytes() == (images / names[sample]).read_bytes()
    assert opened.labels.tolist() == [int(name[6]) for name in names]


def test_skipping_has_to_be_asked_for_again(images, out, monkeypatch):
    (images / "class_0" / "00.jpg").write_bytes(b"")
    stop_after(monkeypatch, 40)
    with pytest.raises(KeyboardInterrupt):
        convert.main(ConvertConfig(out, images, workers=1, skip_unreadable=True))
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"00\.jpg was skipped before as unreadable"):
        convert.main(ConvertConfig(out, images, workers=1))


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


def test_nothing_readable(tmp_path, out):
    for i in range(3):
        (tmp_path / "images" / "cat").mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / "cat" / f"{i}.jpg").write_bytes(b"no")
    with pytest.raises(UserError, match="none of the 3 images"):
        convert.main(ConvertConfig(out, tmp_path / "images", workers=1, skip_unreadable=True))
    assert not out.exists()


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


# ---- interruptions ----


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


def wait_for_bytes(out: Path, megabytes: int, process: subprocess.Popen) -> None:
    """Until so much of the file is there; the journal, which waits for the disk, may come much later."""
    partial = out.with_suffix(".beton.partial")
    while process.poll() is None and not (partial.exists() and partial.stat().st_size > megabytes * 1_000_000):
        time.sleep(0.01)


def living(group: int) -> list[str]:
    """Processes of a process group that still run."""
    listing = subprocess.run(["ps", "-eo", "pgid=,stat=,args="], capture_output=True, text=True).stdout
    rows = [line.split(maxsplit=2) for line in listing.splitlines()]
    return [row[2] for row in rows if int(row[0]) == group and not row[1].startswith("Z")]


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


def stop_after(monkeypatch, count: int, error: type[BaseException] | Exception = KeyboardInterrupt) -> None:
    """Makes the writer fail at its `count`-th image."""
    append = beton_writer.BetonWriter.append

    def appending(writer, *arguments):
        if writer.done == count:
            raise error
        append(writer, *arguments)

    monkeypatch.setattr(beton_writer.BetonWriter, "append", appending)


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


# ---- verify ----


def test_verify_finds_one_changed_byte(images, out):
    convert.main(ConvertConfig(out, images, workers=1))
    convert.verify(beton.open_beton(out), 1)
    opened = beton.open_beton(out)
    with open(out, "r+b") as file:
        file.seek(opened.offsets[41] + 200)
        changed = bytes([file.read(1)[0] ^ 1])
        file.seek(opened.offsets[41] + 200)
        file.write(changed)
    with pytest.raises(UserError, match=r"1 bad images of 70 \(class_1/13.jpg: its bytes have changed\)"):
        convert.verify(beton.open_beton(out), 2)


def test_verify_finds_what_a_quick_check_misses(images, out):
    """Codes changed inside a scan, behind its start: kept by the quick check, mended or refused by the full one."""
    drawn(images / "class_0" / "large.jpg", 3, 480)
    path = images / "class_0" / "large.jpg"
    content = bytearray(path.read_bytes())
    content[len(content) * 3 // 4 : len(content) * 3 // 4 + 40] = b"\x55" * 40
    path.write_bytes(content)
    convert.main(ConvertConfig(out, images, workers=1))
    with pytest.raises(UserError, match=r"large\.jpg: the JPEG is damaged .* --check full --fresh"):
        convert.verify(beton.open_beton(out), 1)
    convert.main(ConvertConfig(out, images, workers=1, check="full", fresh=True, skip_unreadable=True))
    convert.verify(beton.open_beton(out), 1)


# ---- the command line ----

BAD = {
    "missing": (["--source", "none", "--out", "o.beton"], "none is missing"),
    "empty": (["--source", "empty", "--out", "o.beton"], "has no class folders"),
    "no source": (["--out", "o.beton"], "give --source to convert, or --verify"),
    "class without images": (["--source", "hollow", "--out", "o.beton"], "dog has no images"),
    "other classes": (["--source", "unequal", "--out", "o"], "val lacks dog"),
    "out is a file": (
        ["--source", "good", "--out", "other.beton/o"],
        "could not be used (Not a directory); give another",
    ),
    "holdout in a file": (["--source", "good", "--out", "o.beton", "--holdout", "0.1"], "give --out a folder"),
    "half an image": (["--source", "good", "--out", "o", "--holdout", "1.5"], "a whole number of images"),
    "holdout of one": (["--source", "good", "--out", "o", "--holdout", "0.5"], "takes 1 of 1 images"),
    "no list": (["--source", "good", "--out", "o", "--classes", "none.txt"], "none.txt cannot be read (No such file"),
    "which split": (["--source", "unequal", "--out", "o.beton"], "choose one with --split"),
    "unreadable": (["--source", "broken", "--out", "o.beton", "--workers", "1"], "html.jpg is not a readable image"),
    "side": (["--source", "good", "--out", "o.beton", "--max-side", "0"], "expected 1 … 65535"),
    "quality": (["--source", "good", "--out", "o.beton", "--quality", "101"], "1 … 100"),
    "verify nothing": (["--out", "o.beton", "--verify"], "o.beton is missing"),
    "verify other": (["--out", "other.beton", "--verify"], "another tool"),
    "unknown flag": (["--source", "good", "--out", "o.beton", "--fast"], "--fast"),
}


@pytest.fixture(scope="module")
def bad_folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("bad")
    (root / "empty").mkdir()
    (root / "hollow" / "dog").mkdir(parents=True)
    for name in ("hollow/cat", "good/cat", "broken/cat", "unequal/train/cat", "unequal/train/dog", "unequal/val/cat"):
        drawn(root / name / "1.jpg", 0)
    (root / "broken" / "cat" / "html.jpg").write_text("<html>")
    (root / "other.beton").write_bytes(bytes(10000))
    return root


@pytest.mark.slow
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line(bad_folder, case):
    arguments, expected = BAD[case]
    before = sorted(path.name for path in bad_folder.rglob("*"))
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, cwd=bad_folder)
    assert done.returncode == 2 and expected in done.stderr and "Traceback" not in done.stderr, done.stderr
    if case != "unknown flag":
        assert done.stderr.strip().splitlines()[-1].startswith("error: ")
    after = sorted(path.name for path in bad_folder.rglob("*"))
    assert [name for name in after if name not in before and "partial" not in name and "journal" not in name] == []


@pytest.mark.slow
def test_convert_imagenet_script(bad_folder, images, tmp_path):
    script = ["bash", str(REPO / "scripts" / "convert_imagenet.sh")]
    environment = {key: value for key, value in os.environ.items() if key != "IMAGENET"}
    done = subprocess.run(script, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: IMAGENET is not set")
    (tmp_path / "imagenet").mkdir()
    for split in ("train", "val"):
        os.symlink(images, tmp_path / "imagenet" / split)
    command = [*script, "--out", str(tmp_path / "made"), "--workers", "1"]
    environment["IMAGENET"] = "imagenet"
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert beton.open_beton(tmp_path / "made" / "val.beton").manifest["settings"]["check"] == "full"
    environment["IMAGENET"] = str(bad_folder / "unequal")
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 2 and "val lacks dog" in done.stderr
