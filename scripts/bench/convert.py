"""How fast images are converted, beside FFCV's own DatasetWriter, after checking what both have written.

    python scripts/bench/convert.py --images DIR [--count 16000] [--max-side 400] [--json FILE]

DIR is a folder with one folder of JPEGs a class; its files are copied until there are --count, so that no start of a
program counts for much. Every candidate is a program that runs from its start to its end, alone, one after the other
in every repeat, with one worker process a core; each figure is the mean over the repeats with its 95 % interval.
Close other programs.

    ffcv_jpg          DatasetWriter, RGBImageField(write_mode="jpg"), quality 90, from torchvision's ImageFolder
    passthrough       pipeline/convert.py, JPEGs kept byte for byte
    passthrough_full  the same with --check full: every image is decoded once
    ffcv_resized      DatasetWriter with max_resolution=--max-side
    resized           pipeline/convert.py with --max-side

A ratio is that of the two programs in the same repeat. Ours checks every file, keeps checksums and does not end before
the disk has all bytes; FFCV's writer leaves that to the system.
"""

import hashlib
import io
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from measure import Interval, as_text, class_images, in_turn, interval, machine, write_json
from PIL import Image

from pipeline.command import REPO, run_command
from pipeline.errors import UserError
from pipeline.storage.beton import file_rows, open_beton

CHECKED_IMAGES = 200
ALIKE_255 = 20.0  # mean difference of one photograph, encoded again or resized by another filter; of two, about 60
FFCV = """
import sys
from ffcv.fields import IntField, RGBImageField
from ffcv.writer import DatasetWriter
from torchvision.datasets import ImageFolder

images, out, workers, side = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]) or None
field = RGBImageField(write_mode="jpg", max_resolution=side, jpeg_quality=90)
writer = DatasetWriter(out, {"image": field, "label": IntField()}, num_workers=workers)
writer.from_indexed_dataset(ImageFolder(images))
"""
RATIOS = {"passthrough": "ffcv_jpg", "passthrough_full": "ffcv_jpg", "resized": "ffcv_resized"}


@dataclass(frozen=True)
class BenchConfig:
    """What to measure."""

    images: Path
    """A folder with one folder of JPEGs a class."""
    count: int = 16000
    """Images to convert."""
    max_side: int = 400
    """Longest side of the resized images, px."""
    repeats: int = 5
    """How often each candidate runs."""
    json: Path | None = None
    """Where to write the record."""


def copy_images(source: Path, target: Path, count: int) -> None:
    """`count` files of their own, the source's images over and over."""
    files = class_images(source)
    for number, path in enumerate(itertools.islice(itertools.cycle(files), count)):
        folder = target / path.parent.name
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / f"{number // len(files):04d}-{path.name}")


def commands(images: Path, out: Path, config: BenchConfig) -> dict[str, list]:
    """name → command line; each writes `out`/<name>.beton."""
    workers = len(os.sched_getaffinity(0))
    ours = [sys.executable, REPO / "pipeline" / "convert.py", "--source", images, "--workers", workers, "--quality", 90]
    theirs = [sys.executable, "-c", FFCV, images]
    keep = ["--max-side", 65535]
    return {
        "ffcv_jpg": [*theirs, out / "ffcv_jpg.beton", workers, 0],
        "passthrough": [*ours, *keep, "--out", out / "passthrough.beton"],
        "passthrough_full": [*ours, *keep, "--check", "full", "--out", out / "passthrough_full.beton"],
        "ffcv_resized": [*theirs, out / "ffcv_resized.beton", workers, config.max_side],
        "resized": [*ours, "--max-side", config.max_side, "--out", out / "resized.beton"],
    }


def run(command: list) -> float:
    """Seconds from the start of a program to its end."""
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": ""}  # modules are compiled in the first, untimed run
    os.sync()  # what the program before left to be written is not this one's
    start = time.perf_counter()
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise UserError(f"{' '.join(map(str, command[:2]))} … failed: {done.stderr.strip().splitlines()[-1]}")
    return seconds


# ---- checking ----


