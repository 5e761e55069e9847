"""Broken images: 1,200 mutated JPEGs. Each decodes to Pillow's very pixels or gives a status; nothing crashes, hangs or
writes beside its buffer, and a loader ends with the image's name or yields whole batches. Converted, each is refused or
has Pillow's pixels, and all conversions give the same bytes. (Tables: test_beton.py.)
"""

import io
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.convert import ConvertConfig
from pipeline.convert import main as convert
from pipeline.errors import UserError
from pipeline.loader import make_loader
from pipeline.spec import BARLOW_TWINS_VIEWS, LoaderConfig
from pipeline.storage import workers as worker_processes
from pipeline.storage.beton import MODE_JPEG, file_rows, jpeg_bytes, open_beton
from pipeline.storage.decode import OK, STATUS_TEXT, decode_rgb, free_handle, make_handle

GUARD = 64  # bytes behind the pixels, which must stay as they are
SLOWEST_S = 2.0
STRICTER = ("cut off", "more than 500 scans")  # refused though Pillow shows something: grey, or a trap


def jpeg(seed: int, height: int, width: int, **options) -> bytes:
    rng, buffer = np.random.default_rng(seed), io.BytesIO()
    blocks = rng.integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), np.uint8)
    pixels = blocks.repeat(4, 0).repeat(4, 1)[:height, :width]
    Image.fromarray(pixels).save(buffer, "JPEG", quality=85, **options)
    return buffer.getvalue()


def cut(data, rng):
    return data[: rng.integers(1, len(data))]


def flip_bits(data, rng):
    changed = bytearray(data)
    for at in rng.integers(0, len(data), rng.integers(1, 9)):
        changed[at] ^= 1 << rng.integers(0, 8)
    return bytes(changed)


def zero_some(data, rng):
    first = rng.integers(0, len(data))
    count = min(int(rng.integers(1, 400)), len(data) - first)
    return data[:first] + bytes(count) + data[first + count :]


def other_size(data, rng):
    """Height or width in the frame header."""
    at = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2")) + 5 + 2 * int(rng.integers(0, 2))
    return data[:at] + rng.integers(0, 256, 2, np.uint8).tobytes() + data[at + 2 :]


def repeat_scans(data, rng):
    """All scans of a progressive JPEG many times over: 60,000 of them for a few bytes each would keep a core busy."""
    first = data.find(b"\xff\xda")
    return data[:first] + data[first:-2] * int(rng.integers(2, 400)) + data[-2:]


def splice(data, rng):
    other = jpeg(int(rng.integers(0, 100)), 40, 56)
    return data[: rng.integers(2, len(data))] + other[rng.integers(2, len(other)) :]


MUTATIONS = [cut, flip_bits, zero_some, other_size, repeat_scans, splice]


@pytest.fixture
def handle():
    """A decompressor; the compiled code is loaded, which no test's clock shall see."""
    handle = make_handle()
    decode_rgb(handle, np.frombuffer(b"no", np.uint8), 0, 2, MODE_JPEG, 1, 1, np.zeros(3, np.uint8))
    yield handle
    free_handle(handle)


def decode(handle, data: bytes, height: int, width: int) -> tuple[int, np.ndarray]:
    out = np.full(height * width * 3 + GUARD, 77, np.uint8)
    start = time.perf_counter()
    status = decode_rgb(handle, np.frombuffer(data, np.uint8), 0, len(data), MODE_JPEG, height, width, out)
    assert time.perf_counter() - start < SLOWEST_S
    assert (out[-GUARD:] == 77).all()
    return status, out[:-GUARD].reshape(height, width, 3)


def pillows(data: bytes) -> np.ndarray | None:
    try:
        return np.array(Image.open(io.BytesIO(data)).convert("RGB"))
    except (OSError, SyntaxError, ValueError):
        return None


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda f: f.__name__)
@pytest.mark.filterwarnings("ignore")  # Pillow's, about what it sees
def test_mutated_jpegs(handle, mutation):
    rng, counts = np.random.default_rng(MUTATIONS.index(mutation)), np.zeros(len(STATUS_TEXT), int)
    sound = [jpeg(seed, 40 + seed, 64 - seed, progressive=seed % 2 == 1) for seed in range(20)]
    for number in range(200):
        seed = number % 20
        data = mutation(sound[seed], rng)
        status, pixels = decode(handle, data, 40 + seed, 64 - seed)
        counts[status] += 1
        if status == OK:
            assert np.array_equal(pixels, pillows(data))
        else:
            assert decode(handle, sound[seed], 40 + seed, 64 - seed)[0] == OK  # the next image does not suffer
    assert counts[OK] < 200


def fault_after_a_warning(data, rng):
    """Before the second scan of a progressive JPEG two foreign bytes, a warning, and a marker that is fatal."""
    second = data.find(b"\xff\xda", data.find(b"\xff\xda") + 2)
    at = data.rindex(b"\xff\xc4", 0, second)  # its table stands before it
    return data[:at] + b"\0\0\xff\x64" + data[at:]


