"""The loader made of parts: Pixels decode, Views are made of them, and the rest is the same whatever these are.

    stream of (step, epoch, ids) ─▶ Pixels.decoded ─▶ Views.begin … Views.finish ─▶ Batch ─▶ the caller
                                    fast.py           NumbaViews: worker threads
                                    resident.py       TritonViews: the GPU's kernels
                                    dali.py

One thread, the maker, pulls batches through this chain, `AHEAD` of them before the caller asks. For a GPU it works on a
CUDA stream of its own, so that copies and kernels of the next batches run beside the step that uses the last one.
pipeline/README.md says how to add a decoder.
"""

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from pipeline.loaders.bad_images import BadImages
from pipeline.loaders.base import Loader, view_params
from pipeline.loaders.read_ahead import Stream
from pipeline.spec import Batch, LoaderConfig, Squash
from pipeline.views.augment_cpu import UNCHANGED, Scratch, make_scratch, normalization_table, views_of_images

AHEAD = 2  # batches made beside the one in use: enough to hide the jitter of decode times
SHARES_PER_WORKER = 4  # a batch is split finer than the workers, so that none waits long for the slowest
T = TypeVar("T")


class Request(NamedTuple):
    """A batch to make: `wanted` are the sample ids of the stream, `ids` the same with stand-ins for bad ones."""

    step: int
    epoch: int
    wanted: np.ndarray
    ids: np.ndarray


class Pixels:
    """A decoder: requests in, the pixels of each batch out, in order.

    judges   it is libjpeg-turbo, whose word decides which images are bad (bad_images.py)
    lasting  its pixels stay where they are for good; else they may go when the next batch is asked for
    """

    judges = lasting = False

    def __init__(self, loader: "PartsLoader") -> None:
        self.loader, self.dataset = loader, loader.dataset

    def decoded(self, requests: Iterator[Request]) -> Iterator[tuple[Request, torch.Tensor, np.ndarray | None]]:
        """Yields a request, its pixels, flat uint8, and starts (B,): image b (h, w, 3) lies from byte starts[b] on.

        None for starts: the pixels are NumbaViews' (V, B, H, W, 3) already, made while each image was in cache.
        """
        raise NotImplementedError


def ahead_of(count: int, begun: Iterator[T]) -> Iterator[T]:
    """Passes on what was begun, each when `count` more have been: so the worker threads never run out of work."""
    waiting: deque[T] = deque()
    for one in begun:
        waiting.append(one)
        if len(waiting) > count:
            yield waiting.popleft()
    yield from waiting


class PartsLoader(Loader):
    """Batches by the Pixels that `make_pixels(loader)` returns, and by our own Views; see LoaderConfig and Batch."""

    def __init__(self, config: LoaderConfig, make_pixels: Callable[["PartsLoader"], Pixels]) -> None:
        super().__init__(config)
        self.on_gpu = self.device.type == "cuda"  # where the views end up
        self.cuda_stream = torch.cuda.Stream(self.device) if self.on_gpu else None
        # A Squash's two resizes are made on the CPU, which the few thousand images of its protocol allow.
        auto = config.views_on == "auto" and not isinstance(config.views, Squash)
        self.gpu_views = config.views_on == "gpu" or (auto and self.on_gpu)
        self.pool = ThreadPoolExecutor(self.workers, "worker")
        self.bad = BadImages(config, self.dataset, self.ids, self.pool.map)
        # All that the maker copies and launches is on the loader's CUDA stream, never on the caller's.
        start_maker = partial(torch.cuda.set_stream, self.cuda_stream) if self.cuda_stream else None
        self._maker = ThreadPoolExecutor(1, "maker", start_maker)
        self.views = TritonViews(self) if self.gpu_views else NumbaViews(self)
        try:
            self.pixels = make_pixels(self)
        except BaseException:
            self.close()
            raise

    def on_workers(self, images: int, job: Callable[[slice], None]) -> list[Future]:
        """Has the worker threads call job(share) for each share of so many images."""
        cuts = np.linspace(0, images, min(images, self.workers * SHARES_PER_WORKER) + 1).astype(int).tolist()
        return [self.pool.submit(job, slice(first, end)) for first, end in pairwise(cuts)]

    def _made(self, stream: Stream) -> Generator[tuple[Batch, torch.cuda.Event | None]]:
        """The batches of a stream, each with the event after which its tensors are there. Runs in the maker."""
        empty: list[Request] = []  # the last batch of a pass may leave a rank nothing, which is no work for a decoder

        def requests() -> Iterator[Request]:
            find_ids = self.bad.replaced if self.pixels.judges else self.bad.decodable
            for step, epoch, ids in stream:
                wanted = np.ascontiguousarray(ids)  # one layout, one compiled version
                request = Request(step, epoch, wanted, find_ids(epoch, wanted))
                if len(wanted):
                    yield request
                else:
                    empty.append(request)

        begun = ((one[0], self.views.begin(*one)) for one in self.pixels.decoded(requests()))
        for request, views in ahead_of(self.pixels.lasting, begun):
            yield self._finished(request, self.views.finish(views))
        for request in empty:
            side = self.config.resolution_at(request.epoch)
            nothing = torch.empty(0, side, side, 3, dtype=self.config.view_type, device=self.device)
            yield self._finished(request, tuple(nothing.clone().permute(0, 3, 1, 2) for _ in self.config.rows))

    def _finished(self, request: Request, views: tuple) -> tuple[Batch, torch.cuda.Event | None]:
        step, epoch, wanted, ids = request
        label, sample = (torch.from_numpy(numbers).to(self.device) for numbers in (self.labels[ids], ids))
        batch = Batch(views, label, sample, step, epoch, substituted=int((ids != wanted).sum()))
        return batch, self.cuda_stream.record_event() if self.cuda_stream else None

    def _hand_over(self, batch: Batch, made: torch.cuda.Event | None) -> Batch:
        """The batch, for work on the caller's current CUDA stream."""
        if made:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(made)
            for tensor in (*batch.views, batch.label, batch.sample):
                tensor.record_stream(current)  # made on the other stream: its memory is free once this one is past it
        return batch

    def batches(self, start_step: int = 0, stop_step: int | None = None) -> Iterator[Batch]:
        """Batches start_step … stop_step - 1 across epochs; without shuffling, the one pass over all samples."""
        made = self._made(self.stream(start_step, stop_step))
        ahead: deque[Future] = deque(self._maker.submit(next, made, None) for _ in range(AHEAD))
        try:
            while ahead[0].result():
                ahead.append(self._maker.submit(next, made, None))
                yield self._hand_over(*ahead.popleft().result())
                self.require_open()
        finally:
            for future in ahead:
                if not future.cancel():
                    future.exception()  # waits for the batch in the making
            made.close()  # and the decoder's part of the pass with it

    def close(self) -> None:
        """Ends the threads. The loader cannot be used afterwards."""
        super().close()
        self._maker.shutdown(wait=True, cancel_futures=True)
        self.pool.shutdown(wait=True, cancel_futures=True)


