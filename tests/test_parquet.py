"""Hugging Face's parquet files: rows, labels and pixels as pyarrow and Pillow read them, and clear words elsewhere."""

import io
import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.convert import ConvertConfig
from pipeline.convert import main as convert
from pipeline.errors import UserError
from pipeline.storage.beton import jpeg_bytes, open_beton
from pipeline.storage.sources.open import open_source, split_names
from pipeline.storage.sources.source import image_places, read_stamps
from tests.mutants import COUNT, mutants, outcome

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def features(**columns) -> dict:
    """What Hugging Face's datasets write into a schema."""
    named = {
        name: {"names": classes, "_type": "ClassLabel"} if classes else {"_type": "Image"}
        for name, classes in columns.items()
    }
    return {"huggingface": json.dumps({"info": {"features": named}})}


def write(path: Path, images: list, metadata: dict | None = None, group: int = 3, /, **columns) -> Path:
    """A file with a column of images (bytes, path), and others as given: lists, or arrays of Arrow's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {"image": pa.array([{"bytes": b, "path": p} for b, p in images], IMAGE)} if images else {}
    table = pa.table(arrays | columns)
    pq.write_table(table.replace_schema_metadata(metadata), path, row_group_size=group)
    return path


@pytest.fixture(scope="module")
def images(imagenet_sample) -> list[tuple[bytes, str]]:
    """30 real JPEGs with the names that Hugging Face's ImageNet has for them."""
    found = [(path.read_bytes(), f"{path.stem}_{path.parent.name}.JPEG") for path in imagenet_sample[:40]]
    return [(content, name) for content, name in found if Image.open(io.BytesIO(content)).mode == "RGB"][:30]


def rows_of(files: list[Path]) -> list[dict]:
    return [row for path in files for row in pq.read_table(path).to_pylist()]


# ---- layouts ----


@pytest.mark.parametrize(
    "name",
    [
        "{split}-0000{k}-of-00002.parquet",
        "data/{split}-0000{k}-of-00002.parquet",
        "{split}/000{k}.parquet",
        "data/{split}/000{k}.parquet",
        "data/mine_{split}.{k}.parquet",
    ],
)
@pytest.mark.parametrize("val", ["validation", "val", "test"])
def test_rows_labels_and_pixels(tmp_path, images, name, val):
    """Two files a split, of several row groups, and classes whose names are in the schema."""
    root, classes = tmp_path / "dataset", ["tench", "crane", "goldfish", "crane"]
    files = {}
    for split, start in (("train", 0), (val, 14)):
        parts = [images[start : start + 8], images[start + 8 : start + 14]]
        files[split] = [
            write(
                root / name.format(split=split, k=k),
                part,
                features(image=None, label=classes),
                label=[(start + i) % 4 for i in range(len(part))],
            )
            for k, part in enumerate(parts)
        ]
    assert split_names(root) == ["train", "val"]
    convert(ConvertConfig(source=root, out=tmp_path / "out", workers=2, max_side=2000))
    for split, ours in (("train", "train"), (val, "val")):
        beton, expected = open_beton(tmp_path / "out" / f"{ours}.beton"), rows_of(files[split])
        assert beton.classes == ["tench", "crane (1)", "goldfish", "crane (3)"] and beton.labelled
        assert beton.labels.tolist() == [row["label"] for row in expected]
        assert beton.file_names() == [
            f"{path.stem}/{i:07d}/{row['image']['path']}"
            for path in files[split]
            for i, row in enumerate(rows_of([path]))
        ]
        for i, row in enumerate(expected):
            assert jpeg_bytes(beton, i).tobytes() == row["image"]["bytes"]


def test_the_same_rows_as_class_folders(tmp_path, images):
    """The stored bytes do not depend on how the images came."""
    for k, (content, path) in enumerate(images[:6]):
        (tmp_path / "folders" / f"c{k // 2}").mkdir(parents=True, exist_ok=True)
        (tmp_path / "folders" / f"c{k // 2}" / f"{k}{path}").write_bytes(content)
    write(tmp_path / "rows" / "all.parquet", images[:6], label=["c0", "c0", "c1", "c1", "c2", "c2"])
    for kind in ("folders", "rows"):
        convert(
            ConvertConfig(
                source=tmp_path / kind,
                out=tmp_path / f"{kind}.beton",
                split="train" if kind == "rows" else "",
                workers=1,
            )
        )
    assert (tmp_path / "rows.beton").read_bytes() == (tmp_path / "folders.beton").read_bytes()


