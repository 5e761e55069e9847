"""FFCV's own Loader with our operation in it: each image decoded once, all its views made by our kernels.

    order.py ─▶ the ids of an epoch ─▶ ffcv.loader.Loader: its thread, its compiled code, its memory for batches
                                          ViewsDecoder, an FFCV operation: draw → decode → every view
             ◀─ Batch, in order, copied out of FFCV's memory ◀─ its status per image looked at, stand-ins put in

Samples, order, draws and pixels are those of `--loader fast`, bit for bit. `ViewsDecoder` works in anyone's FFCV
pipeline (README.md beside this folder). FFCV compiles its part at each start of a program; our kernels come from the
cache, compiled without FFCV's reordering of floating-point arithmetic.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import replace
from itertools import groupby
from operator import itemgetter
from queue import Empty
from typing import NamedTuple

import numba
import numpy as np
import torch

from pipeline.choices.draws import ViewParams, distribution_table, empty_params, fill_centre_views, fill_views
from pipeline.choices.order import rank_batch, steps_per_epoch
from pipeline.compiled import ByAddress, compiled
from pipeline.errors import UserError
from pipeline.loaders.bad_images import BadImages
from pipeline.loaders.stream import make_order, make_plan, samples_in_use
from pipeline.spec import Batch, CentreCrop, LoaderConfig, Normalization, ViewSpec
from pipeline.storage.beton import jpeg_bytes, open_beton
from pipeline.storage.decode import OK, STATUS_TEXT, decode_rgb, end_handle, start_handle
from pipeline.storage.jpeg import turbojpeg
from pipeline.views.augment_cpu import UNCHANGED, Scratch, apply_view, make_scratch, normalization_table

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # FFCV 1.0.2 imports what newer versions of Python call old
        from ffcv.fields.rgb_image import SimpleRGBImageDecoder
        from ffcv.libffcv import ctypes_memcopy
        from ffcv.loader import Loader
        from ffcv.memory_managers import OSCacheManager
        from ffcv.pipeline.allocation_query import AllocationQuery
        from ffcv.pipeline.compiler import Compiler
        from ffcv.traversal_order.base import TraversalOrder
except ImportError as error:
    raise UserError(
        f"--loader ffcv needs FFCV, which cannot be imported ({error}); install it with bash scripts/setup.sh where"
        " there are a C++ compiler, OpenCV and libjpeg-turbo's headers, or choose --loader fast"
    ) from None

AHEAD = 2  # finished batches beside the one in use; FFCV keeps memory for two more
numba.config.THREADING_LAYER = "threadsafe"  # numba's plain one ends the process where two loaders run at once


def compile_reader(manager: OSCacheManager):
    """FFCV's function of the same name, without its signature: (a sample's place, the mapped file) → its bytes.

    For that signature FFCV 1.0.2 makes numba's type of 8-bit arrays read-only, everywhere in the process: functions
    that were compiled before are then not found any more.
    """

    def read(address, state):
        data, places, sizes = state
        return data[address : address + sizes[np.searchsorted(places, address)]]

    return Compiler.compile(read)


OSCacheManager.compile_reader = compile_reader


class Views(NamedTuple):
    """What compiled code has to know of the views; FFCV's compiler makes constants of it.

    seed        uint64                          table     distribution_table's, unused for a centre crop
    bicubic     bool (V,)                       resize_px of a centre crop; 0 for views that are drawn
    levels      (3, 256): what is written for a channel's 8-bit values
    """

    seed: np.uint64
    table: np.ndarray
    resize_px: int
    bicubic: np.ndarray
    levels: np.ndarray


class Worker(NamedTuple):
    """Memory of one thread, for one image at a time."""

    handle: np.ndarray
    pixels: np.ndarray
    params: ViewParams
    scratch: Scratch


@compiled()
def start_worker(largest, view_count, side_px):
    """A Worker for images of up to `largest` (height, width, pixels). Its handle is to be given back: end_handle."""
    height, width, pixels = largest
    return Worker(
        start_handle(),
        np.empty(pixels * 3, np.uint8),
        empty_params(1, view_count),
        make_scratch(height, width, side_px),
    )


@compiled()
def make_views(worker, stored, mode, height, width, sample, epoch, views, out):
    """Decodes the image in `stored` and makes its views, out (V, S, S, 3); zeros where the status is not OK."""
    status = decode_rgb(worker.handle, stored, 0, len(stored), mode, height, width, worker.pixels)
    if status != OK:
        out[:] = 0
        return status
    ids, heights, widths = np.array([sample]), np.array([height]), np.array([width])
    params, side_px = worker.params, out.shape[1]
    if views.resize_px:
        fill_centre_views(heights, widths, views.resize_px, side_px, params)
    else:
        fill_views(views.seed, epoch, ids, heights, widths, views.table, side_px, params)
    image = worker.pixels[: height * width * 3].reshape(height, width, 3)
    for v in range(len(out)):
        apply_view(image, params, 0, v, views.bicubic[v], views.levels, worker.scratch, out[v])
    return status


class ViewsDecoder(SimpleRGBImageDecoder):
    """FFCV operation: the stored image → its V views (V, S, S, 3), drawn for (seed, epoch, sample).

    uint8, or float32 where a normalization is given. Set `epoch` (and `resolution_px`, where it changes) before the
    loader is iterated. `status` (N,) has decode_rgb's answer for each sample so far: where it is not 0 the image
    cannot be decoded and its views are zeros.
    """

    def __init__(
        self,
        views: tuple[ViewSpec, ...] | CentreCrop,
        resolution_px: int,
        *,
        seed: int = 0,
        normalization: Normalization | None = None,
    ) -> None:
        super().__init__()
        turbojpeg()  # raises where the library is missing, which compiled code cannot
        self.resolution_px = resolution_px
        centre = isinstance(views, CentreCrop)
        rows = (views,) if centre else views
        bicubic = np.array([row.interpolation == "bicubic" for row in rows])
        table = np.zeros((1, 1)) if centre else distribution_table(views)
        levels = normalization_table(normalization) if normalization else UNCHANGED.copy()
        for array in (bicubic, table, levels):
            array.flags.writeable = False  # as compiled constants are: one version of make_views serves all callers
        self._views = Views(np.uint64(seed), table, views.resize_px if centre else 0, bicubic, levels)
        self.dtype = levels.dtype
        self._epoch = np.zeros(1, np.int64)  # compiled code reads it by its address: arrays themselves are frozen
        self.status: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(V, S, S, 3)"""
        return len(self._views.bicubic), self.resolution_px, self.resolution_px, 3

    @property
    def epoch(self) -> int:
        """The epoch whose views are drawn."""
        return int(self._epoch[0])

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._epoch[0] = epoch

    def declare_state_and_memory(self, previous_state):
        """FFCV asks when the loader is made and at the start of each epoch."""
        if self.status is None:
            heights, widths = (self.metadata[name].astype(np.int64) for name in ("height", "width"))
            self._largest = int(heights.max()), int(widths.max()), int((heights * widths).max())
            self.status = np.zeros(len(self.metadata), np.uint8)
        state = replace(previous_state, jit_mode=True, shape=self.shape, dtype=self.dtype)
        return state, AllocationQuery(self.shape, self.dtype)

    def generate_code(self):
        """The function that FFCV compiles. Its loop's turns are for the threads: each does every lanes-th image."""
        read, turns, lanes = self.memory_read, Compiler.get_iterator(), Compiler.num_threads
        views, largest = self._views, self._largest
        epoch_address, status_address = self._epoch.ctypes.data, self.status.ctypes.data

        size = largest, *self.shape[:2]
        arguments = start_worker(*size), np.frombuffer(b" ", np.uint8), 0, 0, 0, 0, 0, views
        start = ByAddress(start_worker, *size)
        call = ByAddress(make_views, *arguments, np.empty(self.shape, self.dtype))
        end_handle(arguments[0].handle)

        def do_lane(lane, batch_indices, out, metadata, storage_state, epoch, status):
            worker = start(largest, out.shape[1], out.shape[2])
            for b in range(lane, len(batch_indices), lanes):
                sample = np.int64(batch_indices[b])
                field = metadata[sample]
                mode, height, width = np.int64(field["mode"]), np.int64(field["height"]), np.int64(field["width"])
                stored = read(field["data_ptr"], storage_state)
                status[b] = call(worker, stored, mode, height, width, sample, epoch, views, out[b])
            end_handle(worker.handle)

        do_lane = Compiler.compile(do_lane)

        def decode(batch_indices, out, metadata, storage_state):
            epoch, status = np.empty(1, np.int64), np.empty(len(batch_indices), np.uint8)
            ctypes_memcopy(epoch_address, epoch.ctypes.data, 8)
            for lane in turns(lanes):
                do_lane(np.int64(lane), batch_indices, out, metadata, storage_state, epoch[0], status)
            for b in range(len(batch_indices)):
                ctypes_memcopy(status[b:].ctypes.data, status_address + np.int64(batch_indices[b]), 1)
            return out

        decode.is_parallel = True
        return decode

    def make_one(self, sample: int, stored: np.ndarray, mode: int, height: int, width: int, out: np.ndarray) -> None:
        """The same for one image outside of FFCV's Loader, its status included: `out` is (V, S, S, 3)."""
        worker = start_worker(self._largest, len(out), out.shape[1])
        size = int(height), int(width)
        self.status[sample] = make_views(worker, stored, int(mode), *size, int(sample), self.epoch, self._views, out)
        end_handle(worker.handle)


