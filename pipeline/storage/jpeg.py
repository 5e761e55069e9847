"""libjpeg-turbo's TurboJPEG interface: JPEG bytes ↔ pixels or Y Cb Cr planes, from Python.

Pixels count only if libjpeg had nothing to complain about: decoding stops at its first warning. TurboJPEG gives the
same code for a warning as for a fatal fault that follows one, and there most of the pixels were never written.

Each call makes its own decompressor (4 µs): after some faults in one image (a bogus Huffman table) libjpeg-turbo
2.1 refuses every later image on the same one.

Whichever library is found, the pixels are the same: one that encodes or decodes a small image otherwise is passed over.
"""

import contextlib
import ctypes
import functools
import os
import sys
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from pipeline.errors import UserError

GREY, RGB = 6, 0  # TJPF_GRAY, TJPF_RGB: pixel formats of one and three bytes
# TJFLAG_STOPONWARNING, and TJFLAG_LIMITSCANS: refuse a progressive JPEG of more than 500 scans, a denial of service.
STRICT = 8192 | 32768
_NO_REALLOC, _ACCURATE_DCT = 1024, 4096  # TJFLAG_NOREALLOC, TJFLAG_ACCURATEDCT
_SPACE_RGB, _SPACE_YCBCR, _SPACE_GREY = 0, 1, 2  # TJCS_*
_GREY_SAMPLES, _420_SAMPLES = 3, 2  # TJSAMP_GRAY, TJSAMP_420
_LIBRARY = "libturbojpeg.so.0"
_CHECKSUMS = 0xBECCC3DA, 0x6406EB79  # of the JPEG and the pixels that libjpeg-turbo 2.1 and 3 make in the check below
_CHROMA_FACTORS = {0: (1, 1), 1: (1, 2), 2: (2, 2), 4: (2, 1), 5: (1, 4)}  # TJSAMP_* → rows, columns a chroma sample


class Header(NamedTuple):
    """What the header says."""

    height: int
    width: int
    samples: int  # chroma subsampling, TJSAMP_*
    space: int  # colour space, TJCS_*


class Decoded(NamedTuple):
    """(H, W, 1 or 3) pixels of an image of height × width px.

    If the decoder made it smaller, H and W are height / part and width / part, rounded up.
    """

    pixels: np.ndarray
    height: int
    width: int
    part: int


class Planes(NamedTuple):
    """Y, Cb, Cr or Y alone, each (h, w) uint8 as a JPEG of height × width px stores them; `part` as in Decoded.

    A chroma sample covers `factors` (rows, columns) of the samples of Y.
    """

    planes: list[np.ndarray]
    height: int
    width: int
    part: int
    factors: tuple[int, int]


def _places() -> Iterator[str]:
    """Where the library may lie: known to the system, in conda's folder, beside this Python, in the wheel turbojpeg."""
    yield _LIBRARY
    yield from (f"{prefix}/lib/{_LIBRARY}" for prefix in (os.environ.get("CONDA_PREFIX"), sys.prefix) if prefix)
    import importlib.metadata  # only here: it takes longer to load than the library

    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        files = importlib.metadata.files("turbojpeg") or []
        yield from (str(file.locate()) for file in files if file.name.startswith("libturbojpeg"))


def _declare(lib: ctypes.CDLL) -> ctypes.CDLL:
    """Declares what is called from Python. Raises AttributeError if the library lacks some of it."""
    pointer, size, number = ctypes.c_void_p, ctypes.c_ulong, ctypes.c_int
    lib.tjInitDecompress.restype = lib.tjInitCompress.restype = pointer
    lib.tjDestroy.argtypes = lib.tjGetErrorCode.argtypes = lib.tjGetErrorStr2.argtypes = [pointer]
    lib.tjGetErrorStr2.restype = ctypes.c_char_p
    jpeg = (pointer, ctypes.c_char_p, size)
    lib.tjDecompressHeader3.argtypes = [*jpeg, *[pointer] * 4]
    lib.tjDecompress2.argtypes = [*jpeg, pointer, *[number] * 5]
    lib.tjDecompressToYUVPlanes.argtypes = [*jpeg, pointer, number, pointer, number, number]
    lib.tjCompressFromYUVPlanes.argtypes = [
        *(pointer, pointer, number, pointer, number, number),
        *(pointer, pointer, number, number),
    ]
    lib.tjBufSize.argtypes = lib.tjPlaneHeight.argtypes = lib.tjPlaneWidth.argtypes = [number] * 3
    lib.tjBufSize.restype = size
    return lib


def _gives_our_pixels(lib: ctypes.CDLL) -> bool:
    """Whether it encodes and decodes a 4:2:0 image of 32 × 32 px as libjpeg-turbo does."""
    luma = np.arange(1024).reshape(32, 32) * 7 % 256
    planes = [plane.astype(np.uint8) for plane in (luma, luma[:16, 16:], luma[16:, :16])]
    data, pixels = _encode(lib, planes, 32, 32, quality=90), np.zeros((32, 32, 3), np.uint8)
    handle = lib.tjInitDecompress()
    lib.tjDecompress2(handle, data, len(data), pixels.ctypes.data, 32, 0, 32, RGB, STRICT)
    lib.tjDestroy(handle)
    return (zlib.crc32(data), zlib.crc32(pixels.tobytes())) == _CHECKSUMS


@functools.cache
def load_library() -> ctypes.CDLL | None:
    """The first usable libturbojpeg, None if there is none."""
    for place in _places():
        with contextlib.suppress(OSError, AttributeError):
            if _gives_our_pixels(lib := _declare(ctypes.CDLL(place))):
                return lib
    return None


