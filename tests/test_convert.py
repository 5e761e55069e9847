"""Conversions as a user runs them: what comes out, and what a wrong input is told."""

import hashlib
import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import convert
from pipeline.convert import ConvertConfig
from pipeline.errors import UserError
from pipeline.storage import beton
from pipeline.storage.sources.source import Source
from tests.conversions import COMMAND, as_source, contents, drawn, run, stop_after
from tests.support import REPO

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


def test_nothing_readable(tmp_path, out):
    for i in range(3):
        (tmp_path / "images" / "cat").mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / "cat" / f"{i}.jpg").write_bytes(b"no")
    with pytest.raises(UserError, match="none of the 3 images"):
        convert.main(ConvertConfig(out, tmp_path / "images", workers=1, skip_unreadable=True))
    assert not out.exists()


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
