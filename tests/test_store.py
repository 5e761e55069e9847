"""What is kept of one image file: byte-identical where it can be, right side up and right colours where not."""

import contextlib
import io
import re
import resource
import struct
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageOps

from pipeline.storage import store
from pipeline.storage.decode import STATUS_TEXT, decode_rgb, free_handle, make_handle
from pipeline.storage.shrink import _resize_rows
from pipeline.storage.store import (
    HOW,
    KEPT,
    MAX_SCANS,
    RECODED,
    RESIZED,
    How,
    Unreadable,
    jpeg_structure,
    store_image,
)

QUALITY = 90


def encoded(image: Image.Image, fmt: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def decoded(stored) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(stored.data)).convert("RGB"))


def difference(stored, expected: Image.Image) -> float:
    """Mean absolute difference to what should be seen, itself encoded once at the same quality."""
    reference = np.asarray(Image.open(io.BytesIO(encoded(expected, quality=QUALITY))).convert("RGB"), float)
    return float(np.abs(decoded(stored) - reference).mean())


@pytest.fixture(scope="module")
def photo(imagenet_sample) -> Image.Image:
    """A real colour photograph, 320 × 240."""
    return Image.open(imagenet_sample[0]).convert("RGB").resize((320, 240), Image.Resampling.LANCZOS)


@pytest.fixture(scope="module")
def photo_jpeg(photo) -> bytes:
    return encoded(photo, quality=92)


def test_real_jpegs_are_kept_byte_for_byte(imagenet_sample):
    for path in imagenet_sample:
        data = path.read_bytes()
        stored = store_image(data, How(65535, QUALITY, False))
        with Image.open(path) as image:
            assert (stored.width, stored.height) == image.size
        assert stored.how == KEPT and stored.data == data, path


def test_postscript_starts_no_other_program(monkeypatch):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_: pytest.fail("Ghostscript was started"))
    eps = encoded(Image.new("RGB", (8, 8)), "EPS")
    assert Image.open(io.BytesIO(eps)).format == "EPS"
    with pytest.raises(Unreadable, match="no known image format"):
        store_image(eps, How(500, QUALITY, False))


def test_of_a_jpeg_without_its_end_marker_pillow_decides(imagenet_sample):
    """All its pixels are there; Pillow takes some such files and refuses others."""
    verdicts = Counter()
    for path in imagenet_sample[:60:2]:
        data = path.read_bytes()
        data = data[: data.rindex(b"\xff\xd9")]
        try:
            expected = Image.open(io.BytesIO(data)).convert("RGB")
        except OSError:
            expected = None
            with pytest.raises(Unreadable, match="truncated"):
                store_image(data, How(65535, QUALITY, False))
        else:
            stored = store_image(data, How(65535, QUALITY, False))
            assert stored.how == RECODED and stored.data == encoded(expected, quality=QUALITY, subsampling="4:2:0")
        verdicts[expected is None] += 1
    assert min(verdicts[True], verdicts[False]) > 1


def test_what_later_scans_have_wrong_is_seen(photo):
    """Pillow refuses it; a look at the start alone would not notice."""
    data = encoded(photo.resize((500, 375)), progressive=True, quality=92)
    scans = [found.start() for found in re.finditer(rb"\xff\xda", data)]
    table = data.rindex(b"\xff\xc4")
    for at, wrong in ((table + 5, b"\xff" * 16), (scans[-1] + 2 + data[scans[-1] + 3] - 3, b"\x46")):
        changed = data[:at] + wrong + data[at + len(wrong) :]
        with pytest.raises(OSError):
            Image.open(io.BytesIO(changed)).load()
        with pytest.raises(Unreadable):
            store_image(changed, How(500, QUALITY, False))
    assert store_image(data, How(500, QUALITY, False)).how == KEPT


