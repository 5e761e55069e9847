"""One image file → the bytes that a .beton keeps of it. A pure function of the file and three settings.

    kept      a readable greyscale or RGB JPEG, upright and not larger than max_side_px: its own bytes
    resized   the longer side was larger: resized to max_side_px, bicubic with antialias, and encoded again; with
              max_side_px ANY_SIDE_PX only what a .beton's page cannot hold, to SIDE_PX
    recoded   anything else that can be read (CMYK, PNG, an EXIF rotation, damaged codes): encoded again
    raw       R G B pixels of sources without files

What can be read is what Pillow reads, and its pixels are Pillow's. The exception is a JPEG whose first fault is that it
ends or breaks off too soon: Pillow may show grey there, so it is refused. The rules for other formats are in
any_image.py.

Encoding again is JPEG at the given quality with 4:2:0 chroma, as FFCV's writer does it; transparency, colour
profiles and metadata are dropped, as torchvision's loader drops them; an EXIF rotation is applied first.
"""

import hashlib
import io
import re
import struct
from typing import NamedTuple

import numpy as np
from PIL import Image

from pipeline.storage.any_image import MAX_PIXELS, UPRIGHT, Unreadable, jpeg_orientation, upright_pixels
from pipeline.storage.beton import MODE_JPEG, MODE_RAW, PAGE_BYTES
from pipeline.storage.jpeg import Decoded, decode_pixels

HOW = ("skipped", "kept", "resized", "recoded", "raw")
SKIPPED, KEPT, RESIZED, RECODED, RAW = range(5)

SIDE_PX = 500  # of the longer side at most, unless another is asked for
ANY_SIDE_PX = 65535  # a JPEG's largest
MAX_SCANS = 500  # libjpeg-turbo's limit, TJFLAG_LIMITSCANS

# libjpeg's words where a file ends too soon, and where the next marker comes too soon.
_END_OF_FILE = "Premature end of JPEG file"
_END_OF_SEGMENT = "Corrupt JPEG data: premature end of data segment"

# The end of a scan: a marker that is neither a stuffed zero, nor a restart, nor padding.
_SCAN_END = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_SOI, _END = b"\xff\xd8", b"\xff\xd9"  # the first and the last marker
_DHT, _DQT, _SOS, _EOI, _APP1 = 0xC4, 0xDB, 0xDA, 0xD9, 0xE1
_SEGMENTS = frozenset((*range(0xE0, 0xF0), 0xFE, _DHT, _DQT, 0xDD))  # APPn, COM, DHT, DQT, DRI: may be passed over
_FRAMES = frozenset((0xC0, 0xC1, 0xC2))  # baseline, extended, progressive; Huffman coded


class ImageBytes(NamedTuple):
    """What is kept of one image."""

    how: int  # index into HOW
    mode: int  # the .beton's
    height: int
    width: int
    size_bytes: int
    sha256: bytes  # of `data`
    data: bytes | memoryview  # empty on the way from a worker, if it lies in memory that both share


class How(NamedTuple):
    """The settings that decide what is kept."""

    max_side_px: int
    quality: int  # JPEG quality of what is encoded again
    decode_all: bool  # before a JPEG is kept


class Structure(NamedTuple):
    """What a walk over a JPEG's markers shows."""

    height: int
    width: int
    components: int
    has_app1: bool  # there may be EXIF
    height_at: int  # where its height stands, two bytes
    scan_at: int  # where its first scan starts
    doubtful: bool  # only decoding it can tell whether it is sound


def jpeg_structure(data: bytes) -> Structure | None:
    """Walks all markers from the first to the end-of-image. None for anything but a plain, complete JPEG.

    Less than 0.1 ms for 100 kB. It sees a cut-off file, foreign bytes, a hole; not a few changed bytes in a scan.
    """
    try:
        return _walk(data) if data[:2] == _SOI else None
    except (IndexError, struct.error):
        return None


def _walk(data: bytes) -> Structure | None:
    frame, seen, doubtful, scans, height_at, scan_at, scan_bytes, at = None, set(), False, 0, 0, 0, 0, 2
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
            frame, height_at = struct.unpack_from(">BHHB", data, at + 3), at + 4
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
            doubtful |= scans > 1  # a progressive one: later scans and their tables can be refused, too
            end = found.start()
        elif marker not in _SEGMENTS:
            return None
        doubtful |= scans > 0 and marker in (_DHT, _DQT)
        seen.add(marker)
        at = end
    if frame is None or frame[0] != 8 or min(frame[1:3]) == 0 or frame[3] not in (1, 3) or scans == 0:
        return None
    if not seen >= {_DHT, _DQT}:  # the tables of another file would be needed
        return None
    doubtful |= scan_bytes * 64 * 8 < frame[1] * frame[2]  # less than one bit a block
    return Structure(frame[1], frame[2], frame[3], _APP1 in seen, height_at, scan_at, doubtful)