class _Order(TraversalOrder):
    """The samples of FFCV's next pass, in order: those that were put into `ids`."""

    def __init__(self, ids: np.ndarray) -> None:
        self.ids = ids

    def __call__(self, loader: Loader) -> "_Order":
        return self  # FFCV calls what it is given, as if it were a class

    def sample_order(self, epoch: int) -> np.ndarray:
        return self.ids


def _received(iterator) -> np.ndarray:
    """The next batch's views. FFCV's own `next` waits for ever where its thread has ended with an error."""
    while True:
        with suppress(Empty):
            _, (views,) = iterator.output_queue.get(timeout=1)
            return views
        if not iterator.is_alive() and iterator.output_queue.empty():
            raise RuntimeError("FFCV's loading thread has ended with an error; its traceback is printed above")


def _stop(iterator) -> None:
    """Ends FFCV's thread, which else waits for ever for room in its queue: takes its work and what it has made."""
    iterator.iter_ixes = iter(())
    while iterator.is_alive():
        with suppress(Empty):
            iterator.output_queue.get(timeout=0.02)
    iterator.close()


class FfcvLoader:
    """Batches from a .beton file by FFCV's Loader; see LoaderConfig and Batch for what is in them.

    Raises UserError at construction for a dataset or batch size that cannot work, and while iterating
    for an image that cannot be decoded. One pass of batches() at a time.
    """

    def __init__(self, config: LoaderConfig) -> None:
        c = self.config = config
        if c.views_on == "gpu":
            raise UserError("--views-on gpu: FFCV's Loader has its views made on the CPU; choose --loader fast")
        self.beton = open_beton(c.data)
        self.ids = samples_in_use(c, self.beton)
        self.images, self.classes, self.labels = len(self.ids), self.beton.classes, self.beton.labels
        self.sizes = (self.beton.heights, self.beton.widths)
        self.steps_per_epoch = steps_per_epoch(self.images, c.global_batch, drop_last=c.shuffle)
        share = rank_batch(c.global_batch, c.world_size)
        self._device = torch.device(c.device)
        on_gpu = self._device.type == "cuda"
        self._stream = torch.cuda.Stream(self._device) if on_gpu else None
        self._bad = BadImages(c, self.beton, self.ids)
        self._decoder = ViewsDecoder(
            c.views, c.resolution_at(0), seed=c.seed, normalization=None if on_gpu else c.normalization
        )
        self._order = _Order(self.ids)
        threads = torch.get_num_threads()
        self._ffcv = Loader(
            str(c.data),
            batch_size=share,
            num_workers=min(c.workers or len(os.sched_getaffinity(0)), numba.config.NUMBA_NUM_THREADS),
            os_cache=True,
            order=self._order,
            seed=0,  # of no meaning for our order; without one FFCV draws it from NumPy's generator
            pipelines={"image": [self._decoder], "label": None},
            drop_last=False,
            batches_ahead=AHEAD,
        )
        torch.set_num_threads(threads)  # FFCV sets PyTorch's threads to its own number

    def _made(self, epoch: int, parts: list[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(ids, views (B, V, S, S, 3)) of each part of an epoch; the next one may overwrite the views."""
        threads = torch.get_num_threads()
        self._decoder.epoch, self._decoder.resolution_px = epoch, self.config.resolution_at(epoch)
        self._order.ids = np.concatenate(parts)
        iterator = iter(self._ffcv)
        try:
            for ids in parts:  # FFCV makes no batch of none
                views = _received(iterator) if len(ids) else np.empty((0, *self._decoder.shape), self._decoder.dtype)
                torch.set_num_threads(threads)
                yield ids, views
        finally:
            _stop(iterator)

    def _with_stand_ins(self, epoch: int, wanted: np.ndarray, ids: np.ndarray, views: np.ndarray) -> np.ndarray:
        """The ids of a batch whose images are all decoded. Raises UserError where nothing is to stand in for one."""
        ids, b = ids.copy(), self.beton
        while len(bad := np.flatnonzero(self._decoder.status[ids] != OK)):
            for sample in ids[bad].tolist():
                self._bad.note(sample, STATUS_TEXT[self._decoder.status[sample]])
            ids[bad] = self._bad.replaced(epoch, wanted)[bad]
            for at in bad:
                s = int(ids[at])
                self._decoder.make_one(s, jpeg_bytes(b, s), b.modes[s], b.heights[s], b.widths[s], views[at])
        return ids

    def _batch(self, step: int, epoch: int, wanted: np.ndarray, ids: np.ndarray, memory: np.ndarray) -> Batch:
        """A batch of its own memory, on the device."""
        ids, c = self._with_stand_ins(epoch, wanted, ids, memory), self.config
        if self._stream:
            from pipeline.views.augment_gpu import normalize_views

            with torch.cuda.stream(self._stream):  # so that the copy does not wait for the consumer's work
                levels = torch.from_numpy(memory).to(self._device, non_blocking=True).transpose(0, 1).contiguous()
                views = normalize_views(levels, c.normalization, c.view_type)
            self._stream.synchronize()
            for view in views:
                view.record_stream(torch.cuda.current_stream(self._device))
        else:
            each = torch.from_numpy(memory).permute(1, 0, 4, 2, 3)
            views = tuple(view.to(c.view_type, copy=True, memory_format=torch.channels_last) for view in each)
        label, sample = torch.from_numpy(self.labels[ids]), torch.from_numpy(ids)
        substituted = int((ids != wanted).sum())
        return Batch(views, label.to(self._device), sample.to(self._device), step, epoch, substituted)

    def batches(self, start_step: int = 0, stop_step: int | None = None) -> Iterator[Batch]:
        """Batches start_step … stop_step - 1 across epochs; without shuffling, the one pass over all samples."""
        c, span = self.config, (start_step, stop_step)
        orders = groupby(make_order(c, self.ids, *span), itemgetter(1))  # FFCV wants an epoch's order at its start
        plans = groupby(make_plan(c, self.beton, self.ids, *span), itemgetter(1))
        for (epoch, order), (_, plan) in zip(orders, plans, strict=True):
            with closing(self._made(epoch, [self._bad.replaced(epoch, ids) for _, _, ids in order])) as made:
                for (step, _, wanted), (ids, memory) in zip(plan, made, strict=True):
                    yield self._batch(step, epoch, wanted, ids, memory)

    def close(self) -> None:
        """FFCV's thread ends with each pass of batches(); nothing is left to end."""