def test_an_orientation_of_another_type_turns_nothing(photo_jpeg):
    """As Pillow's exif_transpose."""
    exif = Image.Exif()
    exif[0x0112] = 6
    number, text = struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0), struct.pack(">HHI4s", 0x0112, 2, 2, b"6")
    written = encoded(Image.open(io.BytesIO(photo_jpeg)), exif=exif)
    data = written.replace(number, text)
    assert data != written
    assert ImageOps.exif_transpose(Image.open(io.BytesIO(data))).size == (320, 240)
    stored = store_image(data, How(500, QUALITY, False))
    assert (stored.width, stored.height) == (320, 240)


def test_decoding_all_keeps_the_same(imagenet_sample):
    for path in imagenet_sample[::10]:
        data = path.read_bytes()
        assert store_image(data, How(500, QUALITY, True)) == store_image(data, How(500, QUALITY, False))


def test_resized_are_close_to_pillows_own(imagenet_sample):
    for path in imagenet_sample[::25]:
        stored = store_image(path.read_bytes(), How(200, QUALITY, False))
        with Image.open(path) as image:
            scale = 200 / max(image.size)
            size = tuple(round(side * scale) for side in image.size)
            reference = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
        assert stored.how == RESIZED and max(stored.height, stored.width) == 200
        assert difference(stored, reference) < 2, path


@pytest.mark.parametrize("factor", [4, 9, 17])
def test_very_large_images_are_shrunk_while_decoding(photo, factor):
    large = photo.resize((320 * factor, 240 * factor), Image.Resampling.BICUBIC)
    stored = store_image(encoded(large, quality=95), How(320, QUALITY, False))
    assert (stored.how, stored.width, stored.height) == (RESIZED, 320, 240)
    assert difference(stored, photo) < 3


@pytest.mark.parametrize("mode", ["4:4:4", "4:2:2", "4:2:0", "4:1:1", "L"])
@pytest.mark.parametrize("size", [(640, 480), (641, 479), (333, 1001), (97, 2000), (2000, 4), (1201, 3)])
def test_every_chroma_layout_and_odd_sizes(photo, mode, size):
    """Colour stays where it belongs: a shift by half a chroma pixel would show in the difference."""
    large = photo.resize(size, Image.Resampling.BICUBIC).convert("L" if mode == "L" else "RGB")
    data = encoded(large, quality=95, **({} if mode == "L" else {"subsampling": mode}))
    share = 90 / max(size)
    small = tuple(max(1, round(side * share)) for side in size)
    stored = store_image(data, How(90, QUALITY, False))
    assert (stored.how, stored.width, stored.height) == (RESIZED, *small)
    reference = Image.open(io.BytesIO(data)).resize(small, Image.Resampling.BICUBIC)
    assert difference(stored, reference) < 3.5


@pytest.mark.parametrize("scale", [1.0, 1.001, 1.5])
def test_the_row_added_to_an_odd_size_repeats_the_last(scale):
    """Colour needs an even number of rows; at scale 1 the filter alone would divide zero by zero there."""
    source = np.arange(0, 250, 50, dtype=np.uint8)[:, None].repeat(7, 1)
    rows = round(5 / scale)
    columns = _resize_rows(source, rows + 1, scale)
    assert columns.shape == (7, rows + 1)
    assert np.abs(columns[:, rows].astype(int) - source[-1]).max() <= 8


@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_rotation_is_applied_once(photo, fmt):
    """Pillow turns a TIFF when it loads it, the others not. Recoded: the bytes Pillow makes of the upright image."""
    small = photo.crop((0, 0, 128, 64))
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = encoded(small, fmt, exif=exif, **({"quality": 95} if fmt in ("JPEG", "WEBP") else {}))
        upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
        assert upright.size == ((64, 128) if orientation > 4 else (128, 64))
        stored = store_image(data, How(500, QUALITY, False))
        if fmt == "JPEG" and orientation == 1:
            assert stored.how == KEPT and stored.data == data
        else:
            assert stored.how == RECODED
            assert stored.data == encoded(upright, quality=QUALITY, subsampling="4:2:0"), orientation
        assert (stored.width, stored.height) == upright.size
        resized = store_image(data, How(32, QUALITY, False))
        share = 32 / 128
        expected = upright.resize([round(side * share) for side in upright.size], Image.Resampling.BICUBIC)
        assert (resized.how, resized.width, resized.height) == (RESIZED, *expected.size)
        assert difference(resized, expected) < 4, orientation
        assert Image.open(io.BytesIO(stored.data)).getexif().get(0x0112, 1) == 1


