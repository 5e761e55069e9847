"""A dataset that is cut short while it is in use is named; other mapped files are not ours to name."""

import shutil
import signal
import subprocess
import sys

import pytest

from tests.support import REPO

READS = """
import os, sys
from pathlib import Path
import numpy as np
from pipeline.storage.mapped import map_file
path, other = Path(sys.argv[1]), Path(sys.argv[2])
ours, theirs = map_file(path), np.memmap(other, np.uint8, "r")
assert int(ours[-1]) == int(theirs[-1]) == 1
os.truncate(path, 5000)
os.truncate(other, 5000)
assert int(ours[4999]) == 1
print(int((ours if sys.argv[3] == "ours" else theirs)[9000]))
"""
CONVERTS = """
import os, sys
from pathlib import Path
from pipeline.storage.sources.open import open_source
path = Path(sys.argv[1]) / "unlabeled_X.bin"
pixels = open_source(path.parent, "unlabelled").pixels
os.truncate(path, 5000)
assert int(pixels[0, 0, 0, 0]) == 0
print(int(pixels[1, 0, 0, 0]))
"""
TRAINS = """
import os, sys
from pathlib import Path
from pipeline.loader import make_loader
from pipeline.spec import BARLOW_TWINS_VIEWS, LoaderConfig
path = Path(sys.argv[1])
config = LoaderConfig(path, BARLOW_TWINS_VIEWS, 32, global_batch=8, workers=2)
with make_loader(config) as loader:
    for batch in loader.batches(0, 100):
        os.truncate(path, 8 << 20)  # where the images begin
"""


def run(program: str, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=REPO)


@pytest.mark.parametrize("whose", ["ours", "theirs"])
def test_whose_file_it_is(tmp_path, whose):
    for name in ("ours", "theirs"):
        (tmp_path / name).write_bytes(b"\1" * 20000)
    done = run(READS, tmp_path / "ours", tmp_path / "theirs", whose)
    if whose == "theirs":
        assert (done.returncode, done.stderr, done.stdout) == (-signal.SIGBUS, "", "")
    else:
        assert done.returncode == 2 and done.stdout == ""
        assert f"error: {tmp_path / 'ours'} can no longer be read at byte 9000: it was cut short" in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


def test_pixels_that_a_conversion_reads(tmp_path):
    """STL-10's, 27,648 bytes an image, which are read from where they lie."""
    with open(tmp_path / "unlabeled_X.bin", "wb") as file:
        file.truncate(100_000 * 27648)
    done = run(CONVERTS, tmp_path)
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(f"error: {tmp_path}/unlabeled_X.bin can no longer be read at byte 27648: ")
    assert (done.returncode, done.stdout) == (2, "")


@pytest.mark.slow
def test_while_batches_are_made(small_beton, tmp_path):
    for path in small_beton.parent.glob("train.*"):
        shutil.copy(path, tmp_path / path.name)
    done = run(TRAINS, tmp_path / "train.beton")
    (line,) = done.stderr.strip().splitlines()  # of several threads that read it
    assert line.startswith(f"error: {tmp_path}/train.beton can no longer be read at byte ")
    assert done.returncode == 2
