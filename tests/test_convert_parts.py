"""Conversions shared among processes end with one process's bytes, however they are stopped, mixed up or repeated."""

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from pipeline import convert
from pipeline.convert import ConvertConfig
from pipeline.errors import UserError
from pipeline.one_writer import OneWriter, _machine
from pipeline.storage import beton, beton_writer, conversion, parts
from pipeline.storage.sources.source import Source
from tests.conversions import as_source, contents, drawn, stop_after, wait_for_bytes

REPO = Path(__file__).resolve().parents[1]
COMMAND = [sys.executable, str(REPO / "pipeline" / "convert.py")]
ALONE = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
IMAGES = 23  # no multiple of the numbers of parts


@pytest.fixture
def images(tmp_path) -> Path:
    """JPEGs to keep, a PNG to encode again, an image to resize, and one that cannot be read."""
    root = tmp_path / "images"
    for i in range(IMAGES - 3):
        drawn(root / f"class_{i % 2}" / f"{i:02d}.jpg", i)
    drawn(root / "class_0" / "large.jpg", 50, 640)
    drawn(root / "class_1" / "other.png", 51)
    (root / "class_1" / "broken.jpg").write_bytes(b"\xff\xd8 no image")
    return root


@pytest.fixture
def config(images, tmp_path) -> ConvertConfig:
    return ConvertConfig(tmp_path / "out" / "set.beton", images, workers=1, skip_unreadable=True)


@pytest.fixture
def straight(config, tmp_path) -> dict[str, str]:
    """What one process makes of them."""
    convert.main(replace(config, out=tmp_path / "straight" / "set.beton"))
    return contents(tmp_path / "straight")


def run_part(config: ConvertConfig, part: str) -> None:
    convert.main(replace(config, part=part))


def started(config: ConvertConfig, *flags: str) -> subprocess.Popen:
    command = [*COMMAND, "--source", str(config.source), "--out", str(config.out), "--workers", "1", *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ALONE)


# ---- the same bytes ----


def test_two_processes_at_once(config, straight):
    """Commands, as on two machines: both end with 0, and one of them has put the parts together."""
    both = [started(config, "--skip-unreadable", "--part", f"{k}/2") for k in range(2)]
    said = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sum(f"{config.out}: 22 images, 2 classes" in out for out, _ in said) == 1, said
    assert contents(config.out.parent) == straight


@pytest.mark.parametrize("kind", ["folder", "tar", "pixels"])
@pytest.mark.parametrize("count", [2, 5])
def test_any_number_of_any_kind_in_any_order(tmp_path, kind, count):
    for i in range(13):
        drawn(tmp_path / "images" / f"class_{i % 2}" / f"{i:02d}.jpg", i)
    config = ConvertConfig(tmp_path / "out" / "set.beton", workers=1)
    straight = tmp_path / "straight" / "set.beton"
    convert.convert(as_source(kind, tmp_path), straight, config)
    for number in reversed(range(count)):
        there = convert.convert(as_source(kind, tmp_path), config.out, replace(config, part=f"{number}/{count}"))
        assert there == config.out.exists() == (number == 0)
    assert contents(config.out.parent) == contents(straight.parent)
    opened = beton.open_beton(config.out)
    names = sorted(path.relative_to(tmp_path / "images").as_posix() for path in (tmp_path / "images").rglob("*.jpg"))
    assert opened.file_names() == names
    for sample, name in enumerate(names):
        data = beton.jpeg_bytes(opened, sample).tobytes()
        if kind == "pixels":
            assert data == np.asarray(Image.open(tmp_path / "images" / name).convert("RGB")).tobytes()
        else:
            assert data == (tmp_path / "images" / name).read_bytes()


def test_the_parts_are_all_images_once():
    for total in (5, 23, 1000):
        for count in (1, 2, 3, 5):
            found = [i for number in range(count) for i in parts.Part(number, count).images(total)]
            assert found == list(range(total))


