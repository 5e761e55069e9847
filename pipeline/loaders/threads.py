"""The fast loader: one thread pool, one decode an image, all views of it while its pixels are in cache.

    order.py ─▶ ids of a step ─▶ split into jobs ─▶ worker threads, each with its own decoder and scratch:
                                                      draw parameters → decode → every view → normalize
             ◀─ Batch, in order ◀─ `AHEAD` batches in the making while the consumer uses the last one

A job is one call of a compiled function that holds no lock, so threads scale like processes, share the page
cache and the numba cache, and cost no pickling. The file is FFCV's; the decoder is libjpeg-turbo with the pixels of
Pillow. FFCV's own Loader, with the same batches, is `--loader ffcv`.

With `device` on a GPU the worker threads only decode, into one pinned buffer a batch; a thread of its own copies
it over and starts the view kernels (augment_gpu.py) on a stream of their own, ahead of the consumer's. With
`views_on` "cpu" they make uint8 views instead, which the GPU normalizes.
"""

import os
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch

from pipeline.choices.draws import ViewParams, centre_views, draw_views
from pipeline.choices.order import rank_batch, steps_per_epoch
from pipeline.compiled import jit
from pipeline.loaders.bad_images import BadImages
from pipeline.loaders.stream import make_plan, samples_in_use
from pipeline.spec import Batch, CentreCrop, LoaderConfig
from pipeline.storage.beton import open_beton
from pipeline.storage.decode import OK, STATUS_TEXT, decode_rgb, free_handle, make_handle
from pipeline.views.augment_cpu import UNCHANGED, Scratch, apply_view, make_scratch, normalization_table

if TYPE_CHECKING:
    from pipeline.views.resample_gpu import ViewPlan

AHEAD = 2  # batches in the making beside the one in use: enough to hide the jitter of decode times
JOBS_PER_WORKER = 4  # a batch is split finer than the workers, so that none waits long for the slowest


@jit
def _make_views(handle, data, ids, sources, params, bicubic, pixels, scratch, table, first, views, status):
    """Decodes each image once and makes its V views; a status other than OK leaves that image's views unset.

    The images are number first, first + 1, … of the batch; views (V, B, H, W, 3) and status (B,) are the whole
    batch's, not slices of it: one layout, so that one compiled version serves every number of views and jobs.
    """
    offsets, sizes, modes, heights, widths = sources
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
def _decode_images(handle, data, ids, sources, starts, pixels, status):
    """Decodes images side by side into one buffer, each (h, w, 3) from its byte of `starts` on."""
    offsets, sizes, modes, heights, widths = sources
    for b in range(len(ids)):
        i = ids[b]
        height, width = heights[i], widths[i]
        own = pixels[starts[b] : starts[b] + height * width * 3]
        status[b] = decode_rgb(handle, data, offsets[i], sizes[i], modes[i], height, width, own)


@dataclass
class _Pending:
    """A batch in the making."""

    step: int
    epoch: int
    wanted: np.ndarray  # the sample ids of the plan
    ids: np.ndarray  # and those of the batch, with stand-ins
    memory: torch.Tensor  # views (V, B, H, W, 3), float32 or pinned uint8; or all decoded images, flat pinned uint8
    status: np.ndarray
    jobs: list[Future]
    plan: Future | None = None  # of the views that the GPU is to make
    ready: Future | None = None  # the Batch and an event, where a GPU is to finish it


