"""WebDataset tars as a source, converted or used where they lie: against tarfile and Pillow."""

import gzip
import io
import itertools
import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval.splits import open_dataset
from pipeline.convert import ConvertConfig
from pipeline.convert import main as convert
from pipeline.errors import UserError
from pipeline.loader import make_loader
from pipeline.spec import BARLOW_TWINS_VIEWS, LoaderConfig
from pipeline.storage import adopt
from pipeline.storage.beton import jpeg_bytes, open_beton
from pipeline.storage.shards import open_shards, pack_shards
from pipeline.storage.sources import webdataset
from pipeline.storage.sources.open import open_source, split_names
from pipeline.storage.sources.source import image_places
from pipeline.storage.verify import verify
from tests.mutants import COUNT, mutants, outcome
from tests.support import assert_same_batches

JPEGS = [b"\xff\xd8 one", b"\xff\xd8 two", b"\xff\xd8 three"]  # listing opens no image


def write_tar(path: Path, members: list[tuple[str, bytes | str]], format_: int = tarfile.DEFAULT_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format_) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            data = content.encode() if isinstance(content, str) else content
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def samples(first: int, labels: list, suffix: str = "cls", image: str = "jpg") -> list[tuple[str, bytes | str]]:
    """Members of len(labels) samples; the image's bytes say which it is."""
    rows: list[tuple[str, bytes | str]] = []
    for i, label in enumerate(labels, first):
        rows.append((f"{i:04d}.{image}", b"\xff\xd8 image %d" % i))
        if label is not None:
            rows.append((f"{i:04d}.{suffix}", label if isinstance(label, str) else str(label)))
    return rows


def read_with_tarfile(paths: list[Path], image: str) -> list[tuple[str, bytes, str]]:
    """(name, image, class) of each sample, by the standard library alone."""
    found = []
    for path in paths:
        with tarfile.open(path) as tar:
            content = {member.name: tar.extractfile(member).read() for member in tar}
        found += [
            (f"{path.name}/{name}", data, content[name.removesuffix(image) + "cls"].decode())
            for name, data in content.items()
            if name.endswith(image)
        ]
    return found


@pytest.fixture(scope="module")
def photos(imagenet_sample) -> list[bytes]:
    """Real JPEGs that a .beton keeps as they are."""
    kept = []
    for path in imagenet_sample[:60]:
        with Image.open(path) as image:
            if image.mode == "RGB" and not image.getexif():
                kept.append(path.read_bytes())
    return kept[:24]


@pytest.fixture
def tars(tmp_path, photos) -> Path:
    """train in two tars, val in one, of 5 and of 3 classes."""
    for name, first, stop in (("train-000001", 8, 16), ("train-000000", 0, 8), ("val-000000", 16, 22)):
        rows = [
            row for i in range(first, stop) for row in ((f"{i:03d}.jpg", photos[i]), (f"{i:03d}.cls", f"{i * 3 % 5}\n"))
        ]
        write_tar(
            tmp_path / "tars" / f"cats-{name}.tar", [row for row in rows if name[0] == "t" or "cls" not in row[0]]
        )
    rows = [row for i in range(16, 22) for row in ((f"{i:03d}.jpg", photos[i]), (f"{i:03d}.cls", str(i % 3)))]
    write_tar(tmp_path / "tars" / "cats-val-000000.tar", rows)
    return tmp_path / "tars"


# ---- converted ----


def test_images_labels_and_order_are_the_tars(tars, tmp_path):
    convert(ConvertConfig(tmp_path / "out", tars, max_side=10_000, workers=1))
    for split, count in (("train", 16), ("val", 6)):
        opened = open_beton(tmp_path / "out" / f"{split}.beton")
        expected = read_with_tarfile(sorted(tars.glob(f"*-{split}-*.tar")), "jpg")
        assert len(opened) == len(expected) == count
        assert opened.file_names() == [name for name, _, _ in expected]
        assert opened.labels.tolist() == [int(label) for _, _, label in expected]
        assert opened.classes == list("01234")  # of both splits
        for i, (_, data, _) in enumerate(expected):
            assert jpeg_bytes(opened, i).tobytes() == data