def test_a_part_has_its_images_share_of_every_field():
    """A field that is new in Source comes here, and, if it has an entry an image, to part_of."""
    whole = {"kind", "split", "classes", "where", "labelled", "files", "read", "left_out"}
    assert {field.name for field in fields(Source)} == whole | {"names", "labels", "extents", "pixels"}
    source = Source("", "", ["a"], [*"abcde"], np.arange(5), Path(), extents=np.ones((5, 3)), pixels=np.ones((5, 2)))
    part = parts.part_of(source, parts.Part(1, 2))
    assert part.names == ["c", "d", "e"] and part.labels.tolist() == [2, 3, 4]
    assert len(part.extents) == len(part.pixels) == 3
    assert all(getattr(part, name) == getattr(source, name) for name in whole)


@pytest.mark.slow
@pytest.mark.parametrize("script", [False, True])
def test_torchrun(images, tmp_path, script):
    """The stock torchrun with two processes: both splits, shards of them, checked; also by the script for ImageNet."""
    for split in ("train", "val"):
        (tmp_path / "both").mkdir(exist_ok=True)
        os.symlink(images, tmp_path / "both" / split)
    flags = ["--skip-unreadable", "--workers", "1", "--format", "webdataset", "--shard-images", "8", "--verify"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*COMMAND[1:], "--source", tmp_path / "both"]
    if script:
        flags += ["--check", "quick"]
        command = ["--no-python", "bash", REPO / "scripts" / "convert_imagenet.sh"]
    env = {**ALONE, "OMP_NUM_THREADS": "1", "IMAGENET": str(tmp_path / "both")}
    done = subprocess.run(
        [*torchrun, *command, "--out", tmp_path / "shared", *flags], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr
    one = [*COMMAND, "--source", tmp_path / "both", "--out", tmp_path / "one", *flags]
    alone = subprocess.run(one, capture_output=True, text=True, env=ALONE)
    assert alone.returncode == 0, alone.stderr
    assert contents(tmp_path / "shared") == contents(tmp_path / "one")
    assert {"train.shards.json", "val.shards.json", "train-000002.tar", "val.beton"} <= contents(
        tmp_path / "one"
    ).keys()
    for split in ("train", "val"):
        assert f"{split}.shards.json: all 22 images are in order" in done.stdout


def test_the_converter_does_without_torch():
    """It takes seconds to load, and a converting process forks."""
    code = "import pipeline.convert, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO).returncode == 0


# ---- stops ----


@pytest.mark.slow
def test_killed_and_continued(tmp_path):
    """A part's process is killed with SIGKILL in its middle; the same command continues there."""
    drawn(tmp_path / "images" / "class_0" / "000.png", 0, 640)
    for i in range(1, 200):
        (tmp_path / "images" / f"class_{i % 3}").mkdir(exist_ok=True)
        os.link(tmp_path / "images" / "class_0" / "000.png", tmp_path / "images" / f"class_{i % 3}" / f"{i:03d}.png")
    config = ConvertConfig(tmp_path / "out" / "set.beton", tmp_path / "images", workers=1)
    part = parts.Part(1, 2).path(config.out)
    process = started(config, "--part", "1/2")
    wait_for_bytes(part, 9, process)  # the first 8 MB are there at once
    while process.poll() is None and part.with_suffix(".beton.journal").stat().st_size < 10 * 70:
        pass
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not config.out.exists()
    run_part(config, "0/2")
    again = started(config, "--part", "1/2")
    _, said = again.communicate(timeout=120)
    assert again.returncode == 0 and "set.part1of2.beton: continuing after" in said, said
    convert.main(replace(config, out=tmp_path / "straight" / "set.beton"))
    assert contents(config.out.parent) == contents(tmp_path / "straight")


@pytest.mark.parametrize("part", ["0/3", "2/3"])
def test_a_merge_that_was_stopped_is_continued_by_any_part(config, straight, monkeypatch, capsys, part):
    for number in (0, 1):
        run_part(config, f"{number}/3")
    append, whole = beton_writer.BetonWriter.append, config.out

    def appending(writer, *arguments):
        if writer.path == whole and writer.done == 12:
            raise KeyboardInterrupt
        append(writer, *arguments)

    monkeypatch.setattr(beton_writer.BetonWriter, "append", appending)
    with pytest.raises(KeyboardInterrupt):
        run_part(config, "2/3")
    monkeypatch.undo()
    assert not config.out.exists()
    run_part(config, part)
    assert "set.beton: continuing after 12 of 23 images" in capsys.readouterr().err
    assert contents(config.out.parent) == straight


def test_killed_when_the_file_had_its_name(config, straight, tmp_path):
    """The parts that were left, and whatever says who put them together, are removed by any part's next command."""
    for number in (0, 1):
        run_part(config, f"{number}/2")
        if number == 0:
            shutil.copytree(config.out.parent, tmp_path / "left")
    shutil.copytree(tmp_path / "left", config.out.parent, dirs_exist_ok=True)
    dead = f'{{"pid": 0, "host": "", "since": "", "machine": "{_machine()}"}}'
    config.out.with_suffix(".beton.merging").write_text(dead)
    run_part(config, "1/2")
    assert contents(config.out.parent) == straight


def test_one_process_continues_what_parts_began_to_put_together(config, straight, monkeypatch):
    """The other way round, too: a half-finished file of one process is of use to the parts."""
    stop_after(monkeypatch, 9)
    with pytest.raises(KeyboardInterrupt):
        convert.main(config)
    monkeypatch.undo()
    for number in (0, 1):
        run_part(config, f"{number}/2")
    assert contents(config.out.parent) == straight


# ---- what is missing, changed, or another one's ----


def test_a_part_that_is_missing_is_said(config, straight, capsys):
    for number in (3, 1):
        run_part(config, f"{number}/4")
        said = capsys.readouterr().out
    assert f"{config.out}: part 1/4 is complete, " in said and "of 4 parts, these are not complete" in said
    assert "Pillow: 0, 2; " in said and not config.out.exists()
    run_part(config, "1/4")  # again: nothing is converted twice, and it says the same
    assert "Pillow: 0, 2; " in capsys.readouterr().out
    run_part(config, "0/4")
    run_part(config, "2/4")
    assert contents(config.out.parent) == straight


def test_parts_of_another_number_or_other_settings(config, straight):
    """Neither is mixed in, and none is left when the file is there."""
    for number in (0, 2):
        run_part(config, f"{number}/4")
    run_part(replace(config, quality=40), "1/2")
    run_part(config, "0/2")
    assert not config.out.exists()
    run_part(config, "1/2")
    assert contents(config.out.parent) == straight


def test_one_process_removes_the_parts_of_those_who_gave_up(config, straight):
    run_part(config, "0/2")
    convert.main(config)
    assert contents(config.out.parent) == straight


def test_a_change_between_a_part_and_the_end(config, images, tmp_path, capsys):
    """The part to run again is named; then it is the result of the images as they are now."""
    run_part(config, "0/2")
    drawn(images / "class_0" / "04.jpg", 99)
    with pytest.raises(UserError, match=r"class_0/04\.jpg has changed since it was converted; run --part 0/2 again"):
        run_part(config, "1/2")
    with pytest.raises(UserError, match="run --part 0/2 again"):
        run_part(config, "1/2")
    run_part(config, "0/2")
    assert "set.part0of2.beton: continuing after 2 of 11 images" in capsys.readouterr().err
    convert.main(replace(config, out=tmp_path / "straight" / "set.beton"))
    assert contents(config.out.parent) == contents(tmp_path / "straight")


def test_a_damaged_part_is_named(config):
    run_part(config, "0/2")
    partial = parts.Part(0, 2).path(config.out).with_suffix(".beton.partial")
    with open(partial, "r+b") as file:
        file.seek(beton.data_start(11) + 1000)
        file.write(b"changed")
    with pytest.raises(UserError, match=r"part0of2\.beton\.partial is damaged; remove it and run --part 0/2 again"):
        run_part(config, "1/2")
    assert not config.out.exists()


def test_a_part_without_its_images_is_missing(config, straight, capsys):
    run_part(config, "0/2")
    parts.Part(0, 2).path(config.out).with_suffix(".beton.partial").unlink()
    run_part(config, "1/2")
    assert "of 2 parts, these are not complete" in capsys.readouterr().out and not config.out.exists()
    run_part(config, "0/2")
    assert contents(config.out.parent) == straight


def test_a_val_too_small_is_refused_before_train(config):
    out = config.out.parent
    with pytest.raises(UserError, match="has 4 images for val, too few for 5 parts"):
        convert.main(replace(config, out=out, holdout=4, part="0/5"))
    assert not out.exists()


def test_an_unreadable_image_stops_its_part_alone(config, straight):
    strict = replace(config, skip_unreadable=False)
    run_part(strict, "0/2")
    with pytest.raises(UserError, match=r"broken\.jpg is not a readable image .*--skip-unreadable"):
        run_part(strict, "1/2")
    run_part(config, "1/2")
    assert contents(config.out.parent) == straight


def test_leaving_out_is_asked_for_by_who_puts_together(config, straight):
    run_part(config, "1/2")
    with pytest.raises(UserError, match=r"broken\.jpg is not a readable image \(left out of part 1/2\)"):
        run_part(replace(config, skip_unreadable=False), "0/2")
    run_part(config, "0/2")
    assert contents(config.out.parent) == straight


def test_only_one_puts_together(config, straight, capsys):
    run_part(config, "0/2")
    with OneWriter(config.out.with_suffix(".beton.merging"), "it"):
        run_part(config, "1/2")
        assert "all 2 parts are complete, and another process is putting them together" in capsys.readouterr().out
    assert not config.out.exists()
    run_part(config, "0/2")
    assert contents(config.out.parent) == straight


def test_the_same_part_twice_at_once(config):
    with (
        beton_writer.BetonWriter(parts.Part(0, 2).path(_made(config.out)), 11, {}),
        pytest.raises(UserError, match="set.part0of2.beton is being written by process"),
    ):
        run_part(config, "0/2")


def _made(out: Path) -> Path:
    out.parent.mkdir()
    return out


def test_room_for_all_images_twice(config, monkeypatch):
    """The parts and the file of all are there at once; what other parts have already is not counted again."""
    asked = []
    monkeypatch.setattr(conversion, "check_space", lambda source, folder, how, left: asked.append((len(source), left)))
    run_part(config, "0/2")
    run_part(config, "0/2")
    run_part(config, "1/2")
    assert asked == [(11, 46), (11, 0), (12, 35), (23, 23)]
    monkeypatch.undo()
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"are needed for 46 images; make room"):
        run_part(replace(config, out=config.out.with_name("other.beton")), "0/2")


