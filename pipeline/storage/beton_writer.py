"""Writes one .beton so that it can be stopped at any moment and resumed, and appears only when finished.

    x.beton.partial   room for the tables, then the images in order
    x.beton.journal   a line of settings, then one ROW an image
    x.beton.writing   there while a process writes: one at a time (OneWriter)

Four times a second the partial file is flushed to the disk, and only then the journal gets the rows of what was
flushed: a row never lacks its image, whether the process is killed or the power fails. What lies behind the
last row's image is cut off and made again.
"""

import contextlib
import ctypes
import hashlib
import json
import os
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from pipeline.disk import flush, flush_folder, write_whole
from pipeline.errors import UserError
from pipeline.one_writer import OneWriter
from pipeline.storage import beton
from pipeline.storage.sources.source import Source, Stamp
from pipeline.storage.store import HOW, SKIPPED, ImageBytes

CHECKPOINT_S = 0.25  # a killed conversion repeats about this much
ROOM_BYTES = 64 << 20  # blocks set aside at a time

_libc = ctypes.CDLL(None)
_libc.fallocate64.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]

ROW = np.dtype(
    {
        "names": ["how", "mode", "width", "height", "offset", "bytes", "sha256", "stamp"],
        "formats": ["<u1", "<u1", "<u2", "<u2", "<u8", "<u8", ("<u1", 32), ("<i8", 2)],
    }
)
JOURNAL_VERSION = 2


def _write_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    """`os.pwrite` of all of it; it may stop early, on a full disk for one."""
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def remove_leftovers(path: Path) -> None:
    """What a process left beside a finished file that was killed just after the file got its name."""
    journal, writing = path.with_suffix(".beton.journal"), path.with_suffix(".beton.writing")
    if journal.exists() or writing.exists():
        with contextlib.suppress(UserError), OneWriter(writing, str(path)):  # unless a process is at work there
            journal.unlink(missing_ok=True)


def _header(identity: dict) -> bytes:
    """The journal's first line."""
    return json.dumps({"journal": JOURNAL_VERSION} | identity, sort_keys=True).encode() + b"\n"