def test_damaged_exif_does_not_matter(photo_jpeg):
    app1 = b"\xff\xe1" + struct.pack(">H", 2 + 14) + b"Exif\0\0II*\0\xff\xff\xff\xff"
    data = photo_jpeg[:2] + app1 + photo_jpeg[2:]
    assert store_image(data, How(500, QUALITY, False)).data == data


def test_greyscale_is_kept_as_greyscale(photo):
    data = encoded(photo.convert("L"))
    assert store_image(data, How(500, QUALITY, False)).data == data
    smaller = store_image(data, How(100, QUALITY, False))
    assert smaller.how == RESIZED and Image.open(io.BytesIO(smaller.data)).mode == "L"


def test_cmyk_jpeg_becomes_rgb(photo):
    cmyk = photo.convert("CMYK")
    stored = store_image(encoded(cmyk, quality=95), How(500, QUALITY, False))
    assert stored.how == RECODED and Image.open(io.BytesIO(stored.data)).mode == "RGB"
    assert difference(stored, photo) < 3


def png_16(values: np.ndarray) -> bytes:
    """A PNG of (H, W, 1 to 4) uint16 values: grey, grey and alpha, R G B, R G B and alpha."""
    height, width, channels = values.shape
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, (None, 0, 4, 2, 6)[channels], 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b"")
    parts = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def pgm_16(values: np.ndarray, largest: int = 65535) -> bytes:
    return b"P5 %d %d %d\n" % (values.shape[1], values.shape[0], largest) + values.astype(">u2").tobytes()


def test_sixteen_bits_that_use_their_range(photo):
    """Grey and colour, as PNG, TIFF and PGM: the upper 8 bits. A PGM may name 4080 as white."""
    colour, grey = np.asarray(photo), np.asarray(photo.convert("L"))
    deep = grey.astype(np.uint16) * 257
    opaque = np.full((*grey.shape, 1), 65535, np.uint16)
    for data in (
        *(png_16(deep[..., None]), encoded(Image.fromarray(deep), "TIFF"), pgm_16(deep)),
        *(pgm_16(grey.astype(np.uint16) * 16, 4080), png_16(np.concatenate([deep[..., None], opaque], 2))),
    ):
        assert difference(store_image(data, How(500, QUALITY, False)), photo.convert("L")) < 0.5
    rgb = colour.astype(np.uint16) * 257
    for data in (png_16(rgb), png_16(np.concatenate([rgb, opaque], 2))):
        assert difference(store_image(data, How(500, QUALITY, False)), photo) < 0.5
    black = store_image(png_16(np.zeros((8, 8, 1), np.uint16)), How(500, QUALITY, False))
    assert (decoded(black) == 0).all()


def tiff_16(samples: np.ndarray, photometric: int, planes: bool) -> bytes:
    """(H, W, C) uint16 as an uncompressed TIFF, the channels of a pixel together or each in a strip of its own."""
    height, width, channels = samples.shape
    parts = [samples[..., c] for c in range(channels)] if planes else [samples]
    strips = [part.astype("<u2").tobytes() for part in parts]
    tags = {256: [width], 257: [height], 258: [16] * channels, 259: [1], 262: [photometric], 273: [0] * len(strips)}
    tags |= {277: [channels], 278: [height], 279: [len(strip) for strip in strips], 284: [2 if planes else 1]}
    overflow, at = 8 + 2 + 12 * len(tags) + 4, {}
    for tag, values in tags.items():
        at[tag], overflow = overflow, overflow + (4 * len(values) if len(values) > 1 else 0)
    tags[273] = [overflow + sum(map(len, strips[:i])) for i in range(len(strips))]
    entries = b"".join(
        struct.pack("<HHII", tag, 4, len(values), at[tag] if len(values) > 1 else values[0])
        for tag, values in tags.items()
    )
    longer = b"".join(struct.pack(f"<{len(values)}I", *values) for values in tags.values() if len(values) > 1)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4) + longer + b"".join(strips)