def test_beton_to_shards_and_back(tars, tmp_path):
    convert(ConvertConfig(tmp_path / "a", tars, max_side=10_000, workers=1, format="webdataset", shard_images=5))
    convert(ConvertConfig(tmp_path / "b", tmp_path / "a", max_side=10_000, workers=1))
    for split in ("train", "val"):
        one, other = (open_beton(tmp_path / folder / f"{split}.beton") for folder in "ab")
        assert np.array_equal(one.labels, other.labels) and one.classes == other.classes
        assert [jpeg_bytes(one, i).tobytes() for i in range(len(one))] == [
            jpeg_bytes(other, i).tobytes() for i in range(len(other))
        ]


def test_images_without_labels_to_shards_and_back(tmp_path, photos):
    rows = [(f"{i}.jpg", photo) for i, photo in enumerate(photos[:5])]
    convert(ConvertConfig(tmp_path / "a.beton", write_tar(tmp_path / "x" / "x.tar", rows), max_side=10_000, workers=1))
    opened = open_beton(tmp_path / "a.beton")
    assert not opened.labelled and len(opened) == 5
    packed = open_shards(pack_shards(opened, 2))
    assert [jpeg_bytes(packed, i).tobytes() for i in range(5)] == photos[:5]
    (tmp_path / "b").mkdir()
    for tar in tmp_path.glob("a-*.tar"):
        with tarfile.open(tar) as file:
            assert {name.split(".")[1] for name in file.getnames()} == {"jpg"}
        tar.rename(tmp_path / "b" / tar.name)
    assert not open_source(tmp_path / "b").labelled


@pytest.mark.parametrize("format_", ["PNG", "WEBP"])
@pytest.mark.parametrize("how", ["json label", "json label_name", "json target", "txt", "cls name"])
def test_other_formats_and_labels(tmp_path, format_, how):
    names, rows, pixels = ["cat", "dog", "emu"], [], []
    for i in range(9):
        pixels.append(np.random.default_rng(i).integers(0, 256, (20, 30, 3), np.uint8))
        buffer = io.BytesIO()
        Image.fromarray(pixels[-1]).save(buffer, format_, lossless=True)
        suffix, _, field = how.partition(" ")
        label = {"label": i % 3, "target": float(i % 3)}.get(field, names[i % 3])
        about = {"caption": f"number {i}", "flag": True, field: label} if suffix == "json" else {}
        rows += [(f"./a/{i}.{format_}", buffer.getvalue()), (f"./a/{i}.{suffix}", json.dumps(about) or "")]
        rows[-1] = (rows[-1][0], json.dumps(about) if about else str(label))
    convert(ConvertConfig(tmp_path / "x.beton", write_tar(tmp_path / "in" / "images.tar", rows), workers=1))
    opened = open_beton(tmp_path / "x.beton")
    assert opened.classes == (["0", "1", "2"] if how in ("json label", "json target") else names)
    assert opened.labels.tolist() == [i % 3 for i in range(9)]
    assert opened.file_names()[4] == f"images.tar/a/4.{format_}"
    for i, image in enumerate(pixels):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=90, subsampling="4:2:0")
        assert jpeg_bytes(opened, i).tobytes() == buffer.getvalue()


# ---- which tars are which split ----


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["imagenet1k-train-0000.tar", "imagenet1k-validation-00.tar"], ["train", "val"]),
        (["train/0.tar", "val/0.tar"], ["train", "val"]),
        (["train/0.tar", "Validation/0.tar"], ["train", "val"]),
        (["x_train_0.tar", "x_test_0.tar"], ["train", "val"]),
        (["train/0.tar", "test/0.tar"], ["train", "val"]),
        (["0.tar", "constraint-1.tar"], []),
        (["trainval.tar"], []),
    ],
    ids=str,
)
def test_splits_by_words(tmp_path, names, splits):
    for i, name in enumerate(names):
        write_tar(tmp_path / name, samples(10 * i, [0, 1]))
    assert split_names(tmp_path) == splits
    if splits:
        assert [open_source(tmp_path, split).names for split in splits] == [
            [f"{Path(name).name}/{10 * i + k:04d}.jpg" for k in (0, 1)] for i, name in enumerate(names)
        ]
    else:
        assert len(open_source(tmp_path)) == 2 * len(names)


def test_test_is_val_where_nothing_else_is(tmp_path):
    for i, name in enumerate(("train", "val", "test")):
        write_tar(tmp_path / f"{name}.tar", samples(i, [i]))
    assert open_source(tmp_path, "val").names == ["val.tar/0001.jpg"]
    assert open_source(tmp_path, "val").classes == ["0", "1"]