def _rows(content: bytes, images: int, header: bytes) -> np.ndarray:
    """The whole rows of a journal, up to `images`."""
    count = min((len(content) - len(header)) // ROW.itemsize, images)
    return np.frombuffer(content, ROW, count, len(header))


def flushed_rows(path: Path, images: int, identity: dict) -> np.ndarray:
    """(done,) ROW: what a half-finished file surely has, whoever writes it; none if it is missing or another one's."""
    journal, header = path.with_suffix(".beton.journal"), _header(identity)
    content = journal.read_bytes() if journal.exists() and path.with_suffix(".beton.partial").exists() else b""
    return _rows(content, images, header) if content.startswith(header) else np.zeros(0, ROW)


def state_sha256(stamps: np.ndarray) -> str:
    """The digest of all images' stamps, (N, 2) int64: what the source was when it was converted."""
    return hashlib.sha256(np.ascontiguousarray(stamps, "<i8").tobytes()).hexdigest()


class BetonWriter:
    """The half-finished file of one conversion of `images` images; `done` of them are in it.

    `identity` names settings and source: a half-finished file of another identity is started again, as is any
    with `fresh`, which removes a finished file too. Raises UserError if another process is writing the same file.
    """

    def __init__(self, path: Path, images: int, identity: dict, *, fresh: bool = False):
        self.path = path
        self.partial_path = path.with_suffix(".beton.partial")
        self.journal_path = path.with_suffix(".beton.journal")
        self._identity = identity
        self._header = _header(identity)
        self._rows = np.zeros(images, ROW)
        self._start = beton.data_start(images)
        self.done = self._journaled = 0
        self._end = self._room_end = self._start
        self._flushing: Future[None] | None = None
        self._one = OneWriter(path.with_suffix(".beton.writing"), str(path))
        try:
            self._journal = os.open(self.journal_path, os.O_RDWR | os.O_CREAT, 0o644)
            self._partial = os.open(self.partial_path, os.O_RDWR | os.O_CREAT, 0o644)
            if fresh:
                for old in (path, beton.manifest_path(path), beton.files_path(path)):
                    old.unlink(missing_ok=True)
            if fresh or not self._resume():
                self._begin()
        except BaseException:
            self._one.close()
            raise
        self._checkpoint_at = time.monotonic() + CHECKPOINT_S
        self._flusher = ThreadPoolExecutor(1)

    def _resume(self) -> bool:
        content = os.pread(self._journal, os.fstat(self._journal).st_size, 0)
        if not content.startswith(self._header):
            return False
        rows = _rows(content, len(self._rows), self._header)
        count = len(rows)
        self._rows[:count] = rows
        if os.fstat(self._partial).st_size < self._end_of(count):
            self._rows[:] = 0
            return False
        self.go_back(count)
        return True

    def _end_of(self, count: int) -> int:
        """Where the data of the first `count` images end in the partial file."""
        stored = self._rows[:count][self._rows["how"][:count] != SKIPPED]
        return int(stored["offset"][-1] + stored["bytes"][-1]) if len(stored) else self._start

    def go_back(self, count: int) -> None:
        """Forgets all but the first `count` images."""
        self._join_flush()  # it writes rows of images that are forgotten here
        end = self._end_of(count)
        self._one.require()
        os.ftruncate(self._journal, len(self._header) + count * ROW.itemsize)
        flush(self._journal, only_data=True)  # before the images that its rows name are overwritten
        os.ftruncate(self._partial, end)
        self._rows[count:] = 0
        self.done, self._journaled, self._end, self._room_end = count, count, end, end

    def _begin(self) -> None:
        os.ftruncate(self._journal, 0)
        os.ftruncate(self._partial, 0)
        os.ftruncate(self._partial, self._start)
        _write_all(self._journal, self._header, 0)

    @property
    def bytes_written(self) -> int:
        """Bytes of images that are in the file."""
        return self._end - self._start

    def skipped(self) -> np.ndarray:
        """Positions in the source of the images left out so far."""
        return np.flatnonzero(self._rows["how"][: self.done] == SKIPPED)

    def stamps(self) -> np.ndarray:
        """Those of the images appended so far, (done, 2) int64."""
        return self._rows["stamp"][: self.done]

    def append(self, stored: ImageBytes | None, stamp: Stamp) -> None:
        """The next image of the source, or None if it is left out."""
        self._one.require()
        if stored is not None:
            offset, size = beton.place(self._end, stored.size_bytes), stored.size_bytes
            if offset + size > self._room_end:
                self._make_room(offset + size)
            _write_all(self._partial, stored.data, offset)
            self._rows[self.done] = (
                *(stored.how, stored.mode, stored.width, stored.height, offset, size),
                *(np.frombuffer(stored.sha256, np.uint8), stamp),
            )
            self._end = offset + size
        else:
            self._rows["stamp"][self.done] = stamp
        self.done += 1
        if time.monotonic() >= self._checkpoint_at and (self._flushing is None or self._flushing.done()):
            self._join_flush()
            self._flushing = self._flusher.submit(self._flush, self.done)

    def _make_room(self, end: int) -> None:
        """Has the file system set blocks aside, which it does for many images faster than for one after the other.

        If it cannot, writing does it, or says that the disk is full.
        """
        self._room_end = end + ROOM_BYTES
        _libc.fallocate64(self._partial, 0, end, ROOM_BYTES)

    def _join_flush(self) -> None:
        if self._flushing is not None:
            self._flushing.result()

    def _flush(self, done: int) -> None:
        """Runs beside the appending, which continues: the disk never waits for images."""
        self._one.require()
        flush(self._partial, only_data=True)
        at = len(self._header) + self._journaled * ROW.itemsize
        _write_all(self._journal, self._rows[self._journaled : done].tobytes(), at)
        flush(self._journal, only_data=True)
        self._journaled = done
        self._checkpoint_at = time.monotonic() + CHECKPOINT_S

    def checkpoint(self) -> None:
        """Makes everything appended so far survive."""
        self._join_flush()
        self._flush(self.done)

    def finish(self, source: Source, settings: dict) -> dict:
        """Writes the tables, the file list and the manifest, then gives the file its name. Returns the manifest."""
        self.checkpoint()
        kept = np.flatnonzero(self._rows["how"] != SKIPPED)
        if len(kept) == 0:
            raise UserError(f"none of the {len(self._rows)} images of {source.where} can be read; nothing was written")
        rows, labels = self._rows[kept], source.labels[kept]
        samples, allocations = np.zeros(len(kept), beton.SAMPLE), np.zeros(len(kept), beton.ALLOCATION)
        for name in ("mode", "width", "height", "offset"):
            samples[name] = rows[name]
        samples["label"] = labels
        allocations["sample"] = np.arange(len(kept))
        for name in ("offset", "bytes"):
            allocations[name] = rows[name]
        head = beton.head_bytes(len(kept), self._end)
        _write_all(self._partial, head + samples.tobytes(), 0)
        _write_all(self._partial, allocations.tobytes(), self._end)
        os.ftruncate(self._partial, self._end + allocations.nbytes)
        flush(self._partial)
        files = _file_list(source, kept, rows)
        manifest = {
            "format_version": beton.FORMAT_VERSION,
            "images": len(kept),
            "bytes": self._end + allocations.nbytes,
            "classes": source.classes,
            **({} if source.labelled else {"labelled": False}),
            "images_by_class": dict(
                zip(source.classes, np.bincount(labels, minlength=len(source.classes)).tolist(), strict=True)
            ),
            "source": {
                **{"kind": source.kind, "split": source.split, "images": len(source)},
                "state_sha256": state_sha256(self.stamps()),
            },
            "left_out": dict(sorted(source.left_out.items())),
            "settings": settings,
            "stored": {how: int((rows["how"] == i).sum()) for i, how in enumerate(HOW) if i != SKIPPED},
            "skipped": [source.names[i] for i in self.skipped()],
            "tables_sha256": beton.tables_sha256(head, samples, allocations),
            "files_sha256": hashlib.sha256(files).hexdigest(),
            "identity": self._identity,
        }
        self._publish(files, (json.dumps(manifest, indent=1) + "\n").encode())
        return manifest

    def _publish(self, files: bytes, manifest: bytes) -> None:
        """The names, in an order in which no moment shows a .beton beside another file's manifest."""
        self._one.require()
        self.path.unlink(missing_ok=True)
        write_whole(beton.files_path(self.path), files, alone=True)
        write_whole(beton.manifest_path(self.path), manifest, alone=True)
        os.replace(self.partial_path, self.path)
        flush_folder(self.path.parent)
        self.journal_path.unlink()

    def __enter__(self) -> "BetonWriter":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Closes the files; what was appended and not yet flushed is flushed by `checkpoint`, not here."""
        self._flusher.shutdown()
        try:
            os.close(self._partial)
            os.close(self._journal)
        finally:
            self._one.close()


def _file_list(source: Source, kept: np.ndarray, rows: np.ndarray) -> bytes:
    """`x.files.tsv`: one line a sample."""
    lines = ["sample\tlabel\tstored\tsha256\tfile"]
    lines += [
        f"{sample}\t{source.labels[i]}\t{HOW[how]}\t{sha256.tobytes().hex()}\t{source.names[i]}"
        for sample, (i, how, sha256) in enumerate(zip(kept, rows["how"], rows["sha256"], strict=True))
    ]
    return ("\n".join(lines) + "\n").encode("utf-8", "surrogateescape")