def test_deep_images_that_pillow_reads_otherwise(photo):
    """Separate planes come out as noise, light ink has low values, and 16 bits a pixel are not 16 a value."""
    colour = np.asarray(photo).astype(np.uint16)
    with pytest.raises(Unreadable, match="16 bits in separate planes"):
        store_image(tiff_16(colour * 257, 2, True), How(500, QUALITY, False))
    assert difference(store_image(tiff_16(colour * 257, 2, False), How(500, QUALITY, False)), photo) < 0.5
    paper = np.zeros((20, 30, 4), np.uint16)
    assert decoded(store_image(tiff_16(paper, 5, False), How(500, QUALITY, False))).min() == 255
    dark = Image.fromarray(np.full((20, 30, 3), 32, np.uint8))
    header = struct.pack(
        "<2sIHHIIiiHHIIiiII", b"BM", 54 + 12 + 20 * 60, 0, 0, 66, 40, 30, -20, 1, 16, 3, 1200, 0, 0, 0, 0
    )
    bmp = header + struct.pack("<3I", 0xF800, 0x07E0, 0x001F) + struct.pack("<H", 4 << 11 | 8 << 5 | 4) * 600
    with Image.open(io.BytesIO(bmp)) as opened:
        assert np.abs(np.asarray(opened.convert("RGB"), int) - np.asarray(dark)).max() < 4
    assert difference(store_image(bmp, How(500, QUALITY, False)), dark) < 4


def test_more_than_eight_bits_never_become_black(photo):
    """What would be: a range that the depth does not explain. It is named."""
    grey, colour = np.asarray(photo.convert("L")), np.asarray(photo).astype(np.uint16)
    twelve, opaque = grey.astype(np.uint16) * 16 + 15, np.full((*grey.shape, 1), 65535, np.uint16)
    low, high = int(twelve.min()), int(twelve.max())
    for data, found in (
        (png_16(twelve[..., None]), f"values from {low} to {high} in 16 bits"),
        (pgm_16(twelve), f"values from {low} to {high} in 16 bits"),
        (encoded(Image.fromarray(twelve), "TIFF"), f"values from {low} to {high} in 16 bits"),
        (png_16(colour * 16), "values below 4096 in 16 bits"),
        (png_16(np.concatenate([colour * 16, opaque], 2)), "values below 4096 in 16 bits"),
        (png_16(np.concatenate([twelve[..., None], opaque], 2)), "values below 4096 in 16 bits"),
        (encoded(Image.fromarray(grey.astype(np.int32)), "TIFF"), f"whole numbers from {grey.min()} to {grey.max()}"),
        (encoded(Image.fromarray(grey.astype(np.int32) << 8), "TIFF"), "whole numbers from"),
        (encoded(Image.fromarray(np.float32(grey / 255)), "TIFF"), "floating-point numbers from"),
        (
            encoded(Image.fromarray(np.float32(grey)), "TIFF"),
            f"floating-point numbers from {grey.min()} to {grey.max()}",
        ),
        (encoded(Image.fromarray(twelve * 16), "TIFF", tiffinfo={262: 0}), "in which 0 is white"),
    ):
        with pytest.raises(Unreadable, match=found):
            store_image(data, How(500, QUALITY, False))


@pytest.mark.parametrize(
    ("mode", "fmt"),
    [
        *(("RGB", "PNG"), ("RGBA", "PNG"), ("L", "PNG"), ("LA", "PNG"), ("P", "PNG"), ("1", "PNG"), ("P", "GIF")),
        *(("RGB", "BMP"), ("RGB", "PPM"), ("RGB", "TIFF"), ("CMYK", "TIFF"), ("RGB", "JPEG2000")),
    ],
)
def test_other_formats_whatever_their_name(photo, mode, fmt):
    image = photo.convert(mode)
    stored = store_image(encoded(image, fmt), How(500, QUALITY, False))
    assert (stored.how, stored.width, stored.height) == (RECODED, 320, 240)
    assert difference(stored, image.convert("RGB")) < 0.5


