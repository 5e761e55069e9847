"""The loader that decodes with NVIDIA DALI: nvJPEG on a GPU, with its hardware decoder where there is one.

    order.py ─▶ ids of a step ─▶ their JPEG bytes, where the file is mapped ─▶ DALI's graph: decoders.image
    draws.py ─▶ ViewParams ─────────────────────────────────────────┐                │ pixels, where DALI put them
                                                                    └─▶ our view kernels (augment_gpu, augment_cpu)
             ◀─ Batch, in order ◀─ `AHEAD` batches in the making while the consumer uses the last one

Only the decoder is DALI's. Its resize is within 1/255 of Pillow's, its colour operations are others; so crops,
jitter, blur and the rest are the kernels of every backend, and samples, order, labels and parameters are the same.
Nothing is copied on the way: DALI reads from the mapped file, the kernels read what DALI wrote.

Without a GPU the same graph decodes on the CPU. Its pixels are Pillow's: of the 500 JPEGs of the ImageNet sample
(original sizes, 297 million values) none differs from the fast loader's, bit for bit (DALI 2.4.0). nvJPEG's
differ a little; scripts/bench/decoders.py measures that where there is a GPU.
"""

import ctypes
import hashlib
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise, tee
from threading import local

import numpy as np
import torch

from pipeline.choices.draws import ViewParams, centre_views, draw_views
from pipeline.choices.order import rank_batch, steps_per_epoch
from pipeline.errors import UserError
from pipeline.loaders.bad_images import BadImages
from pipeline.loaders.stream import Plan, make_plan, samples_in_use
from pipeline.spec import Batch, CentreCrop, LoaderConfig
from pipeline.storage.beton import MODE_JPEG
from pipeline.storage.decode import STATUS_TEXT, decode_status
from pipeline.storage.shards import Digests, open_stored, stored_jpeg
from pipeline.views.augment_cpu import Scratch, make_scratch, normalization_table, views_of_images

AHEAD = 2  # finished batches beside the one in use; as many again are in DALI's decoder
JOBS_PER_WORKER = 4


def require_dali() -> None:
    """Raises UserError where DALI is not installed."""
    try:
        import nvidia.dali  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"--loader dali needs NVIDIA DALI, which cannot be imported ({error}); install it with"
            " bash scripts/setup.sh --dali, or choose --loader fast"
        ) from None


def make_graph(jpegs: Iterator[list[np.ndarray]], images: int, threads: int, device_id: int | None):
    """DALI's graph: batches of up to `images` JPEGs → RGB pixels (h, w, 3), on GPU `device_id`; None is the CPU.

    It takes batches from `jpegs` ahead of their use and copies nothing. The accurate inverse transform and smooth
    chroma upsampling are asked for: nearest to Pillow. EXIF rotations are not applied: the converter has done that.
    """
    from nvidia.dali import Pipeline, fn, types

    graph = Pipeline(images, threads, device_id, prefetch_queue_depth=AHEAD)
    with graph:
        decoded = fn.decoders.image(
            fn.external_source(jpegs, no_copy=True, dtype=types.UINT8, ndim=1),
            device="cpu" if device_id is None else "mixed",
            output_type=types.RGB,
            use_fast_idct=False,
            jpeg_fancy_upsampling=True,
            adjust_orientation=False,
        )
        graph.set_outputs(decoded)
    graph.build()
    return graph


