"""The .beton format against FFCV itself, opening with bad files, and the decoder against Pillow."""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline import convert
from pipeline.errors import UserError
from pipeline.storage import beton, decode
from pipeline.storage.beton_writer import BetonWriter
from pipeline.storage.digests import Digests
from pipeline.storage.ffcv_file import read_tables
from pipeline.storage.sources.source import Source
from pipeline.storage.store import KEPT, ImageBytes
from tests.mutants import COUNT, json_mutants, mutants, outcome

REPO = Path(__file__).resolve().parents[1]


def run_python(code: str, *arguments, **environment) -> str:
    """Runs code in a process of its own: FFCV starts threads and changes torch's settings."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPO), **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def photos(tmp_path_factory, imagenet_sample) -> Path:
    """300 real photographs of one size, as JPEG, in three classes: two pages of a .beton and more."""
    root = tmp_path_factory.mktemp("photos")
    for i, path in enumerate(imagenet_sample[:300]):
        (root / f"class_{i % 3}").mkdir(exist_ok=True)
        with Image.open(path) as image:
            image.convert("RGB").resize((400, 300)).save(root / f"class_{i % 3}" / f"{i:03d}.jpg", quality=95)
    return root


@pytest.fixture(scope="module")
def photo_beton(photos, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("beton") / "photos.beton"
    convert.main(convert.ConvertConfig(out, photos, workers=1))
    return out


@pytest.fixture
def small(tmp_path) -> Path:
    """A finished file of eight drawn images of two classes; no real data needed."""
    for i in range(8):
        folder = tmp_path / "images" / f"class_{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 255, (4, 5, 3), np.uint8).repeat(9, 0).repeat(9, 1)
        Image.fromarray(pixels).save(folder / f"{i}.jpg")
    convert.main(convert.ConvertConfig(tmp_path / "small.beton", tmp_path / "images", workers=1))
    return tmp_path / "small.beton"


# ---- FFCV ----


@pytest.mark.ffcv
@pytest.mark.slow
def test_the_layout_is_ffcvs():
    found = json.loads(
        run_python("""
        import json, ffcv.types as t
        from ffcv.fields import RGBImageField, IntField
        def offsets(dtype):
            return [dtype.itemsize] + [[dtype.fields[n][1], dtype.fields[n][0].itemsize] for n in dtype.names]
        sample = t.get_metadata_type([RGBImageField(), IntField()])
        image = sample[0]
        ids = {v: k for k, v in t.TYPE_ID_HANDLER.items()}
        print(json.dumps([offsets(t.HeaderType), offsets(t.FieldDescType), offsets(t.ALLOC_TABLE_TYPE), offsets(image),
            offsets(sample), t.CURRENT_VERSION, ids[RGBImageField], ids[IntField], image.names]))
        """)
    )

    def offsets(dtype):
        return [dtype.itemsize] + [[dtype.fields[n][1], dtype.fields[n][0].itemsize] for n in dtype.names]

    assert found[:3] == [offsets(beton.HEADER), offsets(beton.DESCRIPTOR), offsets(beton.ALLOCATION)]
    ours = offsets(beton.SAMPLE)
    assert found[4] == [ours[0], [0, found[3][0]], ours[5]]
    assert found[3][1:] == ours[1:5]
    assert found[5:8] == [beton.FFCV_VERSION, *(number for _, number in beton.FIELDS)]
    assert found[8] == ["mode", "width", "height", "data_ptr"]


@pytest.mark.ffcv
@pytest.mark.slow
def test_ffcvs_own_loader_reads_it(photo_beton, tmp_path):
    """With both of its page caches, in shuffled order: labels exact, pixels as far as FFCV's decoder goes.

    Its decoder uses libjpeg's fast transform and plain upsampling, so pixels are near, not equal.
    """
    assert photo_beton.stat().st_size > 2 * beton.PAGE_BYTES + beton.data_start(300)
    run_python(
        """
        import sys, numpy as np
        from ffcv.loader import Loader, OrderOption
        from ffcv.fields.rgb_image import SimpleRGBImageDecoder
        from ffcv.fields.basics import IntDecoder
        order, read = np.random.default_rng(0).permutation(300), {}
        for os_cache in (False, True):
            loader = Loader(sys.argv[1], batch_size=50, num_workers=2, os_cache=os_cache, indices=order,
                order=OrderOption.SEQUENTIAL,
                pipelines={"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()]})
            batches = [(np.array(image), np.array(label)) for image, label in loader]
            read[f"images_{os_cache}"] = np.concatenate([b[0] for b in batches])
            read[f"labels_{os_cache}"] = np.concatenate([b[1] for b in batches]).reshape(-1)
        np.savez(sys.argv[2], order=order, **read)
        """,
        photo_beton,
        tmp_path / "read.npz",
    )
    read, opened = np.load(tmp_path / "read.npz"), beton.open_beton(photo_beton)
    handle, out, order = decode.make_handle(), np.empty(300 * 400 * 3, np.uint8), read["order"]
    for os_cache in (False, True):
        images, labels = read[f"images_{os_cache}"], read[f"labels_{os_cache}"]
        assert np.array_equal(labels, opened.labels[order])
        for row in range(0, 300, 7):
            assert decoded_status(opened, handle, order[row], out) == decode.OK
            assert np.abs(out.reshape(300, 400, 3).astype(int) - images[row]).mean() < 3
    decode.free_handle(handle)


@pytest.mark.ffcv
@pytest.mark.slow
def test_ffcvs_own_file_is_refused(tmp_path):
    run_python(
        """
        import sys, numpy as np
        from ffcv.writer import DatasetWriter
        from ffcv.fields import RGBImageField, IntField
        rows = [(np.full((8, 8, 3), i, np.uint8), i) for i in range(4)]
        writer = DatasetWriter(sys.argv[1], {"image": RGBImageField("jpg"), "label": IntField()}, num_workers=1)
        writer.from_indexed_dataset(rows)
        """,
        tmp_path / "theirs.beton",
    )
    with pytest.raises(UserError, match=r"no theirs\.manifest\.json"):
        beton.open_beton(tmp_path / "theirs.beton")


def test_no_sample_crosses_a_page():
    rng, end = np.random.default_rng(0), beton.data_start(1000)
    assert end % beton.PAGE_BYTES == 0 and end >= beton.SAMPLES_AT + 1000 * beton.SAMPLE.itemsize
    for size in (*rng.integers(1, 400_000, 2000), beton.PAGE_BYTES, 1, beton.PAGE_BYTES, beton.PAGE_BYTES):
        start = beton.place(end, int(size))
        assert start >= end and start // beton.PAGE_BYTES == (start + size - 1) // beton.PAGE_BYTES
        assert start == end or start - end < size
        end = start + int(size)


# ---- opening ----


def decoded_status(opened: beton.Beton, handle, sample: int, out: np.ndarray) -> int:
    b = opened
    return decode.decode_rgb(
        *(handle, b.data, b.offsets[sample], b.sizes_bytes[sample]),
        *(b.modes[sample], b.heights[sample], b.widths[sample], out),
    )


def test_what_was_converted_is_what_is_opened(photos, photo_beton):
    opened = beton.open_beton(photo_beton)
    names = sorted(str(p.relative_to(photos)) for p in photos.glob("*/*.jpg"))
    assert opened.file_names() == names and opened.classes == ["class_0", "class_1", "class_2"]
    assert [opened.classes[label] for label in opened.labels] == [name.split("/")[0] for name in names]
    assert len(opened) == 300 and (opened.heights == 300).all() and (opened.widths == 400).all()
    for sample in range(300):
        assert beton.jpeg_bytes(opened, sample).tobytes() == (photos / names[sample]).read_bytes()


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="is missing"):
        beton.open_beton(tmp_path / "none.beton")


def test_missing_manifest(small):
    beton.manifest_path(small).unlink()
    with pytest.raises(UserError, match="another tool"):
        beton.open_beton(small)


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_truncated_file(small, keep):
    os.truncate(small, int(small.stat().st_size * keep))
    with pytest.raises(UserError, match="truncated"):
        beton.open_beton(small)


def test_a_file_that_is_too_long(small):
    with open(small, "ab") as file:
        file.write(b"more")
    with pytest.raises(UserError, match="too long"):
        beton.open_beton(small)


def test_manifest_of_another_file(small, tmp_path):
    """Same number of images, same number of bytes: only the digest tells."""
    content = bytearray(small.read_bytes())
    content[beton.SAMPLES_AT + 16] ^= 1
    small.write_bytes(content)
    with pytest.raises(UserError, match="not the file its manifest describes"):
        beton.open_beton(small)


@pytest.mark.parametrize(
    "change",
    [
        {"format_version": 2},
        {"images": 0},
        {"images": 10**9},
        {"images": "8"},
        {"classes": None},
        {"tables_sha256": ""},
    ],
    ids=str,
)
def test_changed_manifest(small, change):
    path = beton.manifest_path(small)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError):
        beton.open_beton(small)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"format_version": 1}', "\x00"])
def test_manifest_that_is_none(small, text):
    beton.manifest_path(small).write_text(text)
    with pytest.raises(UserError, match="manifest"):
        beton.open_beton(small)


def test_changed_file_list(small):
    path = beton.files_path(small)
    path.write_text(path.read_text().replace("class_0/0.jpg", "class_0/9.jpg"))
    opened = beton.open_beton(small)
    with pytest.raises(UserError, match="does not belong"):
        opened.file_names()
    path.unlink()
    with pytest.raises(UserError, match="is missing"):
        opened.file_names()


@pytest.fixture(scope="module")
def made_compact(tmp_path_factory) -> Path:
    """An FFCV file of four drawn images whose tables are half of it, adopted. Ours have 8 MiB of zeros between."""
    images = []
    for i in range(4):
        buffer = io.BytesIO()
        pixels = np.random.default_rng(i).integers(0, 255, (3, 4, 3), np.uint8).repeat(8, 0).repeat(8, 1)
        Image.fromarray(pixels).save(buffer, "JPEG")
        images.append(buffer.getvalue())
    samples, allocations = np.zeros(4, beton.SAMPLE), np.zeros(4, beton.ALLOCATION)
    sizes = [len(image) for image in images]
    offsets = beton.SAMPLES_AT + samples.nbytes + np.cumsum([0, *sizes])
    samples["width"], samples["height"], samples["offset"], samples["label"] = 32, 24, offsets[:4], [1, 0, 2, 1]
    allocations["sample"], allocations["offset"], allocations["bytes"] = range(4), offsets[:4], sizes
    head = beton.head_bytes(4, int(offsets[4]))
    path = tmp_path_factory.mktemp("compact") / "compact.beton"
    path.write_bytes(head + samples.tobytes() + b"".join(images) + allocations.tobytes())
    convert.main(convert.ConvertConfig(source=path, workers=1))
    return path


@pytest.fixture
def compact(made_compact, tmp_path) -> Path:
    """A copy of it to damage."""
    return shutil.copytree(made_compact.parent, tmp_path / "copy") / made_compact.name


@pytest.mark.parametrize("part", ["header", "samples", "allocations", "all"])
def test_mutated_tables(compact, part):
    """A digest that does not fit tells. Where it does, as a faulty writer's would, every image decodes or says why not.

    What decodes is what Pillow sees in the bytes at that place.
    """
    sound, manifest, handle = compact.read_bytes(), beton.manifest_path(compact), decode.make_handle()
    about, seen = json.loads(manifest.read_text()), []
    first, last = {
        "header": (0, 64),
        "samples": (beton.SAMPLES_AT, beton.SAMPLES_AT + 4 * beton.SAMPLE.itemsize),
        "allocations": (len(sound) - 4 * beton.ALLOCATION.itemsize, len(sound)),
        "all": (0, len(sound)),
    }[part]
    for mutant in mutants(sound[first:last], seed=len(part), count=COUNT if part == "all" else COUNT // 3):
        if part != "all":  # where it is
            mutant = (mutant + sound[first:last])[: last - first]
        compact.write_bytes(sound[:first] + mutant + sound[last:])
        manifest.write_text(json.dumps(about))
        opened = outcome(lambda: beton.open_beton(compact))
        assert isinstance(opened, UserError) or opened.labels.tolist() == [1, 0, 2, 1]
        tables = outcome(lambda: read_tables(compact))
        if isinstance(tables, UserError):
            seen.append("refused")
            continue
        sha256 = beton.tables_sha256(tables.head, tables.samples, tables.allocations)
        sizes = {"bytes": compact.stat().st_size, "images": len(tables.labels)}
        manifest.write_text(json.dumps(about | sizes | {"tables_sha256": sha256}))
        opened = outcome(lambda: beton.open_beton(compact))
        for sample in [] if isinstance(opened, UserError) else range(len(opened)):
            height, width = int(opened.heights[sample]), int(opened.widths[sample])
            out = np.empty(min(height * width, 10**6) * 3, np.uint8)
            status = decoded_status(opened, handle, sample, out)
            seen.append(decode.STATUS_TEXT[status])
            if status == decode.OK and opened.modes[sample] == beton.MODE_JPEG:
                with Image.open(io.BytesIO(beton.jpeg_bytes(opened, sample).tobytes())) as image:
                    assert np.array_equal(out[: height * width * 3].reshape(height, width, 3), image.convert("RGB"))
    decode.free_handle(handle)
    assert seen.count("refused") > 10 and "decoded" in seen


def test_mutated_manifests(small, tmp_path, capsys):
    """Refused, or it still says what the file is: the digests and the size of the tables tie both together."""
    manifest, sound, refused = beton.manifest_path(small), beton.open_beton(small), 0
    content = manifest.read_bytes()
    for mutant in json_mutants(content, seed=0):
        manifest.write_bytes(mutant)
        opened = outcome(lambda: beton.open_beton(small))
        again = outcome(lambda: convert.main(convert.ConvertConfig(small, tmp_path / "images", workers=1)))
        if isinstance(opened, UserError):
            refused += 1
            assert isinstance(again, UserError)
            continue
        assert opened.labels.tolist() == sound.labels.tolist() and opened.classes == json.loads(mutant)["classes"]
        assert isinstance(opened.labelled, bool)
        assert again is None or isinstance(again, UserError)
        names = outcome(opened.file_names)
        assert isinstance(names, UserError) or names == sound.file_names()
    assert 100 < refused < COUNT


def test_mutated_file_lists(compact):
    """With a digest that fits: five columns a sample, or a sentence."""
    path, manifest, refused = beton.files_path(compact), beton.manifest_path(compact), 0
    content, about = path.read_bytes(), json.loads(manifest.read_text())
    for mutant in mutants(content, seed=0):
        path.write_bytes(mutant)
        manifest.write_text(json.dumps(about | {"files_sha256": hashlib.sha256(mutant).hexdigest()}))
        opened = beton.open_beton(compact)
        rows = outcome(lambda opened=opened: beton.file_rows(opened))
        digests = outcome(lambda opened=opened: [Digests(opened).match(sample) for sample in range(4)])
        if isinstance(rows, UserError):
            refused += 1
        else:
            assert len(rows) == 4 and opened.file_names() == [row[4] for row in rows]
            found = [hashlib.sha256(beton.jpeg_bytes(opened, sample)).hexdigest() for sample in range(4)]
            assert digests == [row[3] == sha256 for row, sha256 in zip(rows, found, strict=True)]
    assert 50 < refused < COUNT


NAME = st.one_of(st.text(max_size=30), st.binary(max_size=30).map(os.fsdecode))  # as a system's names may be
SIDE = st.integers(1, 65535)
NAME = NAME.map(lambda name: name.translate({ord("\t"): None, ord("\n"): None}))
IMAGES = st.lists(
    st.tuples(NAME, st.integers(0, 2**32), st.none() | st.tuples(st.binary(min_size=1, max_size=300), SIDE, SIDE)),
    unique_by=lambda image: image[0],
    min_size=1,
    max_size=12,
).filter(lambda images: any(stored for _, _, stored in images))


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(IMAGES, st.lists(NAME, min_size=1, max_size=5, unique=True), st.booleans())
def test_what_is_written_is_read(images, classes, labelled):
    """Any names, labels, sizes and bytes, some images left out."""
    names = [name for name, _, _ in images]
    labels = np.array([number % len(classes) for _, number, _ in images], np.int64)
    kept = [i for i, (_, _, stored) in enumerate(images) if stored]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.beton"
        source = Source("any", "train", classes, names, labels, Path(folder), labelled=labelled)
        with BetonWriter(path, len(images), {"any": "one"}) as writer:
            for _, _, stored in images:
                data, height, width = stored or (b"", 0, 0)
                sha256 = hashlib.sha256(data).digest()
                image = ImageBytes(KEPT, beton.MODE_JPEG, height, width, len(data), sha256, data)
                writer.append(image if stored else None, (len(data), 0))
            writer.finish(source, {})
        opened = beton.open_beton(path)
        assert opened.file_names() == [names[i] for i in kept] and opened.classes == classes
        assert opened.labels.tolist() == labels[kept].tolist() and opened.labelled == labelled
        assert opened.manifest["skipped"] == [name for i, name in enumerate(names) if i not in kept]
        for sample, i in enumerate(kept):
            data, *size = images[i][2]
            assert beton.jpeg_bytes(opened, sample).tobytes() == data
            assert [opened.heights[sample], opened.widths[sample]] == size
            assert Digests(opened).match(sample)


def test_classes_must_agree():
    beton.require_same_classes("train", ["cat", "dog"], "val", ["cat", "dog"])
    with pytest.raises(UserError, match="val lacks dog"):
        beton.require_same_classes("train", ["cat", "dog"], "val", ["cat"])
    with pytest.raises(UserError, match="train lacks emu; val lacks dog"):
        beton.require_same_classes("train", ["cat", "dog"], "val", ["cat", "emu"])


# ---- the decoder ----


def test_pixels_are_pillows(imagenet_sample):
    """Bit for bit, colour and greyscale, and nothing is written behind the image."""
    handle, out, modes = decode.make_handle(), np.empty(40_000_000, np.uint8), set()
    for path in imagenet_sample:
        data = np.fromfile(path, np.uint8)
        with Image.open(path) as image:
            if image.mode == "CMYK":
                continue
            modes.add(image.mode)
            expected = np.asarray(image.convert("RGB"))
        size = expected.size
        out[size : size + 100] = 77
        assert decode.decode_rgb(handle, data, 0, len(data), 0, *expected.shape[:2], out) == decode.OK
        assert np.array_equal(out[:size].reshape(expected.shape), expected), path
        assert (out[size : size + 100] == 77).all()
    decode.free_handle(handle)
    assert modes == {"L", "RGB"}


def test_every_status(small):
    opened = beton.open_beton(small)
    handle, data, (offset, size) = decode.make_handle(), opened.data, (opened.offsets[0], opened.sizes_bytes[0])
    height, width = opened.heights[0], opened.widths[0]
    out = np.full(height * width * 3 + 8, 7, np.uint8)

    def status(offset=offset, size=size, mode=0, height=height, width=width, data=data, out=out):
        return decode.decode_rgb(handle, data, offset, size, mode, height, width, out)

    whole = np.array(beton.jpeg_bytes(opened, 0))
    cut = np.concatenate([whole[: len(whole) * 3 // 4], np.zeros(4, np.uint8)])
    table = whole.tobytes().index(b"\xff\xc0") + 12  # which quantization table the first colour uses
    undefined = whole.copy()
    undefined[table] = 3
    assert status() == decode.OK
    assert status(offset=len(data) - size + 1) == decode.OUTSIDE_FILE
    assert status(offset=-1) == status(size=0) == status(size=len(data) + 1) == decode.OUTSIDE_FILE
    assert status(offset=2**63 - 1) == decode.OUTSIDE_FILE
    assert status(out=out[: height * width * 3 - 1]) == status(height=0) == decode.BUFFER_TOO_SMALL
    assert status(data=np.zeros(100, np.uint8), offset=0, size=100) == decode.NOT_A_JPEG
    assert status(height=height - 1) == status(height=width, width=height) == decode.WRONG_SIZE
    assert status(data=cut, offset=0, size=len(cut)) == decode.DAMAGED
    assert status(data=undefined, offset=0, size=len(undefined)) == decode.UNDECODABLE
    assert status(mode=1) == decode.WRONG_RAW_SIZE
    assert status(mode=1, size=height * width * 3, offset=0) == decode.OK
    assert np.array_equal(out[:-8], data[: height * width * 3])
    assert status(mode=2) == decode.UNKNOWN_MODE
    assert status() == decode.OK, "a fault must not spoil the handle for the next image"
    assert (out[-8:] == 7).all()
    decode.free_handle(handle)
    assert len(decode.STATUS_TEXT) == decode.CHANGED + 1  # which no decode gives


def test_a_bogus_table_does_not_spoil_the_next_image(small):
    """libjpeg-turbo 2.1 keeps a bad Huffman table: the same decompressor then refuses every image."""
    opened = beton.open_beton(small)
    whole = np.array(beton.jpeg_bytes(opened, 0))
    out = np.empty(opened.heights[0] * opened.widths[0] * 3, np.uint8)
    handle, rng, faults = decode.make_handle(), np.random.default_rng(0), 0
    for _ in range(300):
        changed = whole.copy()
        changed[rng.integers(2, 620, 3)] = rng.integers(0, 256, 3)
        faults += decode.decode_rgb(handle, changed, 0, len(changed), 0, opened.heights[0], opened.widths[0], out) != 0
        assert decoded_status(opened, handle, 0, out) == decode.OK
    decode.free_handle(handle)
    assert faults > 50


@pytest.mark.slow
def test_the_compiled_decoder_is_cached_between_processes(small, tmp_path):
    """The second process loads the first one's machine code, with libjpeg-turbo at another address."""
    code = """
        import ctypes, sys, numpy as np
        from pipeline.storage import beton, decode
        b = beton.open_beton(sys.argv[1])
        handle, out = decode.make_handle(), np.zeros(b.heights[0] * b.widths[0] * 3, np.uint8)
        place, size = (b.offsets[0], b.sizes_bytes[0]), (b.heights[0], b.widths[0])
        status = decode.decode_rgb(handle, b.data, *place, b.modes[0], *size, out)
        print(status, int(out.sum()), sum(decode.decode_rgb.stats.cache_hits.values()),
            ctypes.cast(decode.turbojpeg().tjDecompress2, ctypes.c_void_p).value)
    """
    runs = [run_python(code, small, NUMBA_CACHE_DIR=str(tmp_path / "cache")).split() for _ in range(3)]
    assert [run[0] for run in runs] == ["0"] * 3 and len({run[1] for run in runs}) == 1
    assert [run[2] for run in runs] == ["0", "1", "1"]
    if Path("/proc/sys/kernel/randomize_va_space").read_text().strip() == "2":
        assert len({run[-1] for run in runs}) > 1