class FfcvLoader:
    """Batches from a .beton file; see LoaderConfig and Batch for what is in them.

    Raises UserError at construction for a dataset or batch size that cannot work, and while iterating
    for an image that cannot be decoded.
    """

    def __init__(self, config: LoaderConfig) -> None:
        self.config = config
        self.beton = open_beton(config.data)
        self.ids = samples_in_use(config, self.beton)
        self.images, self.classes, self.labels = len(self.ids), self.beton.classes, self.beton.labels
        self.sizes = (self.beton.heights, self.beton.widths)
        self.steps_per_epoch = steps_per_epoch(self.images, config.global_batch, drop_last=config.shuffle)
        rank_batch(config.global_batch, config.world_size)
        self.workers = config.workers or len(os.sched_getaffinity(0))
        rows = (config.views,) if isinstance(config.views, CentreCrop) else config.views
        self._interpolations = [row.interpolation for row in rows]
        self._bicubic = np.array([name == "bicubic" for name in self._interpolations])
        self._cuda = torch.device(config.device).type == "cuda"
        self._gpu_views = config.views_on == "gpu" or (config.views_on == "auto" and self._cuda)
        self._table = UNCHANGED if self._cuda else normalization_table(config.normalization)
        b = self.beton
        self._sources = (b.offsets, b.sizes_bytes, b.modes, b.heights, b.widths)
        self._bad = BadImages(config, self.beton, self.ids)
        self._image_bytes = int((b.heights * b.widths)[self.ids].max()) * 3
        self._thread = threading.local()
        self._handles: list[int] = []
        self._pool = ThreadPoolExecutor(self.workers, "views", initializer=self._start_thread)
        self._finisher = ThreadPoolExecutor(1, "finisher")  # one: it keeps the order, and waits for the workers
        self._stream = torch.cuda.Stream(config.device) if self._cuda else None

    def _start_thread(self) -> None:
        """Runs once in each worker thread: its decoder and its scratch memory."""
        handle = make_handle()
        self._handles.append(handle)
        self._thread.handle = handle
        if not self._gpu_views:
            self._thread.pixels = np.empty(self._image_bytes, np.uint8)
        self._thread.side_px = 0

    def _scratch(self, side_px: int) -> Scratch:
        """The calling thread's memory for views of this side."""
        if self._thread.side_px != side_px:
            largest = (int(size.max()) for size in self.sizes)
            self._thread.scratch, self._thread.side_px = make_scratch(*largest, side_px), side_px
        return self._thread.scratch

    def _params(self, ids: np.ndarray, epoch: int) -> ViewParams:
        c, heights, widths = self.config, self.sizes[0][ids], self.sizes[1][ids]
        if isinstance(c.views, CentreCrop):
            return centre_views(heights, widths, c.views, c.resolution_px)
        return draw_views(c.seed, epoch, ids, heights, widths, c.views, c.resolution_at(epoch))

    def _job(self, epoch: int, ids: np.ndarray, first: int, views: np.ndarray, status: np.ndarray) -> None:
        """One worker's share of a batch: images number first, first + 1, … into views (V, B, H, W, 3), status (B,)."""
        own = self._thread
        _make_views(
            own.handle,
            self.beton.data,
            ids,
            self._sources,
            self._params(ids, epoch),
            self._bicubic,
            own.pixels,
            self._scratch(views.shape[2]),
            self._table,
            first,
            views,
            status,
        )

    def _decode_job(self, ids: np.ndarray, starts: np.ndarray, pixels: np.ndarray, status: np.ndarray) -> None:
        _decode_images(self._thread.handle, self.beton.data, ids, self._sources, starts, pixels, status)

    def _cuts(self, images: int) -> list[tuple[int, int]]:
        """First and end of each job's share."""
        return list(pairwise(np.linspace(0, images, min(images, self.workers * JOBS_PER_WORKER) + 1).astype(int)))

    def _begin(self, step: int, epoch: int, wanted: np.ndarray) -> _Pending:
        pending = self._start(step, epoch, wanted)
        if self._cuda:
            pending.ready = self._finisher.submit(self._finish_on_stream, pending)
        return pending

    def _start(self, step: int, epoch: int, wanted: np.ndarray) -> _Pending:
        """Gives the workers a batch to make."""
        ids = self._bad.replaced(epoch, wanted)
        status, cuts = np.zeros(len(ids), np.int64), self._cuts(len(ids))
        if self._gpu_views:
            return _Pending(step, epoch, wanted, ids, *self._start_for_gpu(epoch, ids, status, cuts))
        side = self.config.resolution_at(epoch)
        dtype = torch.uint8 if self._cuda else torch.float32
        views = torch.empty((len(self._bicubic), len(ids), side, side, 3), dtype=dtype, pin_memory=self._cuda)
        array = views.numpy()
        jobs = [self._pool.submit(self._job, epoch, ids[a:z], int(a), array, status) for a, z in cuts]
        return _Pending(step, epoch, wanted, ids, views, status, jobs)

    def _start_for_gpu(self, epoch: int, ids: np.ndarray, status: np.ndarray, cuts) -> tuple:
        """All images of the batch into one buffer; meanwhile the plan of their views."""
        starts, size_bytes = self._side_by_side(ids)
        pixels = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=self._cuda)
        array = pixels.numpy()
        jobs = [self._pool.submit(self._decode_job, ids[a:z], starts[a:z], array, status[a:z]) for a, z in cuts]
        plan = self._pool.submit(self._plan, epoch, ids, starts)
        return pixels, status, jobs, plan

    def _side_by_side(self, ids: np.ndarray) -> tuple[np.ndarray, int]:
        """Where each of these images starts in one buffer of all of them, (B,); the buffer's bytes."""
        size_bytes = self.sizes[0][ids] * self.sizes[1][ids] * 3
        ends = np.cumsum(size_bytes)
        return ends - size_bytes, int(ends[-1:].sum())

    def _plan(self, epoch: int, ids: np.ndarray, starts: np.ndarray) -> "ViewPlan":
        from pipeline.views.resample_gpu import plan_views

        images = self._params(ids, epoch), starts, self.sizes[0][ids], self.sizes[1][ids]
        return plan_views(*images, self._interpolations, self.config.resolution_at(epoch))

    def _note_bad(self, ids: np.ndarray, status: np.ndarray) -> bool:
        """Whether some of these images could not be decoded. Raises UserError where nothing is to stand in for them."""
        for b in np.flatnonzero(status):
            self._bad.note(int(ids[b]), STATUS_TEXT[status[b]])
        return bool(status.any())

    def _decoded(self, pending: _Pending) -> _Pending:
        """The batch when the workers are through with it: made again, with stand-ins, where an image of it is bad."""
        while True:
            for job in pending.jobs:
                job.result()
            if not self._note_bad(pending.ids, pending.status):
                return pending
            pending = self._start(pending.step, pending.epoch, pending.wanted)

    def _finish(self, pending: _Pending) -> Batch:
        pending = self._decoded(pending)
        device = torch.device(self.config.device)
        memory = pending.memory.to(device, non_blocking=True)
        if pending.plan:
            from pipeline.views.augment_gpu import make_views

            plan = pending.plan.result().to(device)
            views = make_views(memory, plan, self.config.normalization, self.config.view_type)
        elif self._cuda:
            from pipeline.views.augment_gpu import normalize_views

            views = normalize_views(memory, self.config.normalization, self.config.view_type)
        else:
            views = tuple(view.permute(0, 3, 1, 2).to(self.config.view_type) for view in memory)
        label, sample = torch.from_numpy(self.labels[pending.ids]), torch.from_numpy(pending.ids)
        substituted = int((pending.ids != pending.wanted).sum())
        return Batch(views, label.to(device), sample.to(device), pending.step, pending.epoch, substituted)

    def _finish_on_stream(self, pending: _Pending) -> tuple[Batch, torch.cuda.Event]:
        """The same with its copies and kernels on the loader's stream, and the event after which it is there."""
        with torch.cuda.stream(self._stream):
            batch = self._finish(pending)
            return batch, self._stream.record_event()

    def _hand_over(self, pending: _Pending) -> Batch:
        """The finished batch, for work on the caller's current stream."""
        if not pending.ready:
            return self._finish(pending)
        batch, event = pending.ready.result()
        current = torch.cuda.current_stream(self.config.device)
        current.wait_event(event)
        for tensor in (*batch.views, batch.label, batch.sample):
            tensor.record_stream(current)  # made on the other stream: its memory is free once this one is past it
        return batch

    def batches(self, start_step: int = 0, stop_step: int | None = None) -> Iterator[Batch]:
        """Batches start_step … stop_step - 1 across epochs; without shuffling, the one pass over all samples."""
        plan = make_plan(self.config, self.beton, self.ids, start_step, stop_step)
        pending: deque[_Pending] = deque()
        try:
            for step, epoch, ids in plan:
                pending.append(self._begin(step, epoch, ids))
                if len(pending) > AHEAD:
                    yield self._hand_over(pending.popleft())
            while pending:
                yield self._hand_over(pending.popleft())
        finally:
            for batch in pending:
                for job in (*batch.jobs, batch.plan, batch.ready):
                    if job:
                        job.cancel()

    def close(self) -> None:
        """Ends the worker threads and frees their decoders. The loader cannot be used afterwards."""
        self._finisher.shutdown(wait=True, cancel_futures=True)
        self._pool.shutdown(wait=True, cancel_futures=True)
        while self._handles:
            free_handle(self._handles.pop())
