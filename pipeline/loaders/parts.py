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
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from itertools import pairwise
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch

from pipeline.loaders.bad_images import BadImages
from pipeline.loaders.base import Loader
from pipeline.loaders.stream import Stream, view_params
from pipeline.spec import Batch, LoaderConfig
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


class Decoded(NamedTuple):
    """Its images: `pixels` flat uint8, image b (h, w, 3) from byte starts[b] on; starts (B,) int64.

    None for `starts`: these are the finished levels of NumbaViews already, made while the pixels were in cache.
    """

    request: Request
    pixels: torch.Tensor
    starts: np.ndarray | None


class Pixels(Protocol):
    """What a decoder offers.

    judges   its own decoder is libjpeg-turbo, whose word decides which images are bad (bad_images.py)
    lasting  its pixels stay where they are for good; else they may go when the next batch is asked for
    """

    judges: bool
    lasting: bool

    def decoded(self, requests: Iterator[Request]) -> Iterator[Decoded]: ...


class Views(Protocol):
    """Who makes the views: `begin` may leave work to threads, `finish` answers V tensors (B, 3, H, W) on the device."""

    def begin(self, decoded: Decoded) -> Any: ...

    def finish(self, begun: Any) -> tuple[torch.Tensor, ...]: ...


def ahead_of(count: int, begun: Iterator[T]) -> Iterator[T]:
    """Passes on what was begun, each when `count` more have been: so the worker threads never run out of work."""
    waiting: deque[T] = deque()
    for one in begun:
        waiting.append(one)
        if len(waiting) > count:
            yield waiting.popleft()
    yield from waiting


class PartsLoader(Loader):
    """Batches by the Pixels that `make_pixels(loader)` answers, and by our own Views; see LoaderConfig and Batch."""

    def __init__(self, config: LoaderConfig, make_pixels: "Callable[[PartsLoader], Pixels]") -> None:
        super().__init__(config)
        self.device = torch.device(config.device)
        on_gpu = self.device.type == "cuda"
        self.stream = torch.cuda.Stream(self.device) if on_gpu else None
        self.bad = BadImages(config, self.dataset, self.ids)
        self.pool = ThreadPoolExecutor(self.workers, "worker")
        self._maker = ThreadPoolExecutor(1, "maker", initializer=self._start_maker)
        self.at_close = ExitStack()  # what the parts want done when the threads have ended
        self.gpu_views = config.views_on == "gpu" or (config.views_on == "auto" and on_gpu)
        self.views: Views = TritonViews(self) if self.gpu_views else NumbaViews(self)
        try:
            self.pixels = make_pixels(self)
        except BaseException:
            self.close()
            raise

    def _start_maker(self) -> None:
        """All that the maker copies and launches is on the loader's stream, never on the caller's."""
        if self.stream:
            torch.cuda.set_stream(self.stream)

    def shares(self, images: int) -> list[slice]:
        """A batch or chunk of so many images, cut for the worker threads."""
        cuts = np.linspace(0, images, min(images, self.workers * SHARES_PER_WORKER) + 1).astype(int).tolist()
        return [slice(first, end) for first, end in pairwise(cuts)]

    def _requests(self, stream: Stream, empty: list[Request]) -> Iterator[Request]:
        """What the decoder is asked for. The last batch of a pass may leave a rank nothing: that goes to `empty`."""
        for step, epoch, ids in stream:
            wanted = np.ascontiguousarray(ids)  # one layout, one compiled version
            if self.bad.substitute and not self.pixels.judges:
                ids = self.bad.decodable(epoch, wanted, self.pool.map)
            else:
                ids = self.bad.replaced(epoch, wanted)
            request = Request(step, epoch, wanted, ids)
            if len(ids):
                yield request
            else:
                empty.append(request)

    def _made(self, stream: Stream) -> Iterator[tuple[Batch, torch.cuda.Event | None]]:
        """The batches of a stream, each with the event after which its tensors are there. Runs in the maker."""
        empty: list[Request] = []
        decoded = self.pixels.decoded(self._requests(stream, empty))
        begun = ((one.request, self.views.begin(one)) for one in decoded)
        for request, views in ahead_of(self.pixels.lasting, begun):
            yield self._finished(request, self.views.finish(views))
        for request in empty:
            side = self.config.resolution_at(request.epoch)
            none = torch.empty((0, 3, side, side), dtype=self.config.view_type, device=self.device)
            yield self._finished(request, tuple(none.clone() for _ in self.config.rows))

    def _finished(self, request: Request, views: tuple) -> tuple[Batch, torch.cuda.Event | None]:
        label = torch.from_numpy(self.labels[request.ids]).to(self.device)
        sample = torch.from_numpy(request.ids).to(self.device)
        substituted = int((request.ids != request.wanted).sum())
        batch = Batch(views, label, sample, request.step, request.epoch, substituted)
        return batch, self.stream.record_event() if self.stream else None

    def _hand_over(self, batch: Batch, made: torch.cuda.Event | None) -> Batch:
        """The batch, for work on the caller's current stream."""
        if made:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(made)
            for tensor in (*batch.views, batch.label, batch.sample):
                tensor.record_stream(current)  # made on the other stream: its memory is free once this one is past it
        return batch

    def batches(self, start_step: int = 0, stop_step: int | None = None) -> Iterator[Batch]:
        """Batches start_step … stop_step - 1 across epochs; without shuffling, the one pass over all samples."""
        made = self._made(self._stream(start_step, stop_step))
        ahead: deque[Future] = deque(self._maker.submit(next, made, None) for _ in range(AHEAD))
        try:
            while ahead[0].result():
                ahead.append(self._maker.submit(next, made, None))
                yield self._hand_over(*ahead.popleft().result())
        finally:
            for future in ahead:
                if not future.cancel():
                    future.exception()  # waits for the batch in the making
            made.close()  # and the decoder's part of the pass with it

    def close(self) -> None:
        """Ends the threads and frees their decoders. The loader cannot be used afterwards."""
        self._maker.shutdown(wait=True, cancel_futures=True)
        self.pool.shutdown(wait=True, cancel_futures=True)
        self.at_close.close()


