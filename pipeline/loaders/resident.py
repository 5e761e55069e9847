"""The loader for datasets that fit in memory: every image is decoded once, before the first batch, and never again.

    all images ── decode ──▶ one uint8 buffer, in GPU memory where the GPU makes the views, else in RAM
    order.py ─▶ ids of a step ─▶ plan ─▶ the same kernels, which read each image where it lies ─▶ Batch

No image is copied on the way: kernels take the byte at which an image starts, so gathering a batch is a list of
numbers. Samples, order, stand-ins, draws and pixels are those of the fast loader (loader_ffcv.py), of which this is
the form without a decoder. Every rank keeps the whole dataset, since every epoch deals the images out anew.
"""

from collections import deque
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from pipeline.errors import UserError
from pipeline.loaders.threads import FfcvLoader
from pipeline.spec import LoaderConfig
from pipeline.views.augment_cpu import views_of_images

SHARE = 0.6  # of the free memory that the images may take: the network and its activations want the rest
CHUNK_BYTES = 64 << 20  # decoded at a time: what is copied to a GPU together, and a step of the progress bar
CHUNKS_AHEAD = 2
GB = 1e9


def free_bytes(device: torch.device) -> int:
    """Memory that can still be had: the GPU's, or the machine's as far as this process group may use it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and (text := limit.read_text().strip()) != "max":
        free = min(free, int(text) - int(used.read_text()))
    return free


class ResidentLoader(FfcvLoader):
    """Batches from a .beton file that is held decoded; see LoaderConfig and Batch for what is in them.

    Raises UserError at construction for a dataset or batch size that cannot work, for one that does not fit, and for
    an image that cannot be decoded.
    """

    def __init__(self, config: LoaderConfig) -> None:
        super().__init__(config)
        try:
            self._fill()
        except BaseException:
            self.close()
            raise

    def _fill(self) -> None:
        """Decodes every image in use to its place: starts (N,) by dataset position, pixels flat uint8."""
        held = np.unique(self.ids)
        starts, size_bytes = self._side_by_side(held)
        device = torch.device(self.config.device if self._gpu_views else "cpu")
        free = free_bytes(device)
        if size_bytes > SHARE * free:
            raise UserError(
                f"--loader resident needs {size_bytes / GB:.2f} GB for {len(held)} decoded images, {SHARE:.0%} of the"
                f" {free / GB:.2f} GB free in {'GPU' if device.type == 'cuda' else 'main'} memory are"
                f" {SHARE * free / GB:.2f} GB; choose --loader fast, or convert with a smaller --max-side"
            )
        self._starts = np.zeros(len(self.beton), np.int64)
        self._starts[held] = starts
        self._pixels = torch.empty(size_bytes, dtype=torch.uint8, device=device)
        chunks: deque[tuple[np.ndarray, int, torch.Tensor, np.ndarray, list[Future]]] = deque()
        cuts = np.flatnonzero(np.diff(starts // CHUNK_BYTES)) + 1
        with tqdm(total=len(held), desc="decoding", unit="image", delay=2, disable=None) as bar:
            for ids in np.split(held, cuts):
                chunks.append(self._begin_chunk(ids))
                if len(chunks) > CHUNKS_AHEAD:
                    bar.update(self._finish_chunk(*chunks.popleft()))
            while chunks:
                bar.update(self._finish_chunk(*chunks.popleft()))
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # the copies ran on this thread's stream, batches are made on another

    def _begin_chunk(self, ids: np.ndarray):
        """Starts to decode neighbours: in place in RAM, for a GPU into a pinned buffer."""
        starts, size_bytes = self._side_by_side(ids)
        first = int(self._starts[ids[0]])
        place = self._pixels[first : first + size_bytes]
        pixels = place if place.device.type == "cpu" else torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)
        status = np.zeros(len(ids), np.int64)
        jobs = [
            self._pool.submit(self._decode_job, ids[a:z], starts[a:z], pixels.numpy(), status[a:z])
            for a, z in self._cuts(len(ids))
        ]
        return ids, place, pixels, status, jobs

    def _finish_chunk(self, ids, place, pixels, status, jobs) -> int:
        for job in jobs:
            job.result()
        self._note_bad(ids, status)
        if pixels is not place:
            place.copy_(pixels, non_blocking=True)
        return len(ids)

    def _job(self, epoch: int, ids: np.ndarray, first: int, views: np.ndarray, status: np.ndarray) -> None:
        images = self._pixels.numpy(), self._starts[ids], self.sizes[0][ids], self.sizes[1][ids]
        scratch = self._scratch(views.shape[2])
        views_of_images(*images, self._params(ids, epoch), self._bicubic, scratch, self._table, first, views)

    def _start_for_gpu(self, epoch: int, ids: np.ndarray, status: np.ndarray, cuts) -> tuple:
        return self._pixels, status, [], self._pool.submit(self._plan, epoch, ids, self._starts[ids])
