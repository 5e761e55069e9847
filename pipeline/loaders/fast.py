"""The fast loader's decoder: worker threads with libjpeg-turbo, one decode an image, its views while it is in cache.

A job is one call of a compiled function that holds no lock, so threads scale like processes, share the page cache and
the numba cache, and cost no pickling. The file is FFCV's; the pixels are Pillow's.

    views by     a job does                                  a batch is
    numba        decode → every view, image by image         the finished views
    a GPU        decode into one (pinned) buffer a batch     its pixels, side by side
"""

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import NamedTuple

import numpy as np
import torch

from pipeline.compiled import jit
from pipeline.loaders.parts import Decoded, NumbaViews, PartsLoader, Request, ahead_of
from pipeline.loaders.stream import view_params
from pipeline.storage.decode import OK, STATUS_TEXT, decode_rgb, free_handle, make_handle
from pipeline.views.augment_cpu import apply_view

DECODED_AHEAD = 1  # batches that wait in the threads' queue while one is finished


@jit
def _decode_and_view(handle, data, ids, columns, params, bicubic, pixels, scratch, table, first, views, status):
    """Decodes each image once and makes its V views; a status other than OK leaves that image's views unset.

    The images are number first, first + 1, … of the batch; views (V, B, H, W, 3) and status (B,) are the whole
    batch's, not slices of it: one layout, so that one compiled version serves every number of views and jobs.
    """
    offsets, sizes, modes, heights, widths = columns
    for b in range(len(ids)):
        i = ids[b]
        height, width = heights[i], widths[i]
        at = first + b
        status[at] = decode_rgb(handle, data, offsets[i], sizes[i], modes[i], height, width, pixels)
        if status[at] == OK:
            image = pixels[: height * width * 3].reshape(height, width, 3)
            for v in range(len(bicubic)):
                apply_view(image, params, b, v, bicubic[v], table, scratch, views[v, at])


@jit
def _decode(handle, data, ids, columns, starts, pixels, status):
    """Decodes images side by side into one buffer, each (h, w, 3) from its byte of `starts` on."""
    offsets, sizes, modes, heights, widths = columns
    for b in range(len(ids)):
        i = ids[b]
        height, width = heights[i], widths[i]
        own = pixels[starts[b] : starts[b] + height * width * 3]
        status[b] = decode_rgb(handle, data, offsets[i], sizes[i], modes[i], height, width, own)


class _Begun(NamedTuple):
    """A batch that the workers are at; as in Decoded, and each image's status (B,)."""

    pixels: torch.Tensor
    starts: np.ndarray | None
    status: np.ndarray
    jobs: list[Future]


class DecoderThreads:
    """The workers decode a batch into one buffer."""

    judges, lasting = True, False

    def __init__(self, loader: PartsLoader) -> None:
        self.loader, self.dataset = loader, loader.dataset
        d = self.dataset
        self._columns = (d.offsets, d.sizes_bytes, d.modes, d.heights, d.widths)
        self._thread = threading.local()

    def _handle(self) -> np.ndarray:
        """The calling thread's decoder."""
        if not hasattr(self._thread, "handle"):
            self._thread.handle = make_handle()
            self.loader.at_close.callback(free_handle, self._thread.handle)
        return self._thread.handle

    def side_by_side(self, ids: np.ndarray) -> tuple[np.ndarray, int]:
        """Where each of these images starts in one buffer of all of them, (B,); the buffer's bytes."""
        size_bytes = self.dataset.heights[ids] * self.dataset.widths[ids] * 3
        ends = np.cumsum(size_bytes)
        return ends - size_bytes, int(ends[-1:].sum())

    def _job(self, ids: np.ndarray, starts: np.ndarray, pixels: np.ndarray, status: np.ndarray) -> None:
        _decode(self._handle(), self.dataset.data, ids, self._columns, starts, pixels, status)

    def begin(self, request: Request) -> _Begun:
        """Gives the workers a batch to decode."""
        ids, status = request.ids, np.zeros(len(request.ids), np.int64)
        starts, size_bytes = self.side_by_side(ids)
        pixels = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=self.loader.stream is not None)
        jobs = [
            self.loader.pool.submit(self._job, ids[share], starts[share], pixels.numpy(), status[share])
            for share in self.loader.shares(len(ids))
        ]
        return _Begun(pixels, starts, status, jobs)

    def finish(self, request: Request, begun: _Begun) -> bool:
        """Waits; whether an image cannot be decoded. Raises UserError where nothing is to stand in for it."""
        for job in begun.jobs:
            job.result()
        for b in np.flatnonzero(begun.status):
            self.loader.bad.note(int(request.ids[b]), STATUS_TEXT[begun.status[b]])
        return bool(begun.status.any())

    def decoded(self, requests: Iterator[Request]) -> Iterator[Decoded]:
        """The batches, decoded again with stand-ins where an image of them turns out to be bad."""
        all_begun = ((request, self.begin(request)) for request in requests)
        for request, begun in ahead_of(DECODED_AHEAD, all_begun):
            while self.finish(request, begun):
                request = request._replace(ids=self.loader.bad.replaced(request.epoch, request.wanted))
                begun = self.begin(request)
            yield Decoded(request, begun.pixels, begun.starts)


class DecodeAndView(DecoderThreads):
    """The workers make an image's views by NumbaViews' kernels right after its decode, in one compiled call."""

    def __init__(self, loader: PartsLoader, views: NumbaViews) -> None:
        super().__init__(loader)
        self.views = views
        self._image_bytes = int((self.dataset.heights * self.dataset.widths)[loader.ids].max()) * 3

    def _view_job(self, request: Request, share: slice, levels: np.ndarray, status: np.ndarray) -> None:
        ids, views = request.ids[share], self.views
        if not hasattr(self._thread, "pixels"):
            self._thread.pixels = np.empty(self._image_bytes, np.uint8)
        _decode_and_view(
            self._handle(),
            self.dataset.data,
            ids,
            self._columns,
            view_params(self.loader.config, self.dataset, request.epoch, ids),
            views.bicubic,
            self._thread.pixels,
            views.scratch(levels.shape[2]),
            views.table,
            share.start,
            levels,
            status,
        )

    def begin(self, request: Request) -> _Begun:
        """Gives the workers a batch of views to make."""
        levels, status = self.views.empty(request), np.zeros(len(request.ids), np.int64)
        jobs = [
            self.loader.pool.submit(self._view_job, request, share, levels.numpy(), status)
            for share in self.loader.shares(len(request.ids))
        ]
        return _Begun(levels, None, status, jobs)


def make_decoder_threads(loader: PartsLoader) -> DecoderThreads:
    """The Pixels of --loader fast."""
    return DecodeAndView(loader, loader.views) if isinstance(loader.views, NumbaViews) else DecoderThreads(loader)
