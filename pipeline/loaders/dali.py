"""The pixels as NVIDIA DALI decodes them: nvJPEG on a GPU, with its hardware decoder if there is one.

Only the decoder is DALI's. Its resize is within 1/255 of Pillow's, its colour operations are others; so crops,
jitter, blur and the rest are the kernels of every backend, and samples, order, labels and parameters are the same.
Nothing is copied on the way: DALI reads from the mapped file, the kernels read what DALI wrote.

If the CPU makes the views, the same graph decodes there. Its pixels are Pillow's: of the 500 JPEGs of the ImageNet
sample (original sizes, 297 million values) none differs from the fast loader's, bit for bit (DALI 2.4.0). nvJPEG's
differ a little; scripts/bench/decoders.py measures that if there is a GPU.
"""

import ctypes
from collections.abc import Iterator
from itertools import tee

import numpy as np
import torch

from pipeline.errors import UserError
from pipeline.loaders.parts import PartsLoader, Pixels, Request
from pipeline.storage.beton import MODE_JPEG, jpeg_bytes
from pipeline.storage.decode import STATUS_TEXT, decode_status

IN_DECODER = 2  # batches in DALI's queue


def require_dali() -> None:
    """Raises UserError if DALI is not installed."""
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

    graph = Pipeline(images, threads, device_id, prefetch_queue_depth=IN_DECODER)
    with graph:
        decoded = fn.decoders.image(
            fn.external_source(jpegs, no_copy=True, dtype=types.DALIDataType.UINT8, ndim=1),
            device="cpu" if device_id is None else "mixed",
            output_type=types.DALIImageType.RGB,
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


class DaliPixels(Pixels):
    """What DALI decodes. Raises UserError at construction if DALI is missing, or for raw pixels."""

    def __init__(self, loader: PartsLoader) -> None:
        require_dali()
        super().__init__(loader)
        if (self.dataset.modes != MODE_JPEG).any():
            raise UserError(f"{self.dataset.path} holds raw pixels, which need no decoder; choose --loader fast")

    def _images(self, graph, ids: np.ndarray):
        """The next batch out of the graph, a DALI TensorList. Raises UserError, naming the image, for a bad one."""
        expected = np.stack([self.dataset.heights[ids], self.dataset.widths[ids], np.full(len(ids), 3)], 1)
        try:
            (images,) = graph.share_outputs()
            if np.array_equal(np.array(images.shape(), np.int64), expected):
                return images
            reason = "another size"
        except RuntimeError as error:
            reason = str(error)
        # DALI's words are about the batch, and not whose fault it is: our decoder names the image.
        for sample in ids.tolist():
            if status := decode_status(self.dataset, sample):
                self.loader.bad.note(sample, STATUS_TEXT[status])
        raise UserError(
            f"DALI refuses an image of {self.dataset.path} that libjpeg reads ({reason}); try --loader fast"
        )

    def decoded(self, requests: Iterator[Request]) -> Iterator[tuple[Request, torch.Tensor, np.ndarray]]:
        """The batches; DALI decodes ahead while the views of one are made. All of this runs in the maker thread."""
        requests, coming = tee(requests)
        jpegs = ([jpeg_bytes(self.dataset, sample) for sample in request.ids] for request in coming)
        config, cuda_stream = self.loader.config, self.loader.cuda_stream if self.loader.gpu_views else None
        device = cuda_stream.device if cuda_stream else torch.device("cpu")
        largest = -(-config.global_batch // config.world_size)
        graph = make_graph(jpegs, largest, self.loader.workers, device.index)
        graph.schedule_run()
        for request in requests:
            images = self._images(graph, request.ids)
            addresses = np.array([images[b].data_ptr() for b in range(len(request.ids))], np.int64)
            sizes_bytes = self.dataset.heights[request.ids] * self.dataset.widths[request.ids] * 3
            try:
                yield request, *spanned(addresses, sizes_bytes, device)
            finally:  # also where the pass ends here, and the graph with it
                if cuda_stream:
                    cuda_stream.synchronize()  # the kernels have read the pixels
            del images  # the memory is DALI's next batch's as soon as this object is gone, released or not
            graph.release_outputs()
            graph.schedule_run()