def test_one_file(tmp_path, images):
    path = write(tmp_path / "train-00000-of-00001.parquet", images[:4], label=[1, 0, 1, 3])
    convert(ConvertConfig(source=path, out=tmp_path / "one.beton", workers=1))
    beton = open_beton(tmp_path / "one.beton")
    assert beton.classes == ["0", "1", "3"] and beton.labels.tolist() == [1, 0, 1, 2]
    for name, split in (("validation-00000-of-00001", "val"), ("some", "train"), ("unlabeled", "unlabelled")):
        assert split_names(write(tmp_path / name / f"{name}.parquet", images[:1])) == [split]


def test_words_that_say_no_split_are_left_out(tmp_path, images):
    for name in ("train-0", "validation-0", "test-0", "more"):
        write(tmp_path / f"{name}.parquet", images[:2], label=[0, 1])
    assert split_names(tmp_path) == ["train", "val"]
    source = open_source(tmp_path, "val")
    assert [path.name for path in source.files] == ["validation-0.parquet"]
    assert source.left_out == {"test.parquet beside the splits": 1, ".parquet beside the splits": 1}


@pytest.mark.parametrize("table", ["metadata.parquet", "train.parquet"])
def test_a_table_beside_image_folders_is_no_dataset(tmp_path, images, table):
    write(tmp_path / table, [], file_name=["a.jpg"], text=["x"])
    for split in ("train", "val"):
        (tmp_path / split / "cat").mkdir(parents=True)
        (tmp_path / split / "cat" / "1.jpg").write_bytes(images[0][0])
    assert open_source(tmp_path, "train").kind == "folder"
    write(tmp_path / "train" / "metadata.parquet", [], file_name=["a.jpg"])
    assert open_source(tmp_path / "train").classes == ["cat"]


# ---- columns ----


@pytest.mark.parametrize(
    ("columns", "metadata", "classes", "labels"),
    [
        ({"label": ["b", "a", "b"]}, None, ["a", "b"], [1, 0, 1]),
        ({"label": pa.array(["b", "a", "b"], pa.large_string())}, None, ["a", "b"], [1, 0, 1]),
        ({"label": pa.array(["b", "a", "b"]).dictionary_encode()}, None, ["a", "b"], [1, 0, 1]),
        ({"cls": pa.array([10, 9, 10], pa.uint8())}, None, ["9", "10"], [1, 0, 1]),
        ({"label": [5, 6, 6], "target": [0, 0, 1]}, None, ["5", "6"], [0, 1, 1]),
        ({"id": [7, 8, 9], "kind": [1, 0, 1]}, features(kind=["x", "y"]), ["x", "y"], [1, 0, 1]),
        (
            {"coarse_label": [0, 0, 0], "fine_label": [1, 0, 1]},
            features(coarse_label=["z"], fine_label=["x", "y"]),
            ["x", "y"],
            [1, 0, 1],
        ),
        ({"id": [7, 8, 9], "labels": [[0], [1, 2], []]}, None, ["unlabelled"], [0, 0, 0]),
    ],
)
def test_columns_of_labels(tmp_path, images, columns, metadata, classes, labels, capsys):
    write(tmp_path / "a.parquet", images[:3], metadata, **columns)
    source = open_source(tmp_path, "train")
    assert source.classes == classes and source.labels.tolist() == labels
    assert source.labelled == (classes != ["unlabelled"])
    assert ("its images are unlabelled" in capsys.readouterr().err) == (not source.labelled)


def test_classes_are_those_of_all_splits(tmp_path, images):
    write(tmp_path / "train.parquet", images[:3], label=["dog", "cat", "ant"])
    write(tmp_path / "val.parquet", images[:1], label=["cat"])
    assert open_source(tmp_path, "val").classes == open_source(tmp_path, "train").classes == ["ant", "cat", "dog"]


def test_columns_of_images(tmp_path, images):
    """Plain bytes; of several columns the one called image; images without a path."""
    content = [content for content, _ in images[:2]]
    write(tmp_path / "a.parquet", [], img=pa.array(content), mask=pa.array([b"x", b"y"]), label=[0, 1])
    write(tmp_path / "b" / "b.parquet", [(content[0], None), (content[1], "")], thumb=pa.array([b"x", b"y"]))
    for root in (tmp_path / "a.parquet", tmp_path / "b"):
        source = open_source(root, "train")
        assert [source.read(place)[0] for place in image_places(source, 0, 2)] == content
        stem = source.files[0].stem
        assert source.names == [f"{stem}/0000000/0000000", f"{stem}/0000001/0000001"]