def converted(images: Path, out: Path, capsys, **options) -> tuple[dict, dict, dict]:
    """Name → (how, bytes) of what is stored, name → reason of what is skipped, and the files that were written."""
    capsys.readouterr()
    convert(ConvertConfig(out / "set.beton", images, skip_unreadable=True, **options))
    lines = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if line.startswith("skipped: ")]
    reasons = {Path(line.split()[1]).name: line.partition(" (")[2] for line in lines}
    opened = open_beton(out / "set.beton")
    rows = file_rows(opened)
    stored = {Path(row[4]).name: (row[2], jpeg_bytes(opened, i).tobytes()) for i, row in enumerate(rows)}
    return stored, reasons, {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.mark.filterwarnings("ignore")  # Pillow's, about what it sees
def test_mutated_jpegs_converted(tmp_path, capsys, handle, monkeypatch):
    """Against Pillow's verdict and bytes. Whatever the workers and however often, the same files come out."""
    rng = np.random.default_rng(7)
    sound = [jpeg(seed, 40 + seed, 64 - seed, progressive=seed % 2 == 1) for seed in range(20)]
    files = {}
    for number in range(300):
        kinds = (flip_bits, zero_some, flip_bits, splice, flip_bits, MUTATIONS[number % len(MUTATIONS)])
        mutation = kinds[number // 2 % len(kinds)] if number < 260 else fault_after_a_warning
        seed = number % 20 if number < 260 else number % 20 | 1
        files[f"{number:03d}.jpg"] = mutation(sound[seed], rng)
    (tmp_path / "images" / "class").mkdir(parents=True)
    for name, data in files.items():
        (tmp_path / "images" / "class" / name).write_bytes(data)
    monkeypatch.setattr(worker_processes.threading, "active_count", lambda: 1)
    for check, workers_of_runs in (("quick", (1, 2, 3, 1)), ("full", (2, 2))):
        runs = []
        for number, workers in enumerate(workers_of_runs):
            out = tmp_path / f"{check}-{number}"
            runs.append(converted(tmp_path / "images", out, capsys, workers=workers, check=check))
            monkeypatch.delitem(sys.modules, "torch", raising=False)  # the first has a fork server, as beside torch
        stored, reasons, _ = runs[0]
        assert all(run == runs[0] for run in runs) and stored.keys() | reasons.keys() == files.keys()
        for name, data in files.items():
            expected = pillows(data)
            if name in reasons:
                assert expected is None or reasons[name].startswith(STRICTER), (name, reasons[name])
                continue
            how, kept = stored[name]
            if how == "recoded":
                buffer = io.BytesIO()
                Image.fromarray(expected).save(buffer, "JPEG", quality=90, subsampling="4:2:0")
                assert kept == buffer.getvalue(), name
                continue
            assert how == "kept" and kept == data and expected is not None, name
            with Image.open(io.BytesIO(data)) as image:
                status, pixels = decode(handle, data, image.height, image.width)
            if status == OK:
                assert np.array_equal(pixels, expected), name
            else:  # what looks at the start alone has missed; the loader and --verify name it
                assert check == "quick"
        counts = np.unique([how for how, _ in stored.values()], return_counts=True)
        assert len(reasons) > 80 and len(counts[0]) == 2 and counts[1].min() > 10
        assert all(name in reasons for name in files if name >= "260")
    small = [converted(tmp_path / "images", tmp_path / f"{w}", capsys, workers=w, max_side=24) for w in (1, 3)]
    assert small[0] == small[1] and small[0][1].keys() == reasons.keys()  # resized, all of an image is decoded


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 30_000), (30_000, 1), (3, 65_500)])
def test_odd_sizes(handle, height, width):
    data = jpeg(0, height, width)
    status, pixels = decode(handle, data, height, width)
    assert status == OK and np.array_equal(pixels, pillows(data))


def test_a_bomb_of_scans_is_refused_quickly(handle):
    progressive = jpeg(0, 512, 512, progressive=True)
    first = progressive.find(b"\xff\xda")
    second = progressive.find(b"\xff\xda", first + 2)
    bomb = progressive[:first] + progressive[first:second] * 5000 + progressive[second:]
    assert decode(handle, bomb, 512, 512)[0] != OK


@pytest.mark.slow
def test_a_loader_names_the_image_or_yields_whole_batches(tmp_path):
    """150 files, one image of each damaged in place: each is named, also where it decodes as before.

    With stand-ins there are whole batches always, and one stand-in.
    """
    for seed in range(8):
        path = tmp_path / "images" / f"class_{seed % 2}" / f"{seed}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(seed, 40 + seed, 64 - seed, progressive=seed % 2 == 1))
    convert(ConvertConfig(tmp_path / "train.beton", tmp_path / "images", workers=1))
    beton, rng, named = open_beton(tmp_path / "train.beton"), np.random.default_rng(0), 0
    (tmp_path / "bad").mkdir()
    for path in tmp_path.glob("train.*"):
        shutil.copy(path, tmp_path / "bad" / path.name)
    config = LoaderConfig(tmp_path / "bad" / "train.beton", BARLOW_TWINS_VIEWS, 32, global_batch=4, workers=2)
    file = np.memmap(config.data, np.uint8, "r+")
    for number in range(150):
        sample = number % 8
        place = slice(beton.offsets[sample], beton.offsets[sample] + beton.sizes_bytes[sample])
        sound = file[place].tobytes()
        mutated = (flip_bits, zero_some, other_size)[number % 3](sound, rng)
        file[place] = np.frombuffer(mutated, np.uint8)
        changed, stopped = mutated != sound, False
        for policy in ("stop", "substitute"):
            loader = make_loader(replace(config, on_bad_image=policy))
            try:
                batches = list(loader.batches(0, 2))
                assert [view.shape for batch in batches for view in batch.views] == [(4, 3, 32, 32)] * 4
                assert sum(batch.substituted for batch in batches) == stopped
            except UserError as error:
                assert policy == "stop" and beton.file_names()[sample] in str(error)
                stopped = True
            finally:
                loader.close()
        assert stopped == changed
        named += stopped
        file[place] = np.frombuffer(sound, np.uint8)
    assert named > 140