def _starts_well(data: bytes, found: Structure) -> bool:
    """Whether the tables and the first 2 kB of pixels decode: 0.03 ms, at 1/8 of the size, the rest is left out."""
    if found.height * found.width > MAX_PIXELS:
        return False
    end = found.scan_at + 2000
    if end >= len(data):
        return isinstance(decode_pixels(data, 1, MAX_PIXELS), Decoded)
    height = min(found.height, 64)  # 2 kB are some rows of blocks; more would be memory for nothing
    head = data[: found.height_at] + height.to_bytes(2, "big") + data[found.height_at + 2 : end]
    decoded = decode_pixels(head, 1, MAX_PIXELS)
    return isinstance(decoded, Decoded) or decoded == _END_OF_FILE


class _Decoded(NamedTuple):
    """An image that was height × width px, made smaller by `part` in the decoder."""

    image: Image.Image
    height: int
    width: int
    part: int
    sound: bool  # a JPEG without a fault, as it is stored; all others are Pillow's, and upright


def _decode(data: bytes, max_side_px: int) -> _Decoded:
    """Any image. Raises Unreadable."""
    if data.count(bytes((0xFF, _SOS))) > MAX_SCANS:
        raise Unreadable(f"more than {MAX_SCANS} scans")
    if data[:2] == _SOI:
        decoded = decode_pixels(data, max_side_px, MAX_PIXELS)
        if isinstance(decoded, Decoded):
            pixels = decoded.pixels.squeeze(2) if decoded.pixels.shape[2] == 1 else decoded.pixels
            return _Decoded(Image.fromarray(pixels), decoded.height, decoded.width, decoded.part, True)
        ends_early = decoded in (_END_OF_FILE, _END_OF_SEGMENT)
        # If the end marker alone is missing there is no grey, and Pillow decides.
        if ends_early and isinstance(decode_pixels(data + _END, max_side_px, MAX_PIXELS), str):
            raise Unreadable(f"cut off ({decoded})")
    image = upright_pixels(data)
    return _Decoded(image, image.height, image.width, 1, False)


class _TooLarge(Unreadable):
    """For a page."""


def _stored(how: int, mode: int, height: int, width: int, data: bytes) -> ImageBytes:
    return ImageBytes(how, mode, height, width, len(data), hashlib.sha256(data).digest(), data)


def _encoded(how: int, data: bytes, height: int, width: int) -> ImageBytes:
    if len(data) > PAGE_BYTES:
        raise _TooLarge(f"{len(data)} bytes after encoding, a .beton holds at most {PAGE_BYTES}; lower --max-side")
    return _stored(how, MODE_JPEG, height, width, data)


def store_image(data: bytes, how: How) -> ImageBytes:
    """What is kept of one image file. Raises Unreadable.

    A JPEG is kept as it is when its markers are in order and it starts well; with `decode_all`, or if the
    markers leave a doubt, when all of it decodes without a warning.
    """
    try:
        return _store(data, how)
    except _TooLarge:
        if how.max_side_px != ANY_SIDE_PX:
            raise
        return _store(data, how._replace(max_side_px=SIDE_PX))


def _store(data: bytes, how: How) -> ImageBytes:
    max_side_px, quality, decode_all = how
    found = jpeg_structure(data)
    may_turn = data[:2] == _SOI if found is None else found.has_app1
    turn = UPRIGHT.get(jpeg_orientation(data)) if may_turn else None
    plain = found if turn is None else None  # the markers of a JPEG that is upright
    keep = plain is not None and max(plain[:2]) <= max_side_px and len(data) <= PAGE_BYTES
    if plain and keep and not (decode_all or plain.doubtful) and _starts_well(data, plain):
        return _stored(KEPT, MODE_JPEG, plain.height, plain.width, data)
    if plain and max(plain[:2]) > max_side_px:
        from pipeline.storage.shrink import shrink_jpeg  # with numba, which takes half a second to load

        shrunk = shrink_jpeg(data, max_side_px=max_side_px, quality=quality, max_pixels=MAX_PIXELS)
        if shrunk is not None:
            return _encoded(RESIZED, *shrunk)
    image, height, width, part, sound = _decode(data, max_side_px)
    if keep and sound:
        return _stored(KEPT, MODE_JPEG, height, width, data)
    resize = max(height, width) > max_side_px
    if resize:
        share = max_side_px / max(height, width)
        size = max(1, round(width * share)), max(1, round(height * share))
        image = image.resize(size, Image.Resampling.BICUBIC, (0, 0, width / part, height / part))
    if sound and turn is not None:
        image = image.transpose(turn)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    return _encoded(RESIZED if resize else RECODED, buffer.getvalue(), image.height, image.width)


def store_raw(pixels: np.ndarray) -> ImageBytes:
    """(H, W, 3) uint8 pixels as they are."""
    return _stored(RAW, MODE_RAW, pixels.shape[0], pixels.shape[1], pixels.tobytes())