@pytest.mark.parametrize(
    ("columns", "metadata", "said"),
    [
        ({"one": pa.array([b"x"]), "two": pa.array([b"y"])}, None, "columns one, two, any of which could hold image b"),
        ({"path": ["a.jpg"], "label": [1]}, None, r"no column of image bytes \(all: path, label\)"),
        (
            {"image": pa.array([b"x"]), "cls": [1], "target": [2]},
            None,
            "columns cls, target, any of which could hold la",
        ),
        (
            {"image": pa.array([b"x"]), "a": [0], "b": [0]},
            features(a=["x"], b=["y"]),
            "columns a, b, any of which could",
        ),
        ({"image": pa.array([b"x"]), "label": [2]}, features(label=["x", "y"]), "label 2 at a/0000000/0000000, which"),
        (
            {"image": pa.array([b"x"]), "label": [-1]},
            features(label=["x", "y"]),
            "label -1 at .* none of its 2 classes",
        ),
        ({"image": pa.array([b"x", b"y"]), "label": [0, None]}, None, "label None at a/0000001"),
        (
            {"image": pa.array([{"bytes": None, "path": "a.jpg"}], IMAGE), "label": [0]},
            None,
            "paths of images and not th",
        ),
    ],
)
def test_columns_that_are_not_clear(tmp_path, columns, metadata, said):
    write(tmp_path / "a.parquet", [], metadata, **columns)
    with pytest.raises(UserError, match=said):
        open_source(tmp_path, "train")


@pytest.mark.parametrize("content", ["{", "[]", '{"info": null}', '{"info": {"features": {"label": 1}}}'])
def test_a_description_of_columns_that_cannot_be_read(tmp_path, images, content):
    write(tmp_path / "a.parquet", images[:2], {"huggingface": content}, label=[0, 1])
    if "label" in content:  # it says nothing about this column
        assert open_source(tmp_path, "train").classes == ["0", "1"]
    else:
        with pytest.raises(UserError, match=r"a\.parquet has a description of its columns .* cannot be read"):
            open_source(tmp_path, "train")


def test_val_of_imagenet_keeps_its_pixels(tmp_path, images):
    """Its classes have no WordNet ids here; the names of its images tell."""
    large = max(images, key=lambda image: max(Image.open(io.BytesIO(image[0])).size))
    for split, name in (("train", large[1]), ("validation", "ILSVRC2012_val_00000001_n01440764.JPEG")):
        write(tmp_path / f"{split}.parquet", [(large[0], name)], features(label=["tench, Tinca tinca"]), label=[0])
    convert(ConvertConfig(source=tmp_path, out=tmp_path / "out", workers=1))
    assert jpeg_bytes(open_beton(tmp_path / "out" / "val.beton"), 0).tobytes() == large[0]
    assert jpeg_bytes(open_beton(tmp_path / "out" / "train.beton"), 0).tobytes() != large[0]


def test_files_of_different_columns(tmp_path, images):
    write(tmp_path / "train-0.parquet", images[:1], label=[0])
    write(tmp_path / "train-1.parquet", images[:1], cls=[0])
    with pytest.raises(UserError, match="train-1.parquet has other columns or classes than .*train-0.parquet"):
        open_source(tmp_path, "train")


# ---- reading ----


def test_listing_reads_no_image(tmp_path, images):
    """Where the column of images is damaged on the disk, the listing is the same, and reading says so."""
    path = write(tmp_path / "a.parquet", images[:8], label=list(range(8)))
    whole = open_source(tmp_path, "train")
    content = bytearray(path.read_bytes())
    chunk = pq.read_metadata(path).row_group(1).column(0)
    assert chunk.path_in_schema == "image.bytes"
    content[chunk.dictionary_page_offset : chunk.data_page_offset] = bytes(
        chunk.data_page_offset - chunk.dictionary_page_offset
    )
    path.write_bytes(content)
    damaged = open_source(tmp_path, "train")
    assert damaged.names == whole.names and damaged.labels.tolist() == whole.labels.tolist()
    with pytest.raises(UserError, match="a.parquet, row 4, cannot be read .*; download it again"):
        damaged.read(image_places(damaged, 4, 5)[0])
    assert damaged.read(image_places(damaged, 0, 1)[0])[0] == images[0][0]