@pytest.mark.parametrize("fmt", ["WEBP", "AVIF", "GIF", "PNG"])
def test_of_several_frames_the_first(photo, fmt):
    other = photo.transpose(Image.Transpose.ROTATE_180)
    options = {"WEBP": {"lossless": True}, "AVIF": {"quality": 100}}.get(fmt, {})
    data = encoded(photo, fmt, save_all=True, append_images=[other], **options)
    stored = store_image(data, How(500, QUALITY, False))
    shown = Image.open(io.BytesIO(data)).convert("RGB")
    assert stored.how == RECODED and stored.data == encoded(shown, quality=QUALITY, subsampling="4:2:0")
    assert difference(stored, photo) < (12 if fmt == "GIF" else 2)


def test_formats_that_start_other_programs_are_none(photo):
    with pytest.raises(Unreadable, match="no known image format"):
        store_image(encoded(photo, "EPS"), How(500, QUALITY, False))


def test_progressive_and_restart_markers_are_kept(photo):
    for options in ({"progressive": True}, {"restart_marker_blocks": 2}, {"subsampling": "4:4:4"}, {"optimize": True}):
        data = encoded(photo, **options)
        assert store_image(data, How(500, QUALITY, False)).data == data, options


def test_a_flat_image_is_kept(photo):
    """Flat areas make long runs of equal bytes, which look like a hole in the file; decoding clears the doubt."""
    for colour in (0, 128, 255):
        data = encoded(Image.new("RGB", (500, 500), (colour,) * 3), optimize=True)
        assert store_image(data, How(500, QUALITY, False)).data == data


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"\xff", b"\xff\xd8", b"\xff\xd8\xff\xd9", b"<html><body>404 not found</body></html>", bytes(5000)),
        *(np.random.default_rng(0).bytes(5000), b"\xff\xd8\xff\xe0" + np.random.default_rng(1).bytes(5000)),
    ],
    ids=range(8),
)
@pytest.mark.parametrize("decode_all", [False, True])
def test_what_is_no_image_is_unreadable(data, decode_all):
    with pytest.raises(Unreadable):
        store_image(data, How(500, QUALITY, decode_all))