def test_tars_of_no_split_are_counted(tmp_path):
    for i, name in enumerate(("x-train-0", "x-val-0", "x-test-0", "more-0")):
        write_tar(tmp_path / f"{name}.tar", samples(i, [i]))
    for split in ("train", "val"):
        source = open_source(tmp_path, split)
        assert len(source) == 1 and source.left_out == {"unused tars (more-0.tar first)": 2}
    assert not open_source(tmp_path / "more-0.tar").left_out


def test_img2datasets_tars_are_not_its_tables(tmp_path):
    """Beside each tar lie a table of addresses and captions, and its statistics."""
    for shard in ("00000", "00001"):
        rows = [
            row
            for key in (f"{shard}0000", f"{shard}0001")
            for row in ((f"{key}.jpg", b"x"), (f"{key}.txt", f"of {key}"), (f"{key}.json", json.dumps({"key": key})))
        ]
        write_tar(tmp_path / f"{shard}.tar", rows)
        (tmp_path / f"{shard}.parquet").write_bytes(b"PAR1")
        (tmp_path / f"{shard}_stats.json").write_text("{}")
    assert split_names(tmp_path) == []
    source = open_source(tmp_path)
    assert source.kind == "webdataset" and len(source) == 4 and not source.labelled


def test_folders_of_images_stay_what_they_are(tmp_path):
    """Tars beside class folders or splits, and a class of a split's name, are no WebDataset."""
    for name in ("train/cat/1.jpg", "train/train/1.jpg", "val/cat/1.jpg", "val/train/1.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    for name in ("train.tar", "train/train.tar", "train/train/train.tar"):
        write_tar(tmp_path / name, samples(0, [0]))
    source = open_source(tmp_path, "train")
    assert source.kind == "folder" and source.names == ["cat/1.jpg", "train/1.jpg"]
    (tmp_path / "train" / "train").rename(tmp_path / "train" / "dog")
    assert open_source(tmp_path / "train").kind == "folder"


@pytest.mark.parametrize("name", ["ILSVRC2012_img_train.tar", "n01440764.tar"])
def test_imagenets_own_tars_stay_what_they_are(tmp_path, name):
    inner = write_tar(tmp_path / "inner", samples(0, [0])).read_bytes()
    write_tar(tmp_path / "in" / name, [("n01440764.tar", inner)])
    with pytest.raises(UserError, match="ImageNet's train split has|no class folders"):
        open_source(tmp_path / "in", *split_names(tmp_path / "in"))


# ---- what labels are ----


def test_captions_are_no_labels(tmp_path, capsys):
    write_tar(tmp_path / "0.tar", samples(0, ["a cat", "a dog", "two cats", "a cat"], "txt"))
    source = open_source(tmp_path)
    assert not source.labelled and source.classes == ["unlabelled"] and source.labels.tolist() == [0] * 4
    assert "captions and not labels" in capsys.readouterr().err


def test_numbers_in_a_txt_are_labels(tmp_path):
    write_tar(tmp_path / "0.tar", samples(0, [3, 1, 2], "txt"))
    assert open_source(tmp_path).labels.tolist() == [3, 1, 2]


@pytest.mark.parametrize("folders", [False, True])
def test_names_of_the_classes_beside_the_tars(tmp_path, folders, capsys):
    for split in ("train", "val"):
        write_tar(tmp_path / (f"{split}/0.tar" if folders else f"{split}.tar"), samples(0, [2, 0]))
    (tmp_path / "classnames.txt").write_text("tench\nshark\nray\n")
    assert open_source(tmp_path, "val").classes == ["tench", "shark", "ray"]
    (tmp_path / "classnames.txt").write_text("tench\nshark\n")
    assert open_source(tmp_path, "val").classes == ["0", "1", "2"]
    assert "2 names for 3 classes: not used" in capsys.readouterr().err


def test_other_files_of_a_sample_are_counted(tmp_path):
    rows = [*samples(0, [0, 1]), ("0000.json", "{}"), ("0001.seg.png", b"x"), ("._0001.jpg", b"x"), ("README", b"x")]
    source = open_source(write_tar(tmp_path / "0.tar", rows))
    assert source.left_out == {".json": 1, ".seg.png": 1, "hidden or without suffix": 2} and len(source) == 2


# ---- what cannot be read ----


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([*samples(0, [0]), ("0000.jpg", b"x")], "has 0000.jpg twice"),
        ([*samples(0, [0]), ("0001.cls", "1")], "a sample '0001' with 0 images .its files: cls"),
        ([*samples(0, [0]), ("0000.png", b"x")], "a sample '0000' with 2 images .its files: cls, jpg, png"),
        (samples(0, [0, None, 1]), r"samples with a label in .cls and samples without it .0.tar/0001.jpg first"),
        ([*samples(0, [0]), *samples(1, ["1"], "txt")], r"label in .cls and samples without it .0.tar/0001.jpg first"),
        (samples(0, [0, -1]), "labels from -1 to 0, and class numbers from 0"),
        (samples(0, [0, 10**30]), f"labels from 0 to {10**30}, and class"),
        ([("0.jpg", b"x"), ("0.cls", b"\xff\xfe")], "a label of '0' that cannot be read .*utf-8"),
        ([("0.jpg", b"x"), ("0.json", "{")], "a label of '0' that cannot be read .Expecting"),
        ([("a\tb.jpg", b"x")], "a tab or a line break"),
        ([("README", b"x")], "has no images in its tars"),
    ],
    ids=str,
)
def test_samples_that_are_none(tmp_path, members, message):
    path = write_tar(tmp_path / "in" / "0.tar", members)
    for out in (None, tmp_path / "out.beton"):
        with pytest.raises(UserError, match=message):
            convert(ConvertConfig(out, path, workers=1))
    assert [p.name for p in tmp_path.rglob("*")] == ["in", "0.tar"]