def turbojpeg() -> ctypes.CDLL:
    """The library. Raises UserError if no usable one is found."""
    lib = load_library()
    if lib is None:
        raise UserError(
            f"no usable libturbojpeg (2.0 or newer) in the system, $CONDA_PREFIX/lib, {sys.prefix}/lib or the Python "
            "package turbojpeg; install libturbojpeg0 (Debian, Ubuntu), libjpeg-turbo (conda) or, on x86-64 with "
            "Python 3.11 to 3.13, turbojpeg (pip)"
        )
    return lib


class _Decompressor:
    """`with _Decompressor() as handle`."""

    def __enter__(self) -> int:
        self.handle = turbojpeg().tjInitDecompress()
        if not self.handle:
            raise MemoryError("tjInitDecompress failed")
        return self.handle

    def __exit__(self, *_) -> None:
        turbojpeg().tjDestroy(self.handle)


def _read_header(handle: int, data: bytes) -> Header | None:
    found = np.zeros(4, np.int32)  # width, height, subsampling, colour space
    places = (found.ctypes.data + 4 * i for i in range(4))
    if turbojpeg().tjDecompressHeader3(handle, data, len(data), *places) != 0 or min(found[:2]) < 1:
        _complaint(handle)
        return None
    return Header(int(found[1]), int(found[0]), int(found[2]), int(found[3]))


def _complaint(handle: int) -> str:
    """What libjpeg said last. Raises MemoryError if that says nothing about the image."""
    text = turbojpeg().tjGetErrorStr2(handle).decode(errors="replace")
    if "nsufficient memory" in text or "emory allocation" in text:
        raise MemoryError(text)
    return text


def _fraction(header: Header, max_side_px: int) -> int:
    """1, 2, 4 or 8: decode to this part of the size, which leaves most of the transform out.

    At least twice max_side_px remain, for the resize that follows; and thin images stay whole.
    """
    longer, shorter = max(header.height, header.width), min(header.height, header.width)
    return next((by for by in (8, 4, 2) if longer >= 2 * by * max_side_px and shorter >= 8 * by), 1)


def decode_pixels(data: bytes, max_side_px: int, max_pixels: int) -> Decoded | str:
    """Grey or R G B pixels of a sound JPEG; else libjpeg's first complaint, or why it was not asked."""
    lib = turbojpeg()
    with _Decompressor() as handle:
        header = _read_header(handle, data)
        if header is None or header.space not in (_SPACE_RGB, _SPACE_YCBCR, _SPACE_GREY):
            return "not a greyscale, RGB or Y Cb Cr JPEG"
        if header.height * header.width > max_pixels:
            return f"{header.width}×{header.height} px are more than {max_pixels}"
        grey, part = header.space == _SPACE_GREY, _fraction(header, max_side_px)
        pixels = np.empty((-(-header.height // part), -(-header.width // part), 1 if grey else 3), np.uint8)
        to = pixels.ctypes.data, pixels.shape[1], 0, pixels.shape[0], GREY if grey else RGB, STRICT
        if lib.tjDecompress2(handle, data, len(data), *to) != 0:
            return _complaint(handle)
    return Decoded(pixels, header.height, header.width, part)


def decode_planes(data: bytes, max_side_px: int, max_pixels: int) -> Planes | None:
    """Y, Cb, Cr or Y alone; None for anything but a sound greyscale or Y Cb Cr JPEG."""
    lib = turbojpeg()
    with _Decompressor() as handle:
        header = _read_header(handle, data)
        if header is None or header.height * header.width > max_pixels:
            return None
        if not (header.space == _SPACE_GREY or (header.space == _SPACE_YCBCR and header.samples in _CHROMA_FACTORS)):
            return None
        part = _fraction(header, max_side_px)
        height, width = -(-header.height // part), -(-header.width // part)
        planes = [
            np.empty((lib.tjPlaneHeight(c, height, header.samples), lib.tjPlaneWidth(c, width, header.samples)), "u1")
            for c in range(1 if header.space == _SPACE_GREY else 3)
        ]
        places = (ctypes.c_void_p * 3)(*(plane.ctypes.data for plane in planes))
        if lib.tjDecompressToYUVPlanes(handle, data, len(data), places, width, None, height, STRICT) != 0:
            _complaint(handle)
            return None
    return Planes(planes, header.height, header.width, part, _CHROMA_FACTORS.get(header.samples, (1, 1)))


def encode_planes(planes: list[np.ndarray], height: int, width: int, *, quality: int) -> bytes:
    """A JPEG of Y alone or, as 4:2:0, of Y and Cb, Cr of half its size. Y's size is the image's, made even."""
    return _encode(turbojpeg(), planes, height, width, quality=quality)


def _encode(lib: ctypes.CDLL, planes: list[np.ndarray], height: int, width: int, *, quality: int) -> bytes:
    samples = _420_SAMPLES if len(planes) == 3 else _GREY_SAMPLES
    buffer = np.empty(lib.tjBufSize(width, height, samples), np.uint8)
    address, size = ctypes.c_void_p(buffer.ctypes.data), ctypes.c_ulong(len(buffer))
    places = (ctypes.c_void_p * 3)(*(plane.ctypes.data for plane in planes))
    strides = (ctypes.c_int * 3)(*(plane.shape[1] for plane in planes))
    handle = lib.tjInitCompress()
    failed = lib.tjCompressFromYUVPlanes(
        *(handle, places, width, strides, height, samples, ctypes.byref(address), ctypes.byref(size)),
        *(quality, _NO_REALLOC | _ACCURATE_DCT),
    )
    complaint = lib.tjGetErrorStr2(handle) if failed else b""
    lib.tjDestroy(handle)
    if failed:
        raise MemoryError(complaint)  # nothing else can be wrong with planes of our own
    return buffer[: size.value].tobytes()
