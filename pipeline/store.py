"""One image file → the bytes that a .beton keeps of it. A pure function of the file and three settings.

    kept      a readable greyscale or RGB JPEG, upright and not larger than max_side_px: its own bytes
    resized   the longer side was larger: resized to max_side_px, bicubic with antialias, encoded again
    recoded   anything else that can be read (CMYK, PNG, an EXIF rotation, damaged codes): encoded again
    raw       R G B pixels of sources without files

Encoding again is JPEG at the given quality with 4:2:0 chroma, as FFCV's writer does it; transparency, colour
profiles and metadata are dropped, as torchvision's loader drops them; an EXIF rotation is applied first.
"""

import ctypes
import functools
import hashlib
import io
import re
import struct
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from pipeline.beton import MODE_JPEG, MODE_RAW, PAGE_BYTES, TJ_LIMIT_SCANS, TURBOJPEG, free_handle, make_handle

HOW = ("skipped", "kept", "resized", "recoded", "raw")
SKIPPED, KEPT, RESIZED, RECODED, RAW = range(5)

MAX_PIXELS = 2 * Image.MAX_IMAGE_PIXELS  # Pillow's own limit against decompression bombs
MAX_SCANS = 500  # libjpeg-turbo's limit, TJFLAG_LIMITSCANS

