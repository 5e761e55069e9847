"""The pixels of a dataset that fits in memory: every image is decoded once, before the first batch, and never again.

    all images ── decode ──▶ one uint8 buffer, in GPU memory where the GPU makes the views, else in RAM

No image is copied afterwards: kernels take the byte at which an image starts, so gathering a batch is a list of
numbers. Every rank keeps the whole dataset, since every epoch deals the images out differently.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from pipeline.errors import UserError
from pipeline.loaders.fast import DecoderThreads
from pipeline.loaders.parts import PartsLoader, Pixels, Request, ahead_of
from pipeline.progress import progress

SHARE = 0.6  # of the free memory that the images may take: the network and its activations want the rest
CHUNK_BYTES = 64 << 20  # decoded at a time: what is copied together, and a step of the progress bar
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


class ResidentPixels(Pixels):
    """All images in use, decoded: `pixels` flat uint8, `starts` (N,) by dataset position.

    Raises UserError at construction for a dataset that does not fit, and for an image that cannot be decoded.
    """

    judges = lasting = True

    def __init__(self, loader: PartsLoader) -> None:
        super().__init__(loader)
        decoder, held = DecoderThreads(loader), np.unique(loader.ids)
        starts, size_bytes = decoder.side_by_side(held)
        device = loader.device if loader.gpu_views else torch.device("cpu")
        free = free_bytes(device)
        if size_bytes > SHARE * free:
            raise UserError(
                f"--loader resident needs {size_bytes / GB:.2f} GB for {len(held)} decoded images, {SHARE:.0%} of the"
                f" {free / GB:.2f} GB free in {'GPU' if device.type == 'cuda' else 'main'} memory are"
                f" {SHARE * free / GB:.2f} GB; choose --loader fast, or convert with a smaller --max-side"
            )
        self.starts = np.zeros(len(loader.dataset), np.int64)
        self.starts[held] = starts
        self.pixels = torch.empty(size_bytes, dtype=torch.uint8, device=device)
        chunks = np.split(held, np.flatnonzero(np.diff(starts // CHUNK_BYTES)) + 1)
        begun = ((ids, *decoder.begin(Request(0, 0, ids, ids))) for ids in chunks)
        with progress(None, "decoding", len(held), unit="image", delay_s=2) as bar:
            for ids, pixels, _, status, jobs in ahead_of(CHUNKS_AHEAD, begun):
                decoder.finish(ids, status, jobs)
                first = int(self.starts[ids[0]])
                self.pixels[first : first + len(pixels)].copy_(pixels, non_blocking=True)
                bar.update(len(ids))
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # the copies ran on this thread's stream, batches are made on another

    def decoded(self, requests: Iterator[Request]) -> Iterator[tuple[Request, torch.Tensor, np.ndarray]]:
        """The batches, where their images lie."""
        return ((request, self.pixels, self.starts[request.ids]) for request in requests)
