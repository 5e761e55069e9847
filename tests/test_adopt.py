"""FFCV files of other origin, adopted where they lie: against FFCV's own Reader and Loader, and Pillow."""

import io
import json
import os
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.convert import ConvertConfig
from pipeline.convert import main as convert
from pipeline.errors import UserError
from pipeline.loader import make_loader
from pipeline.spec import BARLOW_TWINS_VIEWS, LoaderConfig
from pipeline.storage import adopt, beton
from pipeline.storage.beton import file_rows, jpeg_bytes, open_beton
from pipeline.storage.decode_pil import decode_pil
from pipeline.storage.shards import open_shards
from tests.support import assert_same_batches

REPO = Path(__file__).resolve().parents[1]
HEIGHT, WIDTH, IMAGES = 60, 80, 24

WRITE = """
import json, sys
from pathlib import Path
import numpy as np
from PIL import Image
from ffcv.writer import DatasetWriter
from ffcv.reader import Reader
from ffcv.loader import Loader, OrderOption
from ffcv.fields import *
from ffcv.fields.basics import IntDecoder
from ffcv.fields.rgb_image import SimpleRGBImageDecoder

folder, size, paths = Path(sys.argv[1]), (int(sys.argv[2]), int(sys.argv[3])), sys.argv[4:]

class Photos:
    def __init__(self, columns):
        self.columns = columns
    def __len__(self):
        return len(paths)
    def __getitem__(self, i):
        image = np.array(Image.open(paths[i]).convert("RGB").resize(size))
        label = i * 7 % 5
        values = dict(image=image, label=label, other=1000 + i, score=i / 2, meta=dict(name="x" * i),
            blob=np.arange(i % 3 + 1, dtype=np.uint8), vector=np.full(6, i, np.float32))
        return tuple(values[column] for column in self.columns)

def write(name, columns, fields, page, workers):
    np.random.seed(1)
    writer = DatasetWriter(str(folder / name), fields, page_size=page, num_workers=workers)
    writer.from_indexed_dataset(Photos(columns), chunksize=3)

def plain(**how):
    return {"image": RGBImageField(**how), "label": IntField()}

write("raw.beton", ["image", "label"], plain(write_mode="raw"), 1 << 23, 1)
write("jpg.ffcv", ["image", "label"], plain(write_mode="jpg", jpeg_quality=80), 1 << 21, 1)
write("proportion.beton", ["image", "label"], plain(write_mode="proportion", compress_probability=0.5), 1 << 23, 1)
write("smart.beton", ["image", "label"], plain(write_mode="smart", smart_threshold=1000), 1 << 22, 2)
many = {"position": IntField(), "vector": NDArrayField(np.dtype("float32"), (6,)), "y": IntField(), "meta": JSONField(),
    "photo": RGBImageField(write_mode="proportion"), "score": FloatField(), "blob": BytesField()}
write("many.beton", ["other", "vector", "label", "meta", "image", "score", "blob"], many, 1 << 21, 2)
write("alone.beton", ["score", "image"], {"score": FloatField(), "img": RGBImageField(write_mode="jpg")}, 1 << 21, 1)
write("two.beton", ["label", "image", "other"], {"a": IntField(), "image": RGBImageField(), "b": IntField()},
    1 << 21, 1)
write("none.beton", ["label"], {"label": IntField()}, 1 << 21, 1)

for path in folder.iterdir():
    at = int(np.fromfile(path, np.uint64, 3)[2])  # where the allocation table is: workers may write it in any order
    if path.name == "many.beton":
        with open(path, "r+b") as file:
            file.seek(at)
            rows = np.frombuffer(file.read(), np.uint64).reshape(-1, 3)
            file.seek(at)
            file.write(np.random.permutation(rows).tobytes())
    reader = Reader(str(path))
    image = next((n for n, f in reader.handlers.items() if isinstance(f, RGBImageField)), None)
    if image is None or path.name == "two.beton":
        continue
    label = next((n for n in ("label", "y") if n in reader.handlers), None)
    pipelines = dict.fromkeys(reader.handlers)
    pipelines[image] = [SimpleRGBImageDecoder()]
    if label:
        pipelines[label] = [IntDecoder()]
    loader = Loader(str(path), len(paths), num_workers=1, os_cache=True, order=OrderOption.SEQUENTIAL,
        drop_last=False, pipelines=pipelines)
    (batch,) = [tuple(np.array(part) for part in batch) for batch in loader]
    images = next(part for part in batch if part.ndim == 4)
    labels = next((part.reshape(-1) for part in batch if part.ndim == 2), np.zeros(0))
    at = list(reader.handlers).index(image)
    modes = reader.metadata[f"f{at}"]["mode"]
    sizes = dict(zip(reader.alloc_table["ptr"].tolist(), reader.alloc_table["size"].tolist()))
    data = path.read_bytes()
    stored = [data[p : p + sizes[p]] for p in reader.metadata[f"f{at}"]["data_ptr"].tolist()]
    np.savez(path.with_suffix(".npz"), images=images, labels=labels, modes=modes,
        stored=np.array(stored, object), order=reader.alloc_table["sample_id"])
"""