_GREY_SPACE, _RGB_SPACES = 2, (0, 1)  # TJCS_GRAY; TJCS_RGB, TJCS_YCbCr
_RGB_FORMAT, _GREY_FORMAT = 0, 6  # TJPF_RGB, TJPF_GRAY
_ORIENTATION = 0x0112
_UPRIGHT = {  # EXIF orientation → what makes it upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# The end of a scan: a marker that is neither a stuffed zero, nor a restart, nor padding.
_SCAN_END = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_DHT, _DQT, _SOS, _EOI, _APP1 = 0xC4, 0xDB, 0xDA, 0xD9, 0xE1
_SEGMENTS = frozenset((*range(0xE0, 0xF0), 0xFE, _DHT, _DQT, 0xDD))  # APPn, COM, DHT, DQT, DRI: may be passed over
_FRAMES = frozenset((0xC0, 0xC1, 0xC2))  # baseline, extended, progressive; Huffman coded


class Unreadable(Exception):
    """The bytes are not an image that can be stored; the text says why."""


class Stored(NamedTuple):
    """What is kept of one image: `how` indexes HOW, `mode` is the .beton's."""

    how: int
    mode: int
    height: int
    width: int
    data: bytes
    sha256: bytes


class Structure(NamedTuple):
    """What a walk over a JPEG's markers shows: size, colours, whether there may be EXIF, where its first scan starts.

    `doubtful`: only decoding it can tell whether it is sound.
    """

    height: int
    width: int
    components: int
    has_app1: bool
    scan_at: int
    doubtful: bool


def jpeg_structure(data: bytes) -> Structure | None:
    """Walks all markers from the first to the end-of-image. None for anything but a plain, complete JPEG.

    Less than 0.1 ms for 100 kB. It sees a cut-off file, foreign bytes, a hole; not a few changed bytes in a scan.
    """
    try:
        return _walk(data) if data[:2] == b"\xff\xd8" else None
    except (IndexError, struct.error):
        return None


def _walk(data: bytes) -> Structure | None:
    frame, seen, doubtful, scans, scan_at, scan_bytes, at = None, set(), False, 0, 0, 0, 2
    while True:
        if data[at] != 0xFF:
            return None
        while data[at] == 0xFF:
            at += 1
        marker = data[at]
        if marker == _EOI:
            break
        (length,) = struct.unpack_from(">H", data, at + 1)
        end = at + 1 + length
        if length < 2 or end > len(data):
            return None
        if marker in _FRAMES and frame is None:
            frame = struct.unpack_from(">BHHB", data, at + 3)
            factors = [data[at + 10 + 3 * i] for i in range(frame[3])]
            # Usual chroma subsampling: TurboJPEG refuses some that Pillow reads.
            doubtful |= frame[3] == 3 and (factors[0] not in (0x11, 0x21, 0x12, 0x22) or factors[1:] != [0x11, 0x11])
        elif marker == _SOS and frame is not None:
            found = _SCAN_END.search(data, end)
            scans, scan_at = scans + 1, scan_at or end
            if found is None or scans > MAX_SCANS:
                return None
            scan_bytes += found.start() - end
            doubtful |= data.find(bytes(64), end, found.start()) >= 0  # a hole in the file, or a very flat image
            end = found.start()
        elif marker not in _SEGMENTS:
            return None
        seen.add(marker)
        at = end
    if frame is None or frame[0] != 8 or min(frame[1:3]) == 0 or frame[3] not in (1, 3) or scans == 0:
        return None
    if not seen >= {_DHT, _DQT}:  # the tables of another file would be needed
        return None
    doubtful |= scan_bytes * 64 * 8 < frame[1] * frame[2]  # less than one bit a block
    return Structure(frame[1], frame[2], frame[3], _APP1 in seen, scan_at, doubtful)


@functools.cache
def _turbojpeg() -> ctypes.CDLL:
    """The library with the signatures of what is called here. Raises UserError where it is missing."""
    free_handle(make_handle())
    lib, handle, text = TURBOJPEG, ctypes.c_void_p, ctypes.c_char_p
    lib.tjDecompressHeader3.argtypes = [handle, text, ctypes.c_ulong, *[ctypes.c_void_p] * 4]
    lib.tjDecompress2.argtypes = [handle, text, ctypes.c_ulong, ctypes.c_void_p, *[ctypes.c_int] * 5]
    lib.tjGetErrorCode.argtypes = lib.tjGetErrorStr2.argtypes = [handle]
    lib.tjGetErrorStr2.restype = text
    return lib


def _turbo_decode(data: bytes, max_side_px: int) -> tuple[np.ndarray, int, int, str] | None:
    """(pixels (H, W, 1 or 3), full height, full width, warning or ""); None where TurboJPEG cannot.

    Pixels of a very large image come at 1/2, 1/4 or 1/8 of its size, never below twice max_side_px: the
    library then leaves out most of the transform.
    """
    lib = _turbojpeg()
    handle = lib.tjInitDecompress()  # a new one each time, 4 µs: a fault in one image can spoil it for the next
    try:
        return _turbo_decode_with(lib, handle, data, max_side_px)
    finally:
        lib.tjDestroy(handle)


def _turbo_decode_with(lib: ctypes.CDLL, handle: int, data: bytes, max_side_px: int):
    found = np.zeros(4, np.int32)
    if lib.tjDecompressHeader3(handle, data, len(data), *(found.ctypes.data + 4 * i for i in range(4))) != 0:
        return None
    width, height, _, space = map(int, found)
    if min(height, width) < 1 or (space != _GREY_SPACE and space not in _RGB_SPACES):
        return None
    _check_pixels(height, width)
    shrink = next((s for s in (8, 4, 2) if max(height, width) >= 2 * s * max_side_px), 1)
    pixels = np.empty((-(-height // shrink), -(-width // shrink), 1 if space == _GREY_SPACE else 3), np.uint8)
    pixel_format = _GREY_FORMAT if space == _GREY_SPACE else _RGB_FORMAT
    status = lib.tjDecompress2(
        *(handle, data, len(data), pixels.ctypes.data, pixels.shape[1], 0, pixels.shape[0]),
        *(pixel_format, TJ_LIMIT_SCANS),
    )
    if status != 0 and lib.tjGetErrorCode(handle) != 0:  # 0 is a warning: there are pixels
        return None
    return pixels, height, width, lib.tjGetErrorStr2(handle).decode(errors="replace") if status else ""


def _check_pixels(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise Unreadable(f"{width}×{height} px are more than {MAX_PIXELS}")


def _starts_well(data: bytes, found: Structure) -> bool:
    """Whether the tables and the first 2 kB of pixels decode: 0.1 ms, at 1/8 of the size, the rest is left out."""
    head = data[: found.scan_at + 2000]
    decoded = _turbo_decode(head, 1)
    return decoded is not None and (len(head) < len(data) or not decoded[3])


def _is_complete(data: bytes, warning: str, max_side_px: int) -> bool:
    """Whether a JPEG with a warning has all its pixels: damaged codes yes, a cut-off file no."""
    if "remature end" not in warning:
        return True
    closed = _turbo_decode(data + b"\xff\xd9", max_side_px)  # only the end marker may be missing
    return closed is not None and not closed[3]


def _orientation(data: bytes) -> int:
    """EXIF's orientation, 1 (upright) where there is none or it is damaged."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # any fault of the metadata: the pixels decide whether the file can be used
        return 1


def _pillow_decode(data: bytes) -> Image.Image:
    """Any other format, as an "L" or "RGB" image."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            _check_pixels(image.height, image.width)
            image.load()
            if image.mode.startswith("I;16") or image.mode == "I":  # 16 bits of grey
                return Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
            return image.convert("L" if image.mode in ("1", "L") else "RGB")
    except Unreadable:
        raise
    except UnidentifiedImageError:
        raise Unreadable("no known image format") from None
    except Exception as error:  # foreign bytes can fail in any of Pillow's parsers, in any way
        raise Unreadable(f"{type(error).__name__}: {error}") from None


def _encode(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    return buffer.getvalue()


def _stored(how: int, mode: int, height: int, width: int, data: bytes) -> Stored:
    return Stored(how, mode, height, width, data, hashlib.sha256(data).digest())


def _resized(image: Image.Image, full_height: int, full_width: int, max_side_px: int) -> Image.Image:
    share = max_side_px / max(full_height, full_width)
    size = max(1, round(full_width * share)), max(1, round(full_height * share))
    return image.resize(size, Image.Resampling.BICUBIC)


def store_image(data: bytes, max_side_px: int, quality: int, decode_all: bool) -> Stored:
    """What is kept of one image file. Raises Unreadable.

    A JPEG is kept as it is when its markers are in order and it starts well; with `decode_all`, or where the
    markers leave a doubt, when all of it decodes without a warning.
    """
    found = jpeg_structure(data)
    keep = found is not None and max(found[:2]) <= max_side_px and len(data) <= PAGE_BYTES
    keep = keep and not (found.has_app1 and _orientation(data) in _UPRIGHT)
    if keep and not (decode_all or found.doubtful) and _starts_well(data, found):
        return _stored(KEPT, MODE_JPEG, found.height, found.width, data)
    if data.count(bytes((0xFF, _SOS))) > MAX_SCANS:
        raise Unreadable(f"more than {MAX_SCANS} scans")
    decoded = _turbo_decode(data, max_side_px) if data[:2] == b"\xff\xd8" else None
    if decoded is None:
        image = _pillow_decode(data)
        height, width = image.height, image.width
    else:
        pixels, height, width, warning = decoded
        if keep and not warning:
            return _stored(KEPT, MODE_JPEG, height, width, data)
        if not _is_complete(data, warning, max_side_px):
            raise Unreadable(f"cut off ({warning})")
        image = Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)
    how = RESIZED if max(height, width) > max_side_px else RECODED
    if how == RESIZED:
        image = _resized(image, height, width, max_side_px)
    turn = _UPRIGHT.get(_orientation(data)) if found is None or found.has_app1 else None
    image = image if turn is None else image.transpose(turn)
    encoded = _encode(image, quality)
    if len(encoded) > PAGE_BYTES:
        raise Unreadable(f"{len(encoded)} bytes after encoding, a .beton holds at most {PAGE_BYTES}; lower --max-side")
    return _stored(how, MODE_JPEG, image.height, image.width, encoded)


def store_raw(pixels: np.ndarray) -> Stored:
    """(H, W, 3) uint8 pixels as they are."""
    return _stored(RAW, MODE_RAW, pixels.shape[0], pixels.shape[1], pixels.tobytes())