class NumbaViews:
    """Views made by the worker threads, image by image: float32 values, or 8-bit levels for a GPU to normalize."""

    def __init__(self, loader: PartsLoader) -> None:
        self.loader, self.config = loader, loader.config
        self.bicubic = np.array([row.interpolation == "bicubic" for row in self.config.rows])
        self.table = UNCHANGED if loader.on_gpu else normalization_table(self.config.normalization)
        self._thread = threading.local()

    def scratch(self, side_px: int) -> Scratch:
        """The calling thread's memory for views of this side."""
        if getattr(self._thread, "side_px", 0) != side_px:
            largest = (int(size.max()) for size in self.loader.sizes)
            self._thread.scratch, self._thread.side_px = make_scratch(*largest, side_px), side_px
        return self._thread.scratch

    def on_workers(self, request: Request, job: Callable[[slice, np.ndarray], None]) -> tuple:
        """Has the worker threads call job(share, out), each for its images of out (V, B, H, W, 3): (out, the jobs)."""
        side, dtype = self.config.resolution_at(request.epoch), torch.uint8 if self.loader.on_gpu else torch.float32
        shape = (len(self.bicubic), len(request.ids), side, side, 3)
        out = torch.empty(shape, dtype=dtype, pin_memory=self.loader.on_gpu)
        return out, self.loader.on_workers(len(request.ids), lambda share: job(share, out.numpy()))

    def begin(self, request: Request, pixels: torch.Tensor, starts: np.ndarray | None) -> tuple:
        """Gives the workers a batch, unless its views are made already."""
        if starts is None:
            return pixels, []

        def job(share: slice, out: np.ndarray) -> None:
            ids, side = request.ids[share], out.shape[2]
            images = pixels.numpy(), starts[share], *(size[ids] for size in self.loader.sizes)
            params = view_params(self.config, self.loader.dataset, request.epoch, ids)
            views_of_images(*images, params, self.bicubic, self.scratch(side), self.table, share.start, out)

        return self.on_workers(request, job)

    def finish(self, begun: tuple[torch.Tensor, list[Future]]) -> tuple[torch.Tensor, ...]:
        """V tensors (B, 3, H, W): waits for the workers; for a GPU, queues copy and normalization."""
        out, jobs = begun
        for job in jobs:
            job.result()
        if not self.loader.on_gpu:
            return tuple(view.permute(0, 3, 1, 2).to(self.config.view_type) for view in out)
        from pipeline.views.augment_gpu import normalize_views

        levels = out.to(self.loader.device, non_blocking=True)
        return normalize_views(levels, self.config.normalization, self.config.view_type)


class TritonViews:
    """Views made by the GPU, a batch at a time; on a CPU in Triton's interpreter, for tests."""

    def __init__(self, loader: PartsLoader) -> None:
        self.loader, self.config = loader, loader.config

    def plan(self, epoch: int, ids: np.ndarray, starts: np.ndarray):
        """What the kernels are told of the views of these images: a ViewPlan, on the CPU."""
        from pipeline.views.gpu_plan import plan_views

        params = view_params(self.config, self.loader.dataset, epoch, ids)
        heights, widths = (size[ids] for size in self.loader.sizes)
        interpolations = [row.interpolation for row in self.config.rows]
        return plan_views(params, starts, heights, widths, interpolations, self.config.resolution_at(epoch))

    def begin(self, *decoded: object) -> tuple:
        """Nothing is left to threads: a plan takes a millisecond, the kernels are only queued."""
        return decoded

    def finish(self, begun: tuple[Request, torch.Tensor, np.ndarray]) -> tuple[torch.Tensor, ...]:
        """V tensors (B, 3, H, W): queues the copies and kernels."""
        from pipeline.views.augment_gpu import make_views

        request, pixels, starts = begun
        plan = self.plan(request.epoch, request.ids, starts).to(self.loader.device)
        pixels = pixels.to(self.loader.device, non_blocking=True)
        return make_views(pixels, plan, self.config.normalization, self.config.view_type)