def test_a_cut_off_file_is_unreadable(imagenet_sample):
    rng = np.random.default_rng(2)
    for path in imagenet_sample[::50]:
        data = path.read_bytes()
        for cut in (*rng.integers(1, len(data) - 200, 8), len(data) // 2, len(data) - 2):
            for max_side in (100, 65535):
                with pytest.raises(Unreadable):
                    store_image(data[:cut], How(max_side, QUALITY, False))


@pytest.mark.parametrize("fmt", ["PNG", "GIF", "WEBP", "BMP"])
def test_a_cut_off_file_of_another_format_is_unreadable(photo, fmt):
    data = encoded(photo, fmt)
    with pytest.raises(Unreadable):
        store_image(data[: len(data) // 2], How(500, QUALITY, False))


def test_a_tail_of_zeros_is_unreadable(photo_jpeg):
    """What a crash leaves of a file: its full length, the end never written."""
    half = len(photo_jpeg) // 2
    with pytest.raises(Unreadable):
        store_image(photo_jpeg[:half] + bytes(len(photo_jpeg) - half), How(500, QUALITY, False))


def test_a_hole_is_not_kept(photo_jpeg):
    third = len(photo_jpeg) // 3
    holed = photo_jpeg[:third] + bytes(1000) + photo_jpeg[third + 1000 :]
    with contextlib.suppress(Unreadable):
        assert store_image(holed, How(500, QUALITY, False)).how != KEPT


def limit_memory(room_bytes: int) -> None:
    """From now on this process gets so much more address space, and no more."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + room_bytes, resource.getrlimit(resource.RLIMIT_AS)[1]))


def test_a_shortage_of_memory_is_no_unreadable_image(photo):
    """Memory that is refused at any place: libjpeg-turbo and Pillow's libjpeg then call a sound image broken."""
    large = photo.resize((2800, 2100), Image.Resampling.NEAREST)
    progressive, png = encoded(large, progressive=True), encoded(large, "PNG")
    cases = [(progressive, 400), (progressive, 2500), (png, 400)]
    expected = [store_image(data, How(side, QUALITY, True)).sha256 for data, side in cases]
    before, held, refused = resource.getrlimit(resource.RLIMIT_AS), [], 0
    try:
        limit_memory(0)
        for size_bytes in (1 << 20, 1 << 17):  # takes what earlier tests have freed, the large pieces first
            with contextlib.suppress(MemoryError):
                while True:
                    held.append(bytearray(size_bytes))
        for room_bytes in (5_000_000, 20_000_000, 40_000_000):
            limit_memory(room_bytes)
            for number, (data, side) in enumerate(cases):
                try:
                    assert store_image(data, How(side, QUALITY, True)).sha256 == expected[number]
                except MemoryError:
                    refused += 1
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert refused > 3


def test_a_bomb_of_pixels_is_unreadable(photo_jpeg):
    frame = photo_jpeg.index(b"\xff\xc0")
    bomb = photo_jpeg[: frame + 5] + struct.pack(">HH", 30000, 30000) + photo_jpeg[frame + 9 :]
    with pytest.raises(Unreadable, match="900000000 pixels"):
        store_image(bomb, How(500, QUALITY, False))


def test_a_bomb_of_scans_is_unreadable(photo):
    data = encoded(photo, progressive=True)
    last = data.rindex(b"\xff\xda")
    bomb = data[:-2] + data[last:-2] * (MAX_SCANS + 1) + data[-2:]
    for max_side in (100, 500):
        with pytest.raises(Unreadable, match="scans"):
            store_image(bomb, How(max_side, QUALITY, False))


def test_an_image_too_large_for_a_page(photo, photo_jpeg, monkeypatch):
    """The format cannot hold more than a page of one image; a huge header makes a JPEG that large."""
    comment = b"\xff\xfe\xff\xff" + bytes(65533)
    large = photo_jpeg[:2] + comment * (store.PAGE_BYTES // len(comment) + 1) + photo_jpeg[2:]
    stored = store_image(large, How(500, QUALITY, False))
    assert stored.how == RECODED and len(stored.data) < 100_000 and difference(stored, photo) < 3
    monkeypatch.setattr(store, "PAGE_BYTES", 1000)
    for max_side in (100, 500):
        with pytest.raises(Unreadable, match="lower --max-side"):
            store_image(photo_jpeg, How(max_side, QUALITY, False))


def test_structure_says_what_pillow_says(imagenet_sample):
    for path in imagenet_sample[::5]:
        with Image.open(path) as image:
            found = jpeg_structure(path.read_bytes())
            assert (found.width, found.height, found.components) == (*image.size, len(image.getbands()))


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """A few bytes changed, the front half of them in the header."""
    changed = bytearray(data)
    for _ in range(rng.integers(1, 6)):
        end = len(data) if rng.random() < 0.5 else min(700, len(data))
        changed[rng.integers(0, end)] = rng.integers(0, 256)
    return bytes(changed)


@pytest.mark.parametrize("decode_all", [False, True])
def test_mutations_are_stored_or_refused_and_never_crash(photo_jpeg, decode_all):
    """Whatever is stored has the size it says, or the decoder says what is wrong with it."""
    rng, handle, counts = np.random.default_rng(3), make_handle(), Counter()
    for _ in range(300):
        try:
            stored = store_image(mutated(photo_jpeg, rng), How(2000, QUALITY, decode_all))
        except Unreadable:
            counts["unreadable"] += 1
            continue
        data = np.frombuffer(stored.data, np.uint8)
        out = np.empty(stored.height * stored.width * 3, np.uint8)
        status = decode_rgb(handle, data, 0, len(data), stored.mode, stored.height, stored.width, out)
        counts[HOW[stored.how], STATUS_TEXT[status]] += 1
        assert status == 0 or (stored.how == KEPT and not decode_all)
    free_handle(handle)
    assert counts["unreadable"] > 10 and sum(counts.values()) - counts["unreadable"] > 10