@pytest.mark.parametrize("cut", [100, 512 * 2 + 100, 512 * 4, 512 * 5])
def test_a_tar_that_is_cut_short(tmp_path, cut):
    path = write_tar(tmp_path / "0.tar", samples(0, [0, 1]))
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UserError, match="is not a tar file, or not all of it"):
        open_source(path)


@pytest.mark.parametrize("format_", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_mutated_tars(tmp_path, format_):
    """Each is refused, or what is listed is what tarfile reads at these names. Long names have headers of their own."""
    path, rows, refused = tmp_path / "0.tar", [], 0
    label = (".cls", "1") if format_ == tarfile.GNU_FORMAT else (".json", '{"label": 1}')
    for i in range(4):
        key = f"é/{'long' * 30}/{i}" if i % 2 else f"{i}"
        rows += [(f"{key}.jpg", JPEGS[i % 3]), (key + label[0], label[1])]
    content = write_tar(path, rows, format_).read_bytes().rstrip(b"\0")
    content += bytes(-len(content) % tarfile.BLOCKSIZE + 2 * tarfile.BLOCKSIZE)
    for mutant in mutants(content, seed=format_):
        path.write_bytes(mutant)
        webdataset._read_tar.cache_clear()  # its files differ in size or time
        source = outcome(lambda: open_source(path))
        if isinstance(source, UserError):
            refused += 1
            continue
        with tarfile.open(path) as tar:
            expected = {f"0.tar/{member.name}": tar.extractfile(member).read() for member in tar if member.isfile()}
        for name, place in zip(source.names, image_places(source, 0, len(source)), strict=True):
            assert source.read(place)[0] == expected[name]
    assert 100 < refused < COUNT


def header(name: str, **about) -> bytes:
    """That of a member without content."""
    member = tarfile.TarInfo(name)
    for key, value in about.items():
        setattr(member, key, value)
    return member.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    ("hostile", "message"),
    [
        (header("1.jpg", size=-1024), "not a tar file, or not all of it"),  # after which one reads the same for ever
        (header("1.jpg", size=2**62), "a member reaches past the end"),
        (header("x", size=-1024, type=tarfile.XHDTYPE), "not a tar file, or not all of it"),
        (header("x", size=2**62, type=tarfile.GNUTYPE_LONGNAME), "not a tar file, or not all of it"),
        (header("x", size=1, type=tarfile.GNUTYPE_LONGNAME) + b"y" + bytes(511), "not a tar file, or not all of it"),
        ((header("x", size=1, type=tarfile.GNUTYPE_LONGNAME) + b"y" + bytes(511)) * 3000, "not a tar file, or not"),
        (header("1.jpg", type=tarfile.GNUTYPE_SPARSE), "'1.jpg' is packed without its zeros, as a sparse file"),
        (header("a\nb/1.jpg"), "a tab or a line break in the name"),
        (header("1.jpg\n"), "a tab or a line break in the name"),
        (header("1.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd"), ""),
        (header("1.jpg", type=tarfile.LNKTYPE, linkname="../../0.jpg"), ""),
        (header("1.jpg", type=tarfile.CHRTYPE), ""),
    ],
    ids=itertools.count(),
)
def test_hostile_members(tmp_path, hostile, message):
    """Refused, or counted: no link is followed."""
    path = tmp_path / "0.tar"
    path.write_bytes(write_tar(path, [("0.jpg", b"x")]).read_bytes()[:1024] + hostile + bytes(1024))
    found = outcome(lambda: open_source(path))
    if message:
        assert message in str(found)
    else:
        assert found.names == ["0.tar/0.jpg"] and found.left_out == {"links in tars": 1}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("0.json", "[" * 100_000),
        ("0.json", '{"label": "\\ud800"}'),
        ("0.json", '{"label": NaN}'),
        ("0.cls", "9" * 5000),
    ],
    ids=itertools.count(),
)
def test_hostile_labels(tmp_path, name, content):
    found = outcome(lambda: open_source(write_tar(tmp_path / "0.tar", [("0.jpg", b"x"), (name, content)])))
    if "[" in content or "ud800" in content:
        assert "cannot be" in str(found)
    else:
        assert found.classes == (["unlabelled"] if "NaN" in content else [content])