class NumbaViews:
    """By the worker threads, image by image: values, or levels of 8 bits where a GPU is to normalize them."""

    def __init__(self, loader: PartsLoader) -> None:
        self.loader, self.config = loader, loader.config
        self.bicubic = np.array([row.interpolation == "bicubic" for row in self.config.rows])
        self.table = UNCHANGED if loader.stream else normalization_table(self.config.normalization)
        self._thread = threading.local()

    def scratch(self, side_px: int) -> Scratch:
        """The calling thread's memory for views of this side."""
        if getattr(self._thread, "side_px", 0) != side_px:
            largest = (int(size.max()) for size in self.loader.sizes)
            self._thread.scratch, self._thread.side_px = make_scratch(*largest, side_px), side_px
        return self._thread.scratch

    def empty(self, request: Request) -> torch.Tensor:
        """Memory of a batch's levels or values, (V, B, H, W, 3): float32, or pinned uint8."""
        side = self.config.resolution_at(request.epoch)
        dtype = torch.uint8 if self.loader.stream else torch.float32
        shape = (len(self.bicubic), len(request.ids), side, side, 3)
        return torch.empty(shape, dtype=dtype, pin_memory=dtype == torch.uint8)

    def _make(self, decoded: Decoded, share: slice, levels: np.ndarray) -> None:
        """One worker's share of the images."""
        ids = decoded.request.ids[share]
        views_of_images(
            decoded.pixels.numpy(),
            decoded.starts[share],
            *(size[ids] for size in self.loader.sizes),
            view_params(self.config, self.loader.dataset, decoded.request.epoch, ids),
            self.bicubic,
            self.scratch(levels.shape[2]),
            self.table,
            share.start,
            levels,
        )

    def begin(self, decoded: Decoded) -> tuple[torch.Tensor, list[Future]]:
        """Gives the workers their shares, where these are not done already."""
        if decoded.starts is None:
            return decoded.pixels, []
        levels, shares = self.empty(decoded.request), self.loader.shares(len(decoded.request.ids))
        return levels, [self.loader.pool.submit(self._make, decoded, share, levels.numpy()) for share in shares]

    def finish(self, begun: tuple[torch.Tensor, list[Future]]) -> tuple[torch.Tensor, ...]:
        """Waits for the workers; on a GPU, queues copy and normalization on the current stream."""
        levels, jobs = begun
        for job in jobs:
            job.result()
        if not self.loader.stream:
            return tuple(view.permute(0, 3, 1, 2).to(self.config.view_type) for view in levels)
        from pipeline.views.augment_gpu import normalize_views

        levels = levels.to(self.loader.device, non_blocking=True)
        return normalize_views(levels, self.config.normalization, self.config.view_type)


class TritonViews:
    """By the GPU, a batch at a time; on a CPU in Triton's interpreter, for tests."""

    def __init__(self, loader: PartsLoader) -> None:
        self.loader, self.config = loader, loader.config

    def plan(self, epoch: int, ids: np.ndarray, starts: np.ndarray):
        """What the kernels are told of the views of these images (a ViewPlan, on the CPU)."""
        from pipeline.views.resample_gpu import plan_views

        params = view_params(self.config, self.loader.dataset, epoch, ids)
        heights, widths = (size[ids] for size in self.loader.sizes)
        interpolations = [row.interpolation for row in self.config.rows]
        return plan_views(params, starts, heights, widths, interpolations, self.config.resolution_at(epoch))

    def begin(self, decoded: Decoded) -> Decoded:
        """Nothing is left to threads: a plan takes a millisecond, the kernels are only queued."""
        return decoded

    def finish(self, begun: Decoded) -> tuple[torch.Tensor, ...]:
        """Queues the copies and kernels on the current stream."""
        from pipeline.views.augment_gpu import make_views

        device, request = self.loader.device, begun.request
        plan = self.plan(request.epoch, request.ids, begun.starts).to(device)
        pixels = begun.pixels.to(device, non_blocking=True)
        return make_views(pixels, plan, self.config.normalization, self.config.view_type)
