"""FFCV's own Loader with our operation in it (ffcv_operation.py): each image decoded once for all its views.

    order.py ─▶ the ids of an epoch ─▶ ffcv.loader.Loader: its thread, its memory for batches ─▶ ViewsDecoder
             ◀─ Batch, in order, in memory of its own ◀─ every image's status looked at, stand-ins put in

Samples, order, draws and pixels are those of `--loader fast`, bit for bit. FFCV's Loader waits for ever if its
thread fails or a pass ends early; `_received` and `_stop` prevent that.
"""

from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from itertools import groupby
from operator import itemgetter
from queue import Empty

import numba
import numpy as np
import torch

from pipeline.choices.order import rank_batch
from pipeline.errors import UserError
from pipeline.loaders.bad_images import BadImages
from pipeline.loaders.base import Loader
from pipeline.loaders.ffcv_operation import ViewsDecoder
from pipeline.spec import Batch, LoaderConfig
from pipeline.storage.decode import OK, STATUS_TEXT

AHEAD = 2  # finished batches beside the one in use; FFCV keeps memory for two more


def _received(iterator) -> np.ndarray:
    """The next batch's views. FFCV's own `next` waits for ever if its thread has ended with an error."""
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


class FfcvLoader(Loader):
    """Batches from a .beton file by FFCV's Loader; see LoaderConfig and Batch for what is in them."""

    def __init__(self, config: LoaderConfig) -> None:
        import ffcv.loader  # not at the head: ffcv_operation.py says it first if FFCV is missing

        super().__init__(config)
        c = config
        if c.views_on == "gpu":
            raise UserError("--views-on gpu: FFCV's Loader has its views made on the CPU; choose --loader fast")
        on_gpu = self.device.type == "cuda"
        self._cuda_stream = torch.cuda.Stream(self.device) if on_gpu else None
        self._bad, self._pool = BadImages(c, self.dataset, self.ids), ThreadPoolExecutor(self.workers, "bytes")
        self._decoder = ViewsDecoder(
            c.views, c.resolution_at(0), seed=c.seed, normalization=None if on_gpu else c.normalization
        )
        image, *others = self.dataset.manifest.get("fields", ["image", "label"])
        threads = torch.get_num_threads()
        self._ffcv = ffcv.loader.Loader(
            str(c.data),
            batch_size=rank_batch(c.global_batch, c.world_size),
            num_workers=min(self.workers, numba.config.NUMBA_NUM_THREADS),  # type: ignore[attr-defined]
            os_cache=True,
            seed=0,  # has no effect; without one FFCV draws it from NumPy's generator
            indices=self.ids,
            pipelines={image: [self._decoder], **dict.fromkeys(others)},
            drop_last=False,
            batches_ahead=AHEAD,
        )
        torch.set_num_threads(threads)  # FFCV sets PyTorch's threads to its own number
        self._ffcv.memory_manager.context.mmap = self.dataset.file_of(0)[1]  # ours, whose loss is named (mapped.py)

    def _made(self, epoch: int, parts: list[np.ndarray]) -> Generator[tuple[np.ndarray, np.ndarray]]:
        """(ids, views (B, V, S, S, 3)) of each part of an epoch; the next one may overwrite the views."""
        threads = torch.get_num_threads()
        self._decoder.set_epoch(epoch)
        self._decoder.resolution_px = self.config.resolution_at(epoch)
        self._ffcv.traversal_order.indices = np.concatenate(parts)  # FFCV's sequential order goes through these
        iterator = self._newest = iter(self._ffcv)
        try:
            for ids in parts:  # FFCV makes no batch of none
                views = _received(iterator) if len(ids) else np.empty((0, *self._decoder.shape), self._decoder.dtype)
                if iterator is not self._newest:
                    raise UserError("another pass was begun on this loader: FFCV has one epoch's draws at a time")
                torch.set_num_threads(threads)
                yield ids, views
        finally:
            _stop(iterator)
            torch.set_num_threads(threads)

    def _status(self, ids: np.ndarray) -> np.ndarray:
        """What is wrong with each image of a decoded batch, (B,), 0 for nothing."""
        status = self._decoder.status[ids]
        self._bad.check_bytes(ids, status, self._pool.map)
        return status

    def _with_stand_ins(self, epoch: int, wanted: np.ndarray, ids: np.ndarray, views: np.ndarray) -> np.ndarray:
        """The ids of a batch whose images are all decoded. Raises UserError if one may have no stand-in."""
        ids = ids.copy()
        while len(bad := np.flatnonzero((status := self._status(ids)) != OK)):
            for b in bad:
                self._bad.note(int(ids[b]), STATUS_TEXT[status[b]])
            ids[bad] = self._bad.replaced(epoch, wanted)[bad]
            for at in bad:
                self._decoder.make_one(self.dataset, int(ids[at]), views[at])
        return ids

    def _batch(self, step: int, epoch: int, wanted: np.ndarray, ids: np.ndarray, memory: np.ndarray) -> Batch:
        """A batch of its own memory, on the device."""
        ids, c = self._with_stand_ins(epoch, wanted, ids, memory), self.config
        if self._cuda_stream:
            from pipeline.views.augment_gpu import normalize_views

            with torch.cuda.stream(self._cuda_stream):  # so that the copy does not wait for the consumer's work
                levels = torch.from_numpy(memory).to(self.device, non_blocking=True).transpose(0, 1).contiguous()
                views = normalize_views(levels, c.normalization, c.view_type)
            self._cuda_stream.synchronize()
            for view in views:
                view.record_stream(torch.cuda.current_stream(self.device))
        else:
            each = torch.from_numpy(memory).permute(1, 0, 4, 2, 3)
            views = tuple(view.to(c.view_type, copy=True, memory_format=torch.channels_last) for view in each)
        label, sample = torch.from_numpy(self.labels[ids]), torch.from_numpy(ids)
        substituted = int((ids != wanted).sum())
        return Batch(views, label.to(self.device), sample.to(self.device), step, epoch, substituted)

    def batches(self, start_step: int = 0, stop_step: int | None = None) -> Iterator[Batch]:
        """Batches start_step … stop_step - 1 across epochs; without shuffling, the one pass over all samples."""
        # FFCV wants an epoch's order at its start, while the file is read ahead as the batches are used.
        orders = groupby(self.stream(start_step, stop_step, reads_ahead=False), itemgetter(1))
        streams = groupby(self.stream(start_step, stop_step), itemgetter(1))
        for (epoch, order), (_, stream) in zip(orders, streams, strict=True):
            with closing(self._made(epoch, [self._bad.replaced(epoch, ids) for _, _, ids in order])) as made:
                for (step, _, wanted), (ids, memory) in zip(stream, made, strict=True):
                    yield self._batch(step, epoch, wanted, ids, memory)
                    self.require_open()

    def close(self) -> None:
        """Ends the threads. The loader cannot be used afterwards."""
        super().close()
        self._pool.shutdown()