@pytest.mark.parametrize("name", ["0.tar", "0.tar.gz", "train-0.tgz"])
def test_a_compressed_tar(tmp_path, name):
    path = write_tar(tmp_path / "in" / name, samples(0, [0]))
    path.write_bytes(gzip.compress(path.read_bytes()))
    for root in (path, path.parent):
        with pytest.raises(UserError, match="is compressed with gzip; decompress it"):
            open_source(root, *split_names(root))


# ---- used where they lie ----


def listing(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_in_place(tars, capsys):
    before = listing(tars)
    convert(ConvertConfig(source=tars, workers=1, verify=True))
    after = listing(tars)
    assert before.items() <= after.items()
    assert set(after) - set(before) == {
        f"{split}.{suffix}" for split in ("train", "val") for suffix in ("shards.json", "shards.npy", "files.tsv")
    }
    for split in ("train", "val"):
        opened = open_shards(tars / f"{split}.shards.json")
        expected = read_with_tarfile(sorted(tars.glob(f"*-{split}-*.tar")), "jpg")
        assert opened.file_names() == [name for name, _, _ in expected]
        assert opened.labels.tolist() == [int(label) for _, _, label in expected]
        for i, (_, data, _) in enumerate(expected):
            assert jpeg_bytes(opened, i).tobytes() == data
            assert Image.open(io.BytesIO(data)).size == (opened.widths[i], opened.heights[i])
    capsys.readouterr()
    convert(ConvertConfig(source=tars, workers=1))
    assert capsys.readouterr().out.count("already adopted; nothing to do") == 2 and listing(tars) == after
    changed = next(tars.glob("*val*.tar"))
    shutil.copy(changed, tars / "copy")
    (tars / "copy").rename(changed)
    with pytest.raises(UserError, match=r"val.shards.json is of other files, or they have changed since"):
        convert(ConvertConfig(source=tars, workers=1))
    convert(ConvertConfig(source=tars, workers=1, fresh=True))
    with open(changed, "r+b") as file:
        file.seek(700)
        file.write(b"????")
    with pytest.raises(UserError, match=r"1 bad images of 6 .*its bytes have changed\); get a good copy of"):
        verify(open_shards(tars / "val.shards.json"), 1)


def test_dali_trains_on_the_tars(tars, tmp_path):
    pytest.importorskip("nvidia.dali")
    convert(ConvertConfig(source=tars, workers=1))
    convert(ConvertConfig(tmp_path / "out", tars, max_side=10_000, workers=1))
    config = LoaderConfig(tars / "train.shards.json", BARLOW_TWINS_VIEWS, 32, global_batch=6, workers=2, backend="dali")
    batches = []
    for data, backend in (("", "dali"), ("out/train.beton", "dali"), ("out/train.beton", "fast")):
        with make_loader(replace(config, backend=backend, data=tmp_path / data if data else config.data)) as loader:
            batches.append(list(loader.batches(0, 4)))
    assert_same_batches(batches[0], batches[1])
    assert_same_batches(batches[0], batches[2])
    in_place, converted = open_dataset(config.data), open_dataset(tmp_path / "out")
    assert in_place.classes == converted.classes and in_place.val.file_names() == converted.val.file_names()
    assert in_place.val_labels.tolist() == converted.val_labels.tolist()
    for stored, other in ((in_place.train, converted.train), (in_place.val, converted.val)):
        assert all(np.array_equal(jpeg_bytes(stored, i), jpeg_bytes(other, i)) for i in range(len(other)))


def test_each_image_is_read_once(tars, monkeypatch):
    from pipeline.storage import kept_images

    places = []

    class Here:
        """In place of worker processes, so that reads can be counted."""

        slots = 1

        def __init__(self, _):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def in_order(self, task, arguments):
            for argument in arguments:
                yield task(*argument)

    keep = kept_images.keep_image
    monkeypatch.setattr(kept_images, "keep_image", lambda place, *rest: places.append(place) or keep(place, *rest))
    monkeypatch.setattr(adopt, "Workers", Here)
    convert(ConvertConfig(source=tars, split="train"))
    assert len(places) == len(set(places)) == 16


@pytest.mark.parametrize("name", ["images", ""])
def test_one_tar_and_tars_without_words(tmp_path, photos, name):
    for i in range(2):
        write_tar(tmp_path / "cats" / f"{i}.tar", [(f"{i}.jpg", photos[i])])
    convert(ConvertConfig(source=tmp_path / "cats" if name else tmp_path / "cats" / "1.tar", workers=1))
    opened = open_shards(tmp_path / "cats" / ("cats.shards.json" if name else "1.shards.json"))
    assert not opened.labelled and len(opened) == (2 if name else 1)


def test_what_is_not_used_in_place(tmp_path, photos):
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20)).save(buffer, "PNG")
    rows = [("0.jpg", photos[0]), ("1.png", buffer.getvalue()), ("2.jpg", photos[2])]
    path = write_tar(tmp_path / "x.tar", rows)
    with pytest.raises(UserError, match=r"x.tar/1.png is not an upright greyscale or RGB JPEG.*give --out to convert"):
        convert(ConvertConfig(source=path, workers=1))
    write_tar(path, [("0.jpg", photos[0]), ("1.jpg", photos[1][:5000]), ("2.jpg", photos[2])])
    with pytest.raises(UserError, match=r"x.tar/1.jpg is not a readable image .*--skip-unreadable"):
        convert(ConvertConfig(source=path, workers=1))
    with pytest.raises(UserError, match="leave out --holdout, or give --out to convert it"):
        convert(ConvertConfig(source=path, workers=1, holdout=1))
    assert [p.name for p in tmp_path.iterdir()] == ["x.tar"]
    convert(ConvertConfig(source=path, workers=1, skip_unreadable=True, verify=True))
    opened = open_shards(tmp_path / "x.shards.json")
    assert opened.manifest["skipped"] == ["x.tar/1.jpg"] and opened.file_names() == ["x.tar/0.jpg", "x.tar/2.jpg"]
    assert [jpeg_bytes(opened, i).tobytes() for i in range(2)] == [photos[0], photos[2]]