# ---- the command line ----


@pytest.mark.parametrize(
    ("flags", "environment", "says"),
    [
        (["--part", "4/4"], {}, "--part 4/4: expected K/N with K from 0 to N - 1"),
        (["--part", "first"], {}, "--part first: expected K/N"),
        (["--part", "-1/2"], {}, "--part -1/2: expected K/N"),
        (["--part", "0/0"], {}, "--part 0/0: expected K/N"),
        ([], {"RANK": "2", "WORLD_SIZE": "2"}, "RANK is '2' and WORLD_SIZE '2': expected whole numbers, RANK from 0"),
        ([], {"RANK": "two", "WORLD_SIZE": "4"}, "RANK is 'two' and WORLD_SIZE '4': expected whole numbers"),
        (["--part", "0/99"], {}, "too few for 99 parts; choose fewer"),
        (["--part", "0/2", "--fresh"], {}, "--fresh with --part 0/2: one part would remove what others made"),
    ],
)
def test_a_wrong_part_is_refused(config, flags, environment, says):
    command = [*COMMAND, "--source", config.source, "--out", config.out, *(f"{flag}" for flag in flags)]
    if "-1/2" in flags:
        command[-2:] = ["--part=-1/2"]
    done = subprocess.run(command, capture_output=True, text=True, env={**ALONE, **environment})
    assert done.returncode == 2 and says in done.stderr, done.stderr
    assert not config.out.parent.exists() or not list(config.out.parent.iterdir())


def test_what_counts_as_all_in_one(config, straight, monkeypatch):
    """A rank without a world size, one process, and an explicit part against torchrun's environment."""
    assert parts.chosen_part("", {}) is parts.chosen_part("", {"WORLD_SIZE": "4"}) is None
    assert parts.chosen_part("0/1", {"RANK": "1", "WORLD_SIZE": "2"}) is None
    assert parts.chosen_part("1/3", {"RANK": "0", "WORLD_SIZE": "2"}) == (1, 3)
    assert parts.chosen_part("", {"RANK": "1", "WORLD_SIZE": "2"}) == (1, 2)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    convert.main(config)
    assert contents(config.out.parent) == straight