def test_a_row_group_is_read_once(tmp_path, images, monkeypatch):
    groups = []
    read = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile, "read_row_group", lambda self, i, **kw: groups.append((i, kw["columns"])) or read(self, i, **kw)
    )
    write(tmp_path / "a.parquet", images[:9], label=[0] * 9)
    write(tmp_path / "b.parquet", images[9:12], label=[0] * 3)
    source = open_source(tmp_path, "train")
    found = [source.read(place)[0] for place in image_places(source, 0, 12)]
    assert found == [content for content, _ in images[:12]]
    assert groups == [(i, ["image.bytes"]) for i in (0, 1, 2, 0)]


def test_stamps_are_size_and_time_of_the_file(tmp_path, images):
    path = write(tmp_path / "a.parquet", images[:3], label=[0, 0, 0])
    source = open_source(tmp_path, "train")
    about = path.stat()
    assert read_stamps(source, 3).tolist() == [[about.st_size, about.st_mtime_ns]] * 3
    assert source.read(image_places(source, 1, 2)[0])[1] == (about.st_size, about.st_mtime_ns)
    write(path, images[3:6], label=[0, 0, 0])  # another file of that name
    assert source.read(image_places(source, 1, 2)[0])[0] == images[4][0]


def test_a_conversion_that_was_stopped_notices_another_file(tmp_path, images):
    path = write(tmp_path / "rows" / "a.parquet", images[:5], label=[0] * 5)
    convert(ConvertConfig(source=path, out=tmp_path / "a.beton", workers=1))
    write(path, images[5:10], label=[0] * 5)
    with pytest.raises(UserError, match="exists (with listing|, but images of)"):
        convert(ConvertConfig(source=path, out=tmp_path / "a.beton", workers=1))


@pytest.mark.parametrize("content", [b"", b"PAR1", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "half"])
def test_files_that_are_not_whole(tmp_path, images, content):
    path = write(tmp_path / "a.parquet", images[:5], label=[0] * 5)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if content == "half" else content)
    with pytest.raises(UserError, match="a.parquet cannot be read .* git lfs pull"):
        open_source(tmp_path, "train")


def test_mutated_files(tmp_path):
    """Refused, in the listing or where a row is read, or read: the file has no checksum."""
    rows = [(b"\xff\xd8 image %d" % i, f"{i}.jpg") for i in range(6)]
    path = write(tmp_path / "a.parquet", rows, features(image=None, label=["x", "y"]), label=[0, 1] * 3)
    content, refused = path.read_bytes(), 0
    for mutant in mutants(content, seed=0):
        path.write_bytes(mutant)
        source = outcome(lambda: open_source(path, "train"))
        if isinstance(source, UserError):
            refused += 1
            continue
        for place in image_places(source, 0, len(source)):
            found = outcome(lambda source=source, place=place: source.read(place))
            assert isinstance(found, UserError) or isinstance(found[0], bytes)
    assert 100 < refused < COUNT


@pytest.mark.parametrize(
    ("columns", "metadata", "said"),
    [
        ({"label": [0]}, features(label=[None]), "description of its columns"),
        ({"label": [0]}, {"huggingface": "[" * 100_000}, "description of its columns"),
        ({"label": [[0]]}, features(label=["x"]), ""),
        ({"image": pa.array([{"bytes": "x", "path": "1.jpg"}])}, None, "no column of image bytes"),
        ({"image": pa.array([{"bytes": b"x", "path": 1}])}, None, ""),
    ],
)
def test_columns_of_odd_types(tmp_path, columns, metadata, said):
    path = write(tmp_path / "a.parquet", [] if "image" in columns else [(b"x", "1.jpg")], metadata, **columns)
    found = outcome(lambda: open_source(path, "train"))
    assert said in str(found) if said else found.classes == ["unlabelled"]


def test_labels_that_are_numbers_and_texts(tmp_path):
    write(tmp_path / "train.parquet", [(b"x", "1.jpg")], label=[1])
    write(tmp_path / "val.parquet", [(b"x", "1.jpg")], label=["1"])
    with pytest.raises(UserError, match="numbers in one file and texts in another"):
        open_source(tmp_path, "train")


@pytest.mark.parametrize("digest", ["", "-a09b74b3ef9c3b56"])  # as older files have it
def test_a_file_that_is_missing(tmp_path, images, digest):
    for k in (0, 1, 3):
        write(tmp_path / f"train-0000{k}-of-00005{digest}.parquet", images[:1], label=[0])
    with pytest.raises(UserError, match=r"lacks 2 of the 5 files train-… \(00002 first\)"):
        open_source(tmp_path, "train")


def test_without_pyarrow(tmp_path, images, monkeypatch):
    write(tmp_path / "a.parquet", images[:1], label=[0])
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match="pyarrow, which is not installed; pip install pyarrow"):
        open_source(tmp_path, "train")