def stored_jpegs(path: Path, ids: np.ndarray) -> tuple[int, list[bytes]]:
    """How many samples FFCV's own reader finds in a file, ours or its own, and some of them, all stored as JPEG."""
    from ffcv.reader import Reader

    reader, data = Reader(str(path)), np.memmap(path, np.uint8, "r")
    rows, sizes = reader.metadata["f0"], {int(a["ptr"]): int(a["size"]) for a in reader.alloc_table}
    assert not rows["mode"].any()
    starts = rows["data_ptr"][ids].tolist()
    return len(rows), [data[start : start + sizes[start]].tobytes() for start in starts]


def mean_difference_255(ours: bytes, theirs: bytes) -> float:
    """How far two JPEGs are apart. FFCV rounds sizes down, we to the nearest: compared at FFCV's size."""
    images = [Image.open(io.BytesIO(jpeg)).convert("RGB") for jpeg in (ours, theirs)]
    a, b = (np.asarray(image.resize(images[1].size), np.float32) for image in images)
    return float(np.abs(a - b).mean())


def check(images: Path, out: Path) -> dict:
    """Raises AssertionError unless all candidates have written the same photographs; a record of what was found."""
    names = sorted(str(path.relative_to(images)) for path in images.glob("*/*"))
    chosen = np.unique(np.linspace(0, len(names) - 1, CHECKED_IMAGES).astype(int))
    record = {"images": len(names), "images_compared": len(chosen)}
    for ours, theirs in RATIOS.items():
        beton, ffcv_file = open_beton(out / f"{ours}.beton"), out / f"{theirs}.beton"
        (count, jpegs), (ffcv_count, ffcv_jpegs) = stored_jpegs(beton.path, chosen), stored_jpegs(ffcv_file, chosen)
        assert beton.file_names() == names and count == ffcv_count == len(names)
        rows = file_rows(beton)
        for i, jpeg in zip(chosen, jpegs, strict=True):
            _, _, how, sha256, *_ = rows[i]
            assert hashlib.sha256(jpeg).hexdigest() == sha256
            assert how != "kept" or jpeg == (images / names[i]).read_bytes()
        differences = [mean_difference_255(*pair) for pair in zip(jpegs, ffcv_jpegs, strict=True)]
        assert max(differences) < ALIKE_255, f"{ours} and {theirs} differ by {max(differences):.1f} of 255"
        record[ours] = beton.manifest["stored"] | {
            "bytes": beton.manifest["bytes"],
            "ffcv_bytes": ffcv_file.stat().st_size,
            "mean_difference_255": round(float(np.mean(differences)), 3),
            "largest_mean_difference_255": round(max(differences), 3),
        }
    return record


# ---- measuring ----


def rounded(values: np.ndarray) -> Interval:
    return interval(values, 2)


def print_record(record: dict) -> None:
    for name, speed in record["images_per_s"].items():
        ratio = record["times_ffcv"].get(name)
        beside = f"{as_text(ratio, 2)} × {RATIOS[name]}" if ratio else ""
        print(f"{name:18s} {as_text(speed, 1):>20s} images/s    {beside}")


def main(config: BenchConfig) -> None:
    if config.repeats < 2 or config.count < 1:
        raise UserError("--repeats must be at least 2, --count at least 1")
    with tempfile.TemporaryDirectory() as folder:
        images, out = Path(folder) / "images", Path(folder) / "out"
        copy_images(config.images, images, config.count)
        out.mkdir()
        programs = commands(images, out, config)
        for command in programs.values():
            run(command)
        checks = check(images, out)

        def run_alone(command: list) -> float:
            for path in out.iterdir():  # what another program has written
                path.unlink()
            return run(command)

        turns = {name: partial(run_alone, command) for name, command in programs.items()}
        *_, found = in_turn(turns, config.repeats, warm_up=False)
    seconds = {name: np.array(values) for name, values in found.items()}
    record = {
        "machine": machine("pillow", "numba", "ffcv"),
        "max_side_px": config.max_side,
        "checks": checks,
        "seconds": {name: rounded(values) for name, values in seconds.items()},
        "images_per_s": {name: rounded(config.count / values) for name, values in seconds.items()},
        "times_ffcv": {ours: rounded(seconds[theirs] / seconds[ours]) for ours, theirs in RATIOS.items()},
        "repeats": config.repeats,
    }
    print_record(record)
    write_json(config.json, record)


if __name__ == "__main__":
    run_command(BenchConfig, main)
