"""What the tests of conversions share: a conversion as a command, images, ways to stop one."""

import hashlib
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.storage import beton_writer
from pipeline.storage.sources.open import open_source
from pipeline.storage.sources.source import Source
from tests.support import REPO

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


def living(group: int) -> list[str]:
    """Processes of a process group that still run."""
    listing = subprocess.run(["ps", "-eo", "pgid=,stat=,args="], capture_output=True, text=True).stdout
    rows = [line.split(maxsplit=2) for line in listing.splitlines()]
    return [row[2] for row in rows if int(row[0]) == group and not row[1].startswith("Z")]


def stop_after(monkeypatch, count: int, error: type[BaseException] | Exception = KeyboardInterrupt) -> None:
    """Makes the writer fail at its `count`-th image."""
    append = beton_writer.BetonWriter.append

    def appending(writer, *arguments):
        if writer.done == count:
            raise error
        append(writer, *arguments)

    monkeypatch.setattr(beton_writer.BetonWriter, "append", appending)


def wait_for_bytes(out: Path, megabytes: int, process: subprocess.Popen) -> None:
    """Until so much of the file is there; the journal, which waits for the disk, may come much later."""
    partial = out.with_suffix(".beton.partial")
    while process.poll() is None and not (partial.exists() and partial.stat().st_size > megabytes * 1_000_000):
        time.sleep(0.01)
