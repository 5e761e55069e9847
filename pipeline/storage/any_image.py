"""Any image file that Pillow reads → its pixels, upright, 8 bits a value.

If a file has more than 8 bits a value, the upper 8 are kept, provided that its largest value reaches a quarter of the
range. An image that stays below that, such as one of 10 or 12 bits stored in 16, would come out almost black: it is
refused, and the message names its range. Refused, too, are 32-bit and floating-point numbers, of which nothing says
what is white.

The pixels are those of `ImageOps.exif_transpose(Image.open(file)).convert("RGB")`, greyscale staying greyscale. Of
several frames the first counts. A shortage of memory says nothing about an image: it is a MemoryError, not Unreadable.
"""

import io
import re

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

MAX_PIXELS = (2 << 30) // 12  # Pillow's own limit against decompression bombs, twice its MAX_IMAGE_PIXELS

# What is read, by content. Pillow hands PostScript, for one, to another program: such formats are not among them.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "DIB", "PPM", "TIFF", "JPEG2000", "AVIF")

_BITS, _PHOTOMETRIC, _PLANES = 258, 262, 284  # of a TIFF: bits a value; 0 where 0 is white; 2 where planes are apart
_ORIENTATION = 0x0112
UPRIGHT = {  # EXIF orientation → what makes it upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Unreadable(Exception):
    """The bytes are not an image that can be stored; the text says why."""


def _open(data: bytes) -> ImageFile.ImageFile:
    """By content, whatever its name."""
    return Image.open(io.BytesIO(data), formats=FORMATS)


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 (upright) if there is none or it is damaged; of a TIFF 1 once Pillow has turned it."""
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except MemoryError:
        raise
    except Exception:  # any fault of the metadata: the pixels decide whether the file can be used
        return 1


def jpeg_orientation(data: bytes) -> int:
    """EXIF's orientation of a JPEG, whose pixels need not be decoded for it."""
    try:
        with _open(data) as image:
            return _orientation(image)
    except MemoryError:
        raise
    except Exception:
        return 1


def upright_pixels(data: bytes) -> Image.Image:
    """Any image file as an upright "L" or "RGB" image; of several frames the first. Raises Unreadable."""
    pixels = 0
    try:
        with _open(data) as image:
            pixels = image.height * image.width
            if pixels > MAX_PIXELS:
                raise Unreadable(f"{image.width}×{image.height} px are more than {MAX_PIXELS}")
            bits = _deep_bits(image, data)
            image.load()
            turn = UPRIGHT.get(_orientation(image))
            plain = _eight_bits(image, bits)
            return plain if turn is None else plain.transpose(turn)
    except (Unreadable, MemoryError):
        raise
    except UnidentifiedImageError:
        raise Unreadable("no known image format") from None
    except Exception as error:  # foreign bytes can fail in any of Pillow's parsers, in any way
        _require_memory(pixels)
        raise Unreadable(f"{type(error).__name__}: {error}") from None


def _require_memory(pixels: int) -> None:
    """Raises MemoryError if an image of so many pixels could not have been decoded.

    A decoder that was refused memory calls the image broken, in the same words as for one that is.
    """
    np.empty((64 << 20) + 8 * pixels, np.uint8)  # about what a decoder takes; not touched, so it costs nothing


def _deep_bits(image: ImageFile.ImageFile, data: bytes) -> int:
    """How many bits a value of an opened image has, as far as Pillow says; 8 or more. It forgets that with loading."""
    if image.format == "JPEG2000":
        at = data.find(b"\xff\x4f\xff\x51")  # SOC and SIZ; the first component's depth is 38 bytes behind SIZ
        return 16 if at >= 0 and (data[at + 42] & 127) + 1 > 8 else 8  # Pillow brings any depth to 16 bits
    if image.format not in ("PNG", "PPM", "TIFF"):  # BMP's "BGR;16" is 16 bits a pixel
        return 8
    if isinstance(image, TiffImageFile):
        bits = max(image.tag_v2.get(_BITS, (1,)))
        if bits > 8 and image.tag_v2.get(_PLANES) == 2 and len(image.getbands()) > 1:
            raise Unreadable(f"{bits} bits in separate planes, which Pillow misreads; convert it to 8 bits")
    for tile in image.tile:
        words = tile[3] if isinstance(tile[3], tuple) else (tile[3],)
        if tile[0].startswith("ppm") and len(words) > 1 and words[1] > 255:
            return 16  # whatever the largest value
        if found := re.search(r";(12|16|32)", str(words[0])):
            return int(found[1])
    return 8


def _eight_bits(image: Image.Image, bits: int) -> Image.Image:
    """An "L" or "RGB" image of a loaded one, by the rule at the head of this file. Raises Unreadable."""
    advice = "convert it to 8 bits"
    if image.mode == "F" or (image.mode == "I" and image.format != "PPM"):
        low, high = image.getextrema()
        kind = "floating-point" if image.mode == "F" else "whole"
        raise Unreadable(f"{kind} numbers from {low:g} to {high:g}, of which nothing says what is white; {advice}")
    if image.mode[0] == "I":
        values = np.asarray(image)
        if values.max() < 1 << (bits - 2) and values.any():
            raise Unreadable(f"values from {values.min()} to {values.max()} in {bits} bits, almost black; {advice}")
        if isinstance(image, TiffImageFile) and image.tag_v2.get(_PHOTOMETRIC) == 0:
            raise Unreadable(f"{bits} bits in which 0 is white; {advice}")
        return Image.fromarray((values >> (bits - 8)).astype(np.uint8))
    if bits > 8 and image.mode != "CMYK":  # Pillow has kept the upper 8; in CMYK the low ones are light
        bands = zip(image.getbands(), image.split(), strict=True)
        top = max(int(np.asarray(band).max()) for name, band in bands if name not in "Aa")
        if top < 64:
            raise Unreadable(f"values below {256 * (top + 1)} in {bits} bits, almost black; {advice}")
    return image.convert("L" if image.mode in ("1", "L") else "RGB")
