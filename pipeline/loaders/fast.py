"""The fast loader's decoder: worker threads with libjpeg-turbo, one decode an image, its views while it is in cache.

A job is one call of a compiled function that holds no lock, so threads scale like processes, share the page cache and
the numba cache, and cost no pickling. The file is FFCV's; the pixels are Pillow's.
"""

import threading
from collections.abc import Iterator
from concurrent.futures import Future

import numpy as np
import torch

from pipeline.compiled import jit
from pipeline.loaders.base import view_params
from pipeline.loaders.parts import NumbaViews, PartsLoader, Pixels, Request, ahead_of
from pipeline.storage.beton import Beton
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


class _Own:
    """What a worker thread has of its own, as long as it lives: a decoder, and memory for one image."""

    handle: np.ndarray | None = None  # none is made where libturbojpeg is missing

    def __init__(self, image_bytes: int) -> None:
        self.handle, self.pixels = make_handle(), np.empty(image_bytes, np.uint8)

    def __del__(self) -> None:
        if self.handle is not None:
            free_handle(self.handle)


class DecoderThreads(Pixels):
    """The workers decode a batch into one buffer."""

    judges = True

    def __init__(self, loader: PartsLoader) -> None:
        super().__init__(loader)
        d = self.dataset
        assert isinstance(d, Beton), "shards are refused by make_loader"
        self.data = d.data
        self.columns = (d.offsets, d.sizes_bytes, d.modes, d.heights, d.widths)
        self._image_bytes = int((d.heights * d.widths)[loader.ids].max()) * 3
        self._thread = threading.local()

    def own(self) -> _Own:
        """The calling thread's decoder and memory."""
        if not hasattr(self._thread, "own"):
            self._thread.own = _Own(self._image_bytes)
        return self._thread.own

    def side_by_side(self, ids: np.ndarray) -> tuple[np.ndarray, int]:
        """Where each of these images starts in one buffer of all of them, (B,); the buffer's bytes."""
        size_bytes = self.dataset.heights[ids] * self.dataset.widths[ids] * 3
        ends = np.cumsum(size_bytes)
        return ends - size_bytes, int(ends[-1:].sum())

    def begin(self, request: Request) -> tuple[torch.Tensor, np.ndarray | None, np.ndarray, list[Future]]:
        """Gives the workers a batch to decode: what `decoded` yields, each image's status (B,), and the jobs."""
        ids, status = request.ids, np.zeros(len(request.ids), np.int64)
        starts, size_bytes = self.side_by_side(ids)
        pixels = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=self.loader.on_gpu)

        def job(share: slice) -> None:
            handle = self.own().handle
            _decode(handle, self.data, ids[share], self.columns, starts[share], pixels.numpy(), status[share])
            self.loader.bad.check_bytes(ids[share], status[share])

        return pixels, starts, status, self.loader.on_workers(len(ids), job)

    def finish(self, ids: np.ndarray, status: np.ndarray, jobs: list[Future]) -> bool:
        """Waits for the jobs; returns whether all images were decoded. Raises UserError if one may have no stand-in."""
        for job in jobs:
            job.result()
        for b in np.flatnonzero(status):
            self.loader.bad.note(int(ids[b]), STATUS_TEXT[status[b]])
        return not status.any()

    def decoded(self, requests: Iterator[Request]) -> Iterator[tuple[Request, torch.Tensor, np.ndarray | None]]:
        """The batches, decoded again with stand-ins if an image of them turns out to be bad."""
        begun = ((request, *self.begin(request)) for request in requests)
        for request, pixels, starts, status, jobs in ahead_of(DECODED_AHEAD, begun):
            while not self.finish(request.ids, status, jobs):
                request = request._replace(ids=self.loader.bad.replaced(request.epoch, request.wanted))
                pixels, starts, status, jobs = self.begin(request)
            yield request, pixels, starts


class DecodeAndView(DecoderThreads):
    """The workers make an image's views by NumbaViews' kernels right after its decode, in one compiled call."""

    def begin(self, request: Request) -> tuple[torch.Tensor, None, np.ndarray, list[Future]]:
        """Gives the workers a batch of views to make; the rest as above."""
        views, status = self.loader.views, np.zeros(len(request.ids), np.int64)
        assert isinstance(views, NumbaViews)

        def job(share: slice, out: np.ndarray) -> None:
            own, ids, scratch = self.own(), request.ids[share], views.scratch(out.shape[2])
            params = view_params(self.loader.config, self.dataset, request.epoch, ids)
            _decode_and_view(
                own.handle,
                self.data,
                ids,
                self.columns,
                params,
                views.bicubic,
                own.pixels,
                scratch,
                views.table,
                share.start,
                out,
                status,
            )
            self.loader.bad.check_bytes(ids, status[share])

        out, jobs = views.on_workers(request, job)
        return out, None, status, jobs


def make_decoder_threads(loader: PartsLoader) -> DecoderThreads:
    """The Pixels of --loader fast."""
    return DecoderThreads(loader) if loader.gpu_views else DecodeAndView(loader)
