"""Stored bytes → pixels: libjpeg-turbo's TurboJPEG interface, called from compiled code.

A file of its own because numba takes half a second to load, which a conversion that keeps every file does without.
"""

import ctypes

import llvmlite.binding
import numba
import numpy as np

from pipeline.compiled import jit
from pipeline.storage.beton import MODE_JPEG, MODE_RAW, Stored, jpeg_bytes
from pipeline.storage.jpeg import RGB, STRICT, load_library, turbojpeg

# What the statuses that decode_rgb returns mean: the index is the status.
STATUS_TEXT = (
    "decoded",
    "its place is outside the file",
    "the output buffer is too small",
    "not a JPEG",
    "the JPEG has another size than the table says",
    "the JPEG is damaged or cut off, part of its pixels would be guesses",
    "the raw pixels have another size than the table says",
    "unknown storage mode",
    "the JPEG cannot be decoded",
    "its bytes are no longer those of the conversion",
)
(OK, OUTSIDE_FILE, BUFFER_TOO_SMALL, NOT_A_JPEG, WRONG_SIZE, DAMAGED, WRONG_RAW_SIZE, UNKNOWN_MODE, UNDECODABLE) = (
    range(9)
)
CHANGED = 9  # not decode_rgb's: bad_images.py compares the bytes with their digest

# Compiled code finds these by symbol name when it is linked, in this process. A ctypes function would be
# compiled in as an address of this process, and the copy in numba's cache would crash the next one.
_lib = load_library()
if _lib is not None:
    for _name in ("tjInitDecompress", "tjDecompressHeader3", "tjDecompress2", "tjGetErrorCode", "tjDestroy"):
        llvmlite.binding.add_symbol(_name, ctypes.cast(getattr(_lib, _name), ctypes.c_void_p).value)

_i32, _ptr = numba.types.int32, numba.types.intp
_tj_init = numba.types.ExternalFunction("tjInitDecompress", _ptr())
_tj_header = numba.types.ExternalFunction("tjDecompressHeader3", _i32(_ptr, _ptr, _ptr, _ptr, _ptr, _ptr, _ptr))
_tj_decompress = numba.types.ExternalFunction(
    "tjDecompress2", _i32(_ptr, _ptr, _ptr, _ptr, _i32, _i32, _i32, _i32, _i32)
)
_tj_error_code = numba.types.ExternalFunction("tjGetErrorCode", _i32(_ptr))
_tj_destroy = numba.types.ExternalFunction("tjDestroy", _i32(_ptr))


def make_handle() -> np.ndarray:
    """A decompressor for `decode_rgb`; each thread needs its own. Raises UserError without libjpeg-turbo."""
    handle = np.array([turbojpeg().tjInitDecompress() or 0], np.int64)
    if not handle[0]:
        raise MemoryError("tjInitDecompress failed")
    return handle


def free_handle(handle: np.ndarray) -> None:
    """Gives a decompressor back."""
    turbojpeg().tjDestroy(int(handle[0]))


@jit
def start_handle():
    """make_handle for compiled code; decode_rgb calls no image decoded where there was no memory for it."""
    return np.array([_tj_init()])


@jit
def end_handle(handle):
    """free_handle for compiled code."""
    _tj_destroy(handle[0])


@jit
def _decode_jpeg(decompressor, source, size, height, width, target):
    """Status of decoding the JPEG at address `source` to the height·width·3 bytes at address `target`."""
    found = np.zeros(4, np.int32)  # width, height, subsampling, colour space
    at = found.ctypes.data
    if _tj_header(decompressor, source, size, at, at + 4, at + 8, at + 12) != 0 or found[0] < 1:
        return NOT_A_JPEG
    if found[0] != width or found[1] != height:
        return WRONG_SIZE
    if _tj_decompress(decompressor, source, size, target, width, width * 3, height, RGB, STRICT) == 0:
        return OK
    return DAMAGED if _tj_error_code(decompressor) == 0 else UNDECODABLE  # 0: it stopped at a warning


@jit
def decode_rgb(handle, data, offset, size, mode, height, width, out):
    """One sample's pixels into out[: height·width·3], R G B rows; greyscale comes out as R = G = B.

    `handle` from make_handle; data, offset and size as in Beton; `out` contiguous uint8 of at least
    height·width·3 elements; no others are written. Returns OK or the status that says what is wrong
    (STATUS_TEXT). At libjpeg's first warning it stops with DAMAGED; only with OK has `out` an image.
    The accurate integer transform and smooth upsampling, libjpeg's defaults: Pillow's pixels, bit for bit.
    """
    if offset < 0 or size < 1 or offset > len(data) - size:
        return OUTSIDE_FILE
    if height < 1 or width < 1 or out.size < height * width * 3:
        return BUFFER_TOO_SMALL
    if mode == MODE_RAW:
        if size != height * width * 3:
            return WRONG_RAW_SIZE
        flat = out.reshape(-1)
        for i in range(size):
            flat[i] = data[offset + i]
        return OK
    if mode != MODE_JPEG:
        return UNKNOWN_MODE
    status = _decode_jpeg(handle[0], data.ctypes.data + offset, size, height, width, out.ctypes.data)
    if status != OK:  # after some faults (a bogus Huffman table) a decompressor refuses every later image
        _tj_destroy(handle[0])
        handle[0] = _tj_init()
    return status


def decode_status(stored: Stored, sample: int) -> int:
    """What libjpeg-turbo says of one sample: the status of decode_rgb."""
    data, height, width = jpeg_bytes(stored, sample), int(stored.heights[sample]), int(stored.widths[sample])
    handle, out = make_handle(), np.empty(height * width * 3, np.uint8)
    status = decode_rgb(handle, data, 0, len(data), int(stored.modes[sample]), height, width, out)
    free_handle(handle)
    return status
