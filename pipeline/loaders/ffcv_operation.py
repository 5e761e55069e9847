"""An operation for FFCV's Loader: the stored image → all its views, decoded once, by our kernels.

    metadata, page cache (FFCV's) ─▶ decode_rgb ─▶ draw for (seed, epoch, sample) ─▶ apply_view × V ─▶ FFCV's memory

FFCV compiles what it is given at each start of a program, with a reordering of floating-point arithmetic. So it gets
a thin loop; our functions, compiled before and kept, are called from it by their addresses. What is new in an epoch
goes in, and the images' statuses come out, through arrays that stay where they are.
"""

import warnings
from dataclasses import replace
from typing import NamedTuple

import numba
import numpy as np
import torch

from pipeline.choices.draws import ViewParams, ViewTable, empty_params, fill_centre_views, fill_views, view_table
from pipeline.compiled import by_address, compiled
from pipeline.errors import UserError
from pipeline.spec import CentreCrop, Normalization, Squash, ViewSpec
from pipeline.storage.beton import Stored, jpeg_bytes
from pipeline.storage.decode import OK, decode_rgb, end_handle, start_handle
from pipeline.storage.jpeg import turbojpeg
from pipeline.views.augment_cpu import UNCHANGED, Scratch, apply_view, make_scratch, normalization_table

_threads = torch.get_num_threads()
try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # FFCV 1.0.2 imports what newer versions of Python call old
        from ffcv.fields.rgb_image import SimpleRGBImageDecoder
        from ffcv.libffcv import ctypes_memcopy
        from ffcv.memory_managers import OSCacheManager
        from ffcv.pipeline.allocation_query import AllocationQuery
        from ffcv.pipeline.compiler import Compiler
except ImportError as error:
    raise UserError(
        f"--loader ffcv needs FFCV, which cannot be imported ({error}); install it with bash scripts/setup.sh where"
        " there are a C++ compiler, OpenCV and libjpeg-turbo's headers, or choose --loader fast"
    ) from None
finally:
    torch.set_num_threads(_threads)  # to import FFCV leaves PyTorch one

numba.config.THREADING_LAYER = "threadsafe"  # type: ignore[attr-defined]  # numba's plain one ends the process where two loaders run at once


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
    """What compiled code has to know of the views; constants to FFCV's compiler."""

    seed: np.uint64
    table: ViewTable  # not used for a centre crop
    resize_px: int  # of a centre crop; 0 for views that are drawn
    squash: bool  # it is a Squash
    bicubic: np.ndarray  # (V,) bool
    levels: np.ndarray  # (3, 256), what is written for each channel's 8-bit values


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
        fill_centre_views(heights, widths, views.resize_px, views.squash, side_px, params)
    else:
        fill_views(views.seed, epoch, ids, heights, widths, views.table, side_px, params)
    image = worker.pixels[: height * width * 3].reshape(height, width, 3)
    for v in range(len(out)):
        apply_view(image, params, 0, v, views.bicubic[v], views.levels, worker.scratch, out[v])
    return status


class ViewsDecoder(SimpleRGBImageDecoder):
    """FFCV operation: the stored image → its V views (V, S, S, 3), drawn for (seed, epoch, sample).

    uint8, or float32 where a normalization is given. Each Loader needs one of its own, and `set_epoch` before it is
    iterated (`resolution_px` may change then, too). `status` (N,), empty before a Loader has it, is decode_rgb's for
    each sample so far: where it is not 0 the image cannot be decoded, and its views are zeros.
    """

    def __init__(
        self,
        views: tuple[ViewSpec, ...] | ViewSpec | CentreCrop,
        resolution_px: int,
        *,
        seed: int = 0,
        normalization: Normalization | None = None,
    ) -> None:
        super().__init__()
        turbojpeg()  # raises if the library is missing, which compiled code cannot
        self.resolution_px = resolution_px
        views = (views,) if isinstance(views, ViewSpec) else views
        if isinstance(views, CentreCrop):
            interpolations, table, resize_px = [views.interpolation], view_table((ViewSpec(),)), views.resize_px
        else:
            interpolations, table, resize_px = [view.interpolation for view in views], view_table(views), 0
        bicubic = np.array([interpolation == "bicubic" for interpolation in interpolations])
        levels = normalization_table(normalization) if normalization else UNCHANGED.copy()
        for array in (bicubic, *table, levels):
            array.flags.writeable = False  # as compiled constants are: one version of make_views serves all callers
        self._views = Views(np.uint64(seed), table, resize_px, isinstance(views, Squash), bicubic, levels)
        self.dtype = levels.dtype
        self._epoch = np.zeros(1, np.int64)  # compiled code reads it by its address: arrays themselves are frozen
        self.status = np.zeros(0, np.uint8)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(V, S, S, 3)"""
        return len(self._views.bicubic), self.resolution_px, self.resolution_px, 3

    def set_epoch(self, epoch: int) -> None:
        """Says whose draws the views are to have. Before the loader is iterated, as with PyTorch's samplers."""
        self._epoch[0] = epoch

    def declare_state_and_memory(self, previous_state):
        """FFCV asks when the loader is made and at the start of each epoch."""
        if not len(self.status):
            heights, widths = (self.metadata[name].astype(np.int64) for name in ("height", "width"))
            self._largest = int(heights.max()), int(widths.max()), int((heights * widths).max())
            self.status = np.zeros(len(self.metadata), np.uint8)  # its place is in the compiled code
        assert len(self.status) == len(self.metadata), "each Loader needs a ViewsDecoder of its own"
        state = replace(previous_state, jit_mode=True, shape=self.shape, dtype=self.dtype)
        return state, AllocationQuery(self.shape, self.dtype)

    def generate_code(self):
        """The function that FFCV compiles. Its loop's turns are for the threads: each does every lanes-th image."""
        read, turns, lanes = self.memory_read, Compiler.get_iterator(), Compiler.num_threads
        views, largest, out = self._views, self._largest, np.empty(self.shape, self.dtype)
        epoch_address, status_address = self._epoch.ctypes.data, self.status.ctypes.data
        start = by_address(start_worker, largest, *self.shape[:2])
        worker, stored = start_worker(largest, *self.shape[:2]), np.frombuffer(b" ", np.uint8)
        make = by_address(make_views, worker, stored, 0, 0, 0, 0, 0, views, out)
        end_handle(worker.handle)

        def do_lane(lane, batch_indices, out, metadata, storage_state, epoch, status):
            worker = start(largest, out.shape[1], out.shape[2])
            for b in range(lane, len(batch_indices), lanes):
                sample = np.int64(batch_indices[b])
                field = metadata[sample]
                mode, height, width = np.int64(field["mode"]), np.int64(field["height"]), np.int64(field["width"])
                stored = read(field["data_ptr"], storage_state)
                status[b] = make(worker, stored, mode, height, width, sample, epoch, views, out[b])
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

    def make_one(self, dataset: Stored, sample: int, out: np.ndarray) -> None:
        """One image's views, and its status, outside of FFCV's Loader: out (V, S, S, 3)."""
        worker, stored = start_worker(self._largest, *out.shape[:2]), jpeg_bytes(dataset, sample)
        about = (int(array[sample]) for array in (dataset.modes, dataset.heights, dataset.widths))
        self.status[sample] = make_views(worker, stored, *about, sample, int(self._epoch[0]), self._views, out)
        end_handle(worker.handle)