def test_a_beton_of_that_name_keeps_its_files(tmp_path, photos):
    path = write_tar(tmp_path / "x.tar", [("0.jpg", photos[0])])
    convert(ConvertConfig(tmp_path / "x.beton", path, workers=1))
    with pytest.raises(UserError, match=r"x.beton is there, whose x.files.tsv would be replaced"):
        convert(ConvertConfig(source=path, workers=1))
    for old in tmp_path.glob("x.[bfm]*"):
        old.rename(tmp_path / f"y{old.suffix}" if old.suffix == ".beton" else tmp_path / f"old{old.suffix}")
    convert(ConvertConfig(source=path, workers=1))
    (tmp_path / "y.beton").rename(tmp_path / "x.beton")
    with pytest.raises(UserError, match=r"x.shards.json is there, whose x.files.tsv would be replaced"):
        convert(ConvertConfig(source=tmp_path / "x.beton", workers=1))
    assert open_shards(tmp_path / "x.shards.json").file_names() == ["x.tar/0.jpg"]


def test_our_own_shards_are_left_alone(tars, tmp_path, capsys):
    convert(ConvertConfig(tmp_path / "out", tars, max_side=10_000, workers=1, format="webdataset", split="train"))
    before = listing(tmp_path / "out")
    convert(ConvertConfig(source=tmp_path / "out", workers=1))
    assert "already converted; nothing to do" in capsys.readouterr().out and listing(tmp_path / "out") == before
