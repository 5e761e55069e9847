"""Memory of a loader over a file of 2 GB, page cache not counted. As a program, this file is the child that measures.

What a loader holds is the batches in the making (five of them at most), scratch memory per worker and 50 bytes a
sample, whatever the size of the file: at 224 px a batch of 64 is 77 MB.
"""

import hashlib
import json
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.convert import ConvertConfig
from pipeline.convert import main as convert
from pipeline.storage import beton

FILE_BYTES = 2 * 10**9
ALLOWED_BYTES = 600 * 10**6
STEPS, BATCH = 24, 64


def repeated_beton(source: Path, out: Path, least_bytes: int) -> None:
    """A .beton with the images of a small one over and over, until it has so many bytes."""
    small = beton.open_beton(source)
    first, last = beton.data_start(len(small)), int(small.offsets[-1] + small.sizes_bytes[-1])
    span = -(-(last - first) // beton.PAGE_BYTES) * beton.PAGE_BYTES
    times = -(-least_bytes // span)
    count = times * len(small)
    start = beton.data_start(count)
    samples, allocations = np.zeros(count, beton.SAMPLE), np.zeros(count, beton.ALLOCATION)
    offsets = (start + span * np.arange(times)[:, None] + small.offsets - first).ravel()
    for name, column in (("mode", small.modes), ("width", small.widths), ("height", small.heights)):
        samples[name] = np.tile(column, times)
    samples["label"] = np.tile(small.labels, times)
    samples["offset"] = allocations["offset"] = offsets
    allocations["sample"], allocations["bytes"] = np.arange(count), np.tile(small.sizes_bytes, times)
    head = beton.head_bytes(count, start + span * times)
    with open(out, "wb") as file:
        file.write(head + samples.tobytes())
        for i in range(times):
            file.seek(start + i * span)
            file.write(small.data[first:last])
        file.seek(start + span * times)
        file.write(allocations.tobytes())
    lines = ["sample\tlabel\tstored\tsha256\tfile"]
    lines += ["\t".join([str(i), *row[1:]]) for i, row in enumerate(beton.file_rows(small) * times)]
    files = ("\n".join(lines) + "\n").encode()
    beton.files_path(out).write_bytes(files)
    manifest = small.manifest | {"images": count, "bytes": out.stat().st_size}
    manifest["tables_sha256"] = beton.tables_sha256(head, samples, allocations)
    manifest["files_sha256"] = hashlib.sha256(files).hexdigest()
    beton.manifest_path(out).write_text(json.dumps(manifest))


@pytest.fixture
def large_beton(imagenet_sample, tmp_path):
    for path in imagenet_sample:
        target = tmp_path / "images" / path.parent.name / path.name
        target.parent.mkdir(parents=True)
        target.symlink_to(path)
    convert(ConvertConfig(tmp_path / "small.beton", tmp_path / "images"))
    repeated_beton(tmp_path / "small.beton", tmp_path / "large.beton", FILE_BYTES)
    yield tmp_path / "large.beton"
    (tmp_path / "large.beton").unlink()


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(large_beton):
    assert large_beton.stat().st_size >= FILE_BYTES
    done = subprocess.run([sys.executable, __file__, large_beton], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    grown = json.loads(done.stdout.splitlines()[-1])
    assert grown["control"] > ALLOWED_BYTES  # the measure sees memory that is taken
    for order in ("shuffled", "blocks"):
        assert BATCH * 2 * 224 * 224 * 3 * 4 < grown[order] < ALLOWED_BYTES, grown


# ---- the child ----


def own_bytes() -> int:
    """What this process has in memory, pages of files left out."""
    lines = dict(line.split(":\t") for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(lines[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem"))


class Peak:
    """The most that own_bytes() says while this context lasts, above what it said at first."""

    def __enter__(self) -> "Peak":
        self.grown, self.begin, self.ended = 0, own_bytes(), threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.ended.is_set():
            self.grown = max(self.grown, own_bytes() - self.begin)
            time.sleep(0.002)

    def __exit__(self, *_) -> None:
        self.ended.set()
        self.thread.join()


def measure(path: Path) -> dict[str, int]:
    import pipeline.loaders.fast  # noqa: F401
    from pipeline.loader import make_loader
    from pipeline.spec import BARLOW_TWINS_VIEWS, Blocks, LoaderConfig

    grown, config = {}, LoaderConfig(path, BARLOW_TWINS_VIEWS, 224, BATCH)
    for order, blocks in (("shuffled", None), ("blocks", Blocks(32, 64))):
        with Peak() as peak:
            loader = make_loader(replace(config, blocks=blocks))
            for _ in loader.batches(0, STEPS):
                pass
            loader.close()
            del loader
        grown[order] = peak.grown
    with Peak() as peak:
        taken = np.ones(ALLOWED_BYTES + 10**7, np.uint8)
        time.sleep(0.1)
        del taken
    return grown | {"control": peak.grown}


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]))))