def run_python(code: str, *arguments) -> str:
    """Runs code in a process of its own: FFCV starts processes and changes torch's settings."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPO)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def written(tmp_path_factory, imagenet_sample) -> Path:
    """A folder of files that FFCV wrote; beside each what FFCV reads from it."""
    folder = tmp_path_factory.mktemp("written")
    run_python(WRITE, folder, WIDTH, HEIGHT, *imagenet_sample[:IMAGES])
    return folder


@pytest.fixture
def ffcvs(written, tmp_path) -> Path:
    """A copy of them to write beside."""
    shutil.copytree(written, tmp_path / "ffcvs")
    return tmp_path / "ffcvs"


@pytest.fixture
def foreign(tmp_path) -> Path:
    """A .beton of eight drawn images in three classes, without what lies beside one: nothing says who wrote it."""
    for i in range(8):
        (tmp_path / "images" / f"class_{i % 3}").mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 255, (4, 5, 3), np.uint8).repeat(9, 0).repeat(9, 1)
        Image.fromarray(pixels).save(tmp_path / "images" / f"class_{i % 3}" / f"{i}.jpg")
    (tmp_path / "foreign").mkdir()
    path = tmp_path / "foreign" / "x.beton"
    convert(ConvertConfig(path, tmp_path / "images", workers=1))
    beton.manifest_path(path).unlink()
    beton.files_path(path).unlink()
    return path


def adopted(path: Path, **changes) -> beton.Beton:
    convert(replace(ConvertConfig(source=path, workers=1), **changes))
    return open_beton(changes.get("out") or path)


def listing(folder: Path) -> dict[str, bytes | None]:
    return {p.name: None if p.is_symlink() else p.read_bytes() for p in sorted(folder.iterdir())}


def spoil(path: Path, opened: beton.Beton, sample: int) -> None:
    """Zeros in the middle of one image."""
    file = np.memmap(path, np.uint8, "r+")
    middle = int(opened.offsets[sample] + opened.sizes_bytes[sample] // 2)
    file[middle : middle + int(opened.sizes_bytes[sample] // 3)] = 0
    file.flush()


# ---- what FFCV wrote ----


@pytest.mark.ffcv
@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["raw.beton", "jpg.ffcv", "proportion.beton", "smart.beton", "many.beton", "alone.beton"]
)
def test_images_and_labels_are_those_that_ffcv_reads(ffcvs, name, tmp_path):
    path, out = ffcvs / name, tmp_path / "data" / "train.beton" if name.endswith(".ffcv") else None
    before = path.read_bytes()
    opened, theirs = adopted(path, out=out), np.load(path.with_suffix(".npz"), allow_pickle=True)
    assert path.read_bytes() == before
    assert len(opened) == IMAGES and np.array_equal(opened.modes, theirs["modes"])
    if name == "alone.beton":
        assert not opened.labelled and opened.classes == ["unlabelled"]
    else:
        assert opened.labelled and opened.labels.tolist() == theirs["labels"].tolist()
        assert opened.labels.tolist() == [i * 7 % 5 for i in range(IMAGES)] and opened.classes == list("01234")
    if name in ("proportion.beton", "many.beton"):
        assert set(opened.modes) == {0, 1}
    for i in range(IMAGES):
        stored = jpeg_bytes(opened, i).tobytes()
        assert stored == theirs["stored"][i]
        if opened.modes[i] == beton.MODE_RAW:
            pixels = np.frombuffer(stored, np.uint8).reshape(HEIGHT, WIDTH, 3)
            assert np.array_equal(pixels, theirs["images"][i])
        else:
            pixels = np.asarray(Image.open(io.BytesIO(stored)))
            assert np.abs(pixels.astype(float) - theirs["images"][i]).mean() < 3  # FFCV's decoder is a faster one
        assert np.array_equal(np.asarray(decode_pil(opened, i)), pixels)
        assert (opened.heights[i], opened.widths[i]) == (HEIGHT, WIDTH)


@pytest.mark.ffcv
@pytest.mark.slow
def test_every_loader_trains_on_it_with_the_same_batches(ffcvs):
    """Other field names, further fields, an allocation table out of order, raw pixels and JPEGs in one file."""
    order = np.load(ffcvs / "many.npz", allow_pickle=True)["order"]
    assert (np.diff(order.astype(int)) < 0).any()
    opened = adopted(ffcvs / "many.beton")
    config = LoaderConfig(opened.path, BARLOW_TWINS_VIEWS, 32, global_batch=8, workers=2, seed=3)

    def batches(backend: str, data: Path = opened.path) -> list:
        with make_loader(replace(config, backend=backend, data=data)) as loader:
            return list(loader.batches(0, 4))

    fast = batches("fast")
    for backend in ("ffcv", "resident", "torch"):
        assert_same_batches(batches(backend), fast)
    pytest.importorskip("nvidia.dali")
    jpegs = adopted(ffcvs / "alone.beton").path
    assert_same_batches(batches("dali", jpegs), batches("fast", jpegs))


@pytest.mark.ffcv
@pytest.mark.slow
def test_fields_that_cannot_be_told(ffcvs):
    with pytest.raises(UserError, match=r"2 integer fields \(a, b\), and one of the name class or label or labels"):
        adopted(ffcvs / "two.beton")
    with pytest.raises(UserError, match="has the fields label; one RGBImageField"):
        adopted(ffcvs / "none.beton")
    with pytest.raises(UserError, match=r"does not end in .beton; give --out NAME.beton, which becomes a link"):
        adopted(ffcvs / "jpg.ffcv")


# ---- any .beton without a manifest ----


def test_adopting_in_place_and_again(foreign, capsys):
    with pytest.raises(UserError, match=rf"pipeline/convert.py --source {foreign}"):
        open_beton(foreign)
    before = foreign.read_bytes()
    opened = adopted(foreign, verify=True)
    assert foreign.read_bytes() == before and set(listing(foreign.parent)) == {
        "x.beton",
        "x.files.tsv",
        "x.manifest.json",
    }
    assert opened.classes == ["0", "1", "2"] and np.bincount(opened.labels).tolist() == [3, 3, 2]
    assert [row[4] for row in file_rows(opened)] == [f"{i:09d}" for i in range(8)]
    convert(ConvertConfig(out=foreign, verify=True, workers=1))
    adopted(foreign)
    assert "already adopted; nothing to do" in capsys.readouterr().out
    os.utime(foreign, ns=(1, 1))
    with pytest.raises(
        UserError, match="x.manifest.json is of other files, or they have changed since .* pass --fresh"
    ):
        adopted(foreign)
    adopted(foreign, fresh=True)


def test_shards_of_an_adopted_file(foreign):
    opened = adopted(foreign, format="webdataset", shard_images=3, verify=True)
    packed = open_shards(foreign.with_suffix(".shards.json"))
    assert len(packed.maps) == 3 and packed.labels.tolist() == opened.labels.tolist()
    assert [jpeg_bytes(packed, i).tobytes() for i in range(8)] == [jpeg_bytes(opened, i).tobytes() for i in range(8)]


def test_a_file_of_ours_is_left_alone(foreign, tmp_path, capsys):
    ours = tmp_path / "ours.beton"
    convert(ConvertConfig(ours, tmp_path / "images", workers=1))
    before = listing(tmp_path / "foreign"), beton.manifest_path(ours).read_bytes()
    for fresh in (False, True):
        adopted(ours, fresh=fresh)
        assert "already converted; nothing to do" in capsys.readouterr().out
    with pytest.raises(UserError, match="already converted; give it to --data as it is"):
        adopted(ours, out=tmp_path / "link.beton")
    assert before == (listing(tmp_path / "foreign"), beton.manifest_path(ours).read_bytes())


def test_a_link_elsewhere(foreign, tmp_path):
    source = foreign.rename(foreign.with_name("images.ffcv"))
    convert(ConvertConfig(tmp_path / "data", source, split="train", workers=1))
    link = tmp_path / "data" / "train.beton"
    opened = open_beton(link)
    assert link.is_symlink() and link.samefile(source) and opened.manifest["source"]["split"] == "train"
    assert set(listing(link.parent)) == {"train.beton", "train.files.tsv", "train.manifest.json"}
    assert set(listing(foreign.parent)) == {"images.ffcv"}
    other = foreign.with_name("other.ffcv")
    shutil.copy(source, other)
    with pytest.raises(UserError, match="exists and is not a link to"):
        convert(ConvertConfig(link, other, workers=1))
    convert(ConvertConfig(link, other, workers=1, fresh=True))
    assert link.samefile(other)
    with pytest.raises(UserError, match="does not end in .beton"):
        convert(ConvertConfig(tmp_path / "data", source, workers=1))


def test_a_damaged_image(foreign, tmp_path, capsys):
    opened = adopted(foreign)
    spoil(foreign, opened, 4)
    for path in (beton.manifest_path(foreign), beton.files_path(foreign)):
        path.unlink()
    before = listing(foreign.parent)
    with pytest.raises(UserError, match=r"image 4 of .* cannot be decoded: .*--skip-unreadable and train with"):
        adopted(foreign)
    with pytest.raises(UserError, match=r"image 4 of "):
        convert(ConvertConfig(tmp_path / "new" / "train.beton", foreign, workers=1))
    assert listing(foreign.parent) == before and not (tmp_path / "new").exists()
    opened = adopted(foreign, skip_unreadable=True, verify=True)
    assert "but for 1 that were damaged when it was adopted" in capsys.readouterr().out
    assert opened.manifest["damaged"] == ["000000004"] and len(opened) == 8
    config = LoaderConfig(foreign, BARLOW_TWINS_VIEWS, 32, global_batch=4, workers=1, on_bad_image="substitute")
    with make_loader(config) as loader:
        batches = list(loader.epoch(0))
    assert sum(batch.substituted for batch in batches) == 1
    assert 4 not in torch.cat([batch.sample for batch in batches]).tolist()
    spoil(foreign, opened, 6)
    with pytest.raises(UserError, match=r"1 bad images of 8 \(000000006: its bytes have changed\); get a good copy"):
        convert(ConvertConfig(out=foreign, verify=True, workers=1))


@pytest.mark.parametrize("cut", [1, 24, 24 * 8, 2000, "head", "all"])
def test_a_file_that_is_cut_short(foreign, cut):
    content = foreign.read_bytes()
    foreign.write_bytes(content[: {"head": 100, "all": 0}.get(cut) if isinstance(cut, str) else -cut])
    before = listing(foreign.parent)
    with pytest.raises(UserError, match="cut short"):
        adopted(foreign)
    assert listing(foreign.parent) == before


def edited(path: Path, at: int, value: np.generic) -> None:
    content = bytearray(path.read_bytes())
    content[at : at + value.nbytes] = value.tobytes()
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, np.uint16(3), "version number 3, files of FFCV 1 with 2"),
        (beton.SAMPLES_AT + 16, np.int64(-1), "labels from -1 to 2, and class numbers from 0 to at most 1000000"),
        (beton.SAMPLES_AT + 16, np.int64(1_000_001), "labels from 0 to 1000001, and class"),
        (beton.HEADER.itemsize, np.uint8(1), "one RGBImageField|2 integer fields"),
        (beton.HEADER.itemsize, np.uint8(255), "'image' that is none of FFCV 1's own types"),
        (16, np.uint64(0), "was not finished or is cut short"),
        (8, np.uint64(0), "was not finished or is cut short: for 0 samples"),
        (beton.SAMPLES_AT + 5, np.uint64(77), "damaged sample table"),
        (beton.SAMPLES_AT, np.uint8(2), "damaged sample table"),
    ],
)
def test_a_file_that_cannot_be_right(foreign, at, value, message):
    edited(foreign, at, value)
    before = listing(foreign.parent)
    with pytest.raises(UserError, match=message):
        adopted(foreign)
    assert listing(foreign.parent) == before


@pytest.mark.parametrize(("row", "change"), [(3, 5), (7, 10**6)])
def test_allocations_that_overlap_or_reach_outside(foreign, row, change):
    at = foreign.stat().st_size - (8 - row) * beton.ALLOCATION.itemsize + 16
    size = np.frombuffer(foreign.read_bytes()[at : at + 8], np.uint64)[0]
    edited(foreign, at, np.uint64(size + change))
    with pytest.raises(UserError, match="damaged sample table"):
        adopted(foreign)


def test_nothing_is_left_after_a_stop(foreign, tmp_path, monkeypatch):
    before, written = listing(foreign.parent), []

    def stop(path, content):
        if written:
            raise KeyboardInterrupt
        written.append(path)
        path.write_bytes(content)

    monkeypatch.setattr(adopt, "write_whole", stop)
    for out in (None, tmp_path / "train.beton"):
        written.clear()
        with pytest.raises(KeyboardInterrupt):
            convert(ConvertConfig(out, foreign, workers=1))
        assert listing(foreign.parent) == before and not list(tmp_path.glob("train.*"))


def test_other_files_and_folders_without_out(tmp_path, foreign):
    for source in (tmp_path / "no.beton", tmp_path / "none"):
        with pytest.raises(UserError, match="is missing"):
            convert(ConvertConfig(source=source))
    with pytest.raises(UserError, match="--out is missing: the .beton that"):
        convert(ConvertConfig(source=tmp_path / "images"))
    with pytest.raises(UserError, match=r"x.beton looks like FFCV's, give --source .*foreign/x.beton"):
        convert(ConvertConfig(tmp_path / "out", foreign.parent))
    foreign.write_bytes(b"not FFCV's, " * 1000)
    with pytest.raises(UserError, match="version number"):
        adopted(foreign)


def test_the_file_is_read_once(tmp_path):
    """The bytes that the system counts as read by a process and its ended children, a small file apart."""
    for name, count in (("small", 2), ("large", 40)):
        folder = tmp_path / name / "images" / "a"
        folder.mkdir(parents=True)
        for i in range(count):
            pixels = np.random.default_rng(i).integers(0, 255, (480, 480, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.jpg", quality=95)
        convert(ConvertConfig(tmp_path / name / "x.beton", folder.parent, workers=1))
        beton.manifest_path(tmp_path / name / "x.beton").unlink()
    code = """
    import sys
    from pathlib import Path
    from pipeline.convert import ConvertConfig, main
    counts = []
    for folder in sys.argv[1:]:
        main(ConvertConfig(source=Path(folder) / "x.beton", workers=2))
        lines = Path("/proc/self/io").read_text().splitlines()
        counts.append(int(lines[0].removeprefix("rchar:")))
    print("read", counts[1] - counts[0])
    """
    out = run_python(code, tmp_path / "small", tmp_path / "large")
    read = int(out.splitlines()[-1].split()[1])
    opened = open_beton(tmp_path / "large" / "x.beton")
    images = int(opened.sizes_bytes.sum())
    assert images > 8 << 20 and images <= read < images + (1 << 20)
    assert json.loads(beton.manifest_path(opened.path).read_text())["images"] == 40