class _DeviceMemory:
    """Bytes of a GPU's memory as PyTorch takes them over, by NumPy's array interface."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {"shape": (size,), "typestr": "|u1", "data": (address, False), "version": 3}


def spanned(addresses: np.ndarray, sizes_bytes: np.ndarray, device: torch.device) -> tuple[torch.Tensor, np.ndarray]:
    """The memory from the first image to the end of the last as one flat uint8 tensor, and each image's start in it.

    Images lie wherever DALI put them; what is between them is not ours and is never touched.
    """
    first = int(addresses.min())
    size = int((addresses + sizes_bytes).max()) - first
    if device.type == "cuda":
        pixels = torch.as_tensor(_DeviceMemory(first, size), device=device)
    else:
        pixels = torch.from_numpy(np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(first)))
    return pixels, addresses - first


class DaliLoader:
    """Batches from a .beton file or shards; see LoaderConfig and Batch for what is in them.

    Raises UserError at construction where DALI is missing, or for a dataset or batch size that cannot work, and
    while iterating for an image that cannot be decoded. One pass of batches() at a time.
    """

    def __init__(self, config: LoaderConfig) -> None:
        require_dali()
        self.config = config
        self.stored = open_stored(config.data)
        if (self.stored.modes != MODE_JPEG).any():
            raise UserError(f"{config.data} holds raw pixels, which need no decoder; choose --loader fast")
        self.ids = samples_in_use(config, self.stored)
        self.images, self.classes, self.labels = len(self.ids), self.stored.classes, self.stored.labels
        self.sizes = (self.stored.heights, self.stored.widths)
        self.steps_per_epoch = steps_per_epoch(self.images, config.global_batch, drop_last=config.shuffle)
        rank_batch(config.global_batch, config.world_size)
        self.workers = config.workers or len(os.sched_getaffinity(0))
        self._bad = BadImages(config, self.stored, self.ids)
        self._digests, self._checked = Digests(self.stored), np.zeros(len(self.stored), bool)
        self.device = torch.device(config.device)
        rows = (config.views,) if isinstance(config.views, CentreCrop) else config.views
        self._interpolations = [row.interpolation for row in rows]
        self._gpu_views = config.views_on == "gpu" or (config.views_on == "auto" and self.device.type == "cuda")
        on_gpu = self._gpu_views and self.device.type == "cuda"
        self._stream = torch.cuda.Stream(self.device) if on_gpu else None
        self._device_id = self._stream.device_index if on_gpu else None
        self._table = normalization_table(config.normalization)
        self._thread = local()
        self._pool = ThreadPoolExecutor(self.workers, "views")
        self._maker = ThreadPoolExecutor(1, "maker")  # the one thread that talks to DALI

    def _scratch(self, side_px: int) -> Scratch:
        """The calling thread's memory for views of this side."""
        if getattr(self._thread, "side_px", 0) != side_px:
            largest = (int(size.max()) for size in self.sizes)
            self._thread.scratch, self._thread.side_px = make_scratch(*largest, side_px), side_px
        return self._thread.scratch

    def _params(self, ids: np.ndarray, epoch: int) -> ViewParams:
        c, heights, widths = self.config, self.sizes[0][ids], self.sizes[1][ids]
        if isinstance(c.views, CentreCrop):
            return centre_views(heights, widths, c.views, c.resolution_px)
        return draw_views(c.seed, epoch, ids, heights, widths, c.views, c.resolution_at(epoch))

    def _views(self, images, ids: np.ndarray, epoch: int) -> tuple[torch.Tensor, ...]:
        """The views of a decoded batch, finished: the decoded pixels may go when this returns."""
        heights, widths = self.sizes[0][ids], self.sizes[1][ids]
        addresses = np.array([images[b].data_ptr() for b in range(len(ids))], np.int64)
        device = self.device if self._stream else torch.device("cpu")
        pixels, starts = spanned(addresses, heights * widths * 3, device)
        params, side = self._params(ids, epoch), self.config.resolution_at(epoch)
        if self._gpu_views:
            from pipeline.views.augment_gpu import make_views
            from pipeline.views.resample_gpu import plan_views

            plan = plan_views(params, starts, heights, widths, self._interpolations, side)
            with torch.cuda.stream(self._stream):
                views = make_views(pixels, plan.to(self.device), self.config.normalization, self.config.view_type)
            if self._stream:
                self._stream.synchronize()
            return views
        bicubic = np.array([name == "bicubic" for name in self._interpolations])
        views = torch.empty((len(bicubic), len(ids), side, side, 3))
        source, target = pixels.numpy(), views.numpy()
        cuts = pairwise(np.linspace(0, len(ids), min(len(ids), self.workers * JOBS_PER_WORKER) + 1).astype(int))

        def job(first: int, end: int) -> None:
            own = ViewParams(*(array[first:end] for array in params))
            images = source, starts[first:end], heights[first:end], widths[first:end]
            views_of_images(*images, own, bicubic, self._scratch(side), self._table, first, target)

        for done in [self._pool.submit(job, int(a), int(z)) for a, z in cuts]:
            done.result()
        return tuple(view.permute(0, 3, 1, 2).to(self.device, self.config.view_type) for view in views)

    def _jpegs(self, ids: np.ndarray) -> list[np.ndarray]:
        """The bytes of some samples, where the file is mapped. Raises UserError, naming the image, for changed ones.

        DALI takes a JPEG with broken codes without a word. So bytes are checked when they are first used: 0.1 ms an
        image, once. Where stand-ins are wanted, libjpeg has decoded them instead.
        """
        jpegs = [stored_jpeg(self.stored, sample) for sample in ids]
        if self._bad.substitute:
            return jpegs
        new = np.flatnonzero(~self._checked[ids])
        found = self._pool.map(lambda b: hashlib.sha256(jpegs[b]).hexdigest(), new)
        for sample, sha256 in zip(ids[new].tolist(), found, strict=True):
            if sha256 != self._digests.sha256(sample):
                self._bad.note(sample, "its bytes have changed")
        self._checked[ids] = True
        return jpegs

    def _decoded(self, graph, ids: np.ndarray):
        """The next batch out of the graph, a DALI TensorList. Raises UserError, naming the image, for a bad one."""
        try:
            (images,) = graph.share_outputs()
        except RuntimeError as error:
            raise self._error(ids, str(error)) from None
        shapes = np.array(images.shape(), np.int64)
        expected = np.stack([self.sizes[0][ids], self.sizes[1][ids], np.full(len(ids), 3)], 1)
        if not np.array_equal(shapes, expected):
            raise self._error(ids, "another size")
        return images

    def _error(self, ids: np.ndarray, dalis_words: str) -> UserError:
        """Names the bad image of a batch, in the words of our decoder: DALI's error is about the batch."""
        try:
            for sample in ids.tolist():
                if status := decode_status(self.stored, sample):
                    self._bad.note(sample, STATUS_TEXT[status])
        except UserError as error:
            return error
        return UserError(
            f"DALI refuses an image of {self.stored.path} that libjpeg reads ({dalis_words}); try --loader fast"
        )

    def _decodable(self, plan: Plan) -> Iterator[tuple[int, int, np.ndarray, int]]:
        """A plan with stand-ins for bad images, where these are wanted, and how many there are in each batch."""

        def statuses(samples: np.ndarray) -> Iterator[int]:
            return self._pool.map(lambda sample: decode_status(self.stored, sample), samples)

        for step, epoch, wanted in plan:
            ids = self._bad.decodable(epoch, wanted, statuses) if self._bad.substitute else wanted
            yield step, epoch, ids, int((ids != wanted).sum())

    def _made(self, plan: Plan) -> Iterator[Batch]:
        """The batches of a plan; DALI decodes ahead while the views of one are made. Runs in one thread.

        DALI knows no empty batch, which a rank's share of the last one may be: those go past it.
        """
        plan, coming = tee(self._decodable(plan))
        jpegs = (self._jpegs(ids) for _, _, ids, _ in coming if len(ids))
        largest = -(-self.config.global_batch // self.config.world_size)
        graph = make_graph(jpegs, largest, self.workers, self._device_id)
        graph.schedule_run()
        count = len(self._interpolations)
        for step, epoch, ids, substituted in plan:
            if len(ids):
                images = self._decoded(graph, ids)
                views = self._views(images, ids, epoch)
                del images  # the memory is DALI's next batch's as soon as this object is gone, released or not
                graph.release_outputs()
                graph.schedule_run()
            else:
                side = self.config.resolution_at(epoch)
                views = tuple(
                    torch.empty((0, 3, side, side), dtype=self.config.view_type, device=self.device)
                    for _ in range(count)
                )
            label, sample = torch.from_numpy(self.labels[ids]), torch.from_numpy(ids)
            yield Batch(views, label.to(self.device), sample.to(self.device), step, epoch, substituted)

    def batches(self, start_step: int = 0, stop_step: int | None = None) -> Iterator[Batch]:
        """Batches start_step … stop_step - 1 across epochs; without shuffling, the one pass over all samples."""
        made = self._made(make_plan(self.config, self.stored, self.ids, start_step, stop_step))
        ahead: deque[Future] = deque(self._maker.submit(next, made, None) for _ in range(AHEAD))
        try:
            while (batch := ahead.popleft().result()) is not None:
                ahead.append(self._maker.submit(next, made, None))
                if self._stream:
                    for view in batch.views:  # made on another stream: its memory is free once this one is past it
                        view.record_stream(torch.cuda.current_stream(self.device))
                yield batch
        finally:
            for future in ahead:
                if not future.cancel():
                    future.exception()  # waits for the batch in the making
            made.close()  # and DALI's graph with it

    def close(self) -> None:
        """Ends the threads. The loader cannot be used afterwards."""
        self._maker.shutdown(wait=True, cancel_futures=True)
        self._pool.shutdown(wait=True, cancel_futures=True)
