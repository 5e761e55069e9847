"""Places205 and iNaturalist 2018 as they are downloaded: the right images and classes, and no partial list."""

import json

import pytest

from pipeline import constants
from pipeline.errors import UserError
from pipeline.storage.sources.open import open_source, split_names
from tests.mutants import COUNT, json_mutants, mutants, outcome


@pytest.fixture
def places(tmp_path, monkeypatch):
    images = tmp_path / "data/vision/torralba/deeplearning/images256"
    (tmp_path / "trainvalsplit_places205").mkdir()
    for split, rows in (
        ("train", "b/bar/1.jpg 1\na/abbey/2.jpg 0\nb/bar/3.jpg 1\n"),
        ("val", "a/abbey/4.jpg 0\nb/bar/5.jpg 1\n"),
    ):
        (tmp_path / "trainvalsplit_places205" / f"{split}_places205.csv").write_text(rows)
        monkeypatch.setitem(constants.LISTED_SIZES, ("places205", split), (rows.count("\n"), 2))
        for row in rows.splitlines():
            (images / row.split()[0]).parent.mkdir(parents=True, exist_ok=True)
            (images / row.split()[0]).write_bytes(b"x")
    return tmp_path


@pytest.fixture
def inat(tmp_path, monkeypatch):
    content = {
        "images": [
            {"id": 7, "file_name": "train_val2018/Aves/2/a.jpg"},
            {"id": 9, "file_name": "train_val2018/Fungi/0/b.jpg"},
        ],
        "annotations": [{"image_id": 9, "category_id": 0}, {"image_id": 7, "category_id": 2}],
        "categories": [{"id": 2, "name": "two"}, {"id": 0, "name": "zero"}, {"id": 1, "name": "one"}],
    }
    for image in content["images"]:
        (tmp_path / image["file_name"]).parent.mkdir(parents=True)
        (tmp_path / image["file_name"]).write_bytes(b"x")
    (tmp_path / "train2018.json").write_text(json.dumps(content))
    monkeypatch.setitem(constants.LISTED_SIZES, ("inat18", "train"), (2, 3))
    return tmp_path


def test_places205(places):
    assert split_names(places) == ["train", "val"]
    train, val = (open_source(places, split) for split in ("train", "val"))
    assert train.classes == val.classes == ["a/abbey", "b/bar"]
    assert train.names == ["b/bar/1.jpg", "a/abbey/2.jpg", "b/bar/3.jpg"] and train.labels.tolist() == [1, 0, 1]
    assert all((train.where / name).is_file() for name in train.names)


def test_inaturalist(inat):
    assert split_names(inat) == ["train"]
    train = open_source(inat, "train")
    assert train.classes == ["0000", "0001", "0002"]
    assert list(zip(train.names, train.labels.tolist(), strict=True)) == [
        ("train_val2018/Fungi/0/b.jpg", 0),
        ("train_val2018/Aves/2/a.jpg", 2),
    ]


def test_the_published_sizes():
    assert constants.LISTED_SIZES["places205", "val"] == (20_500, 205)
    assert constants.LISTED_SIZES["inat18", "train"] == (437_513, 8_142)


def test_lists_that_are_not_the_published_ones(places, monkeypatch):
    monkeypatch.setitem(constants.LISTED_SIZES, ("places205", "val"), (20_500, 205))
    with pytest.raises(UserError, match="lists 2 images of 2 classes, places205's val split has 20500 of 205"):
        open_source(places, "val")
    csv = places / "trainvalsplit_places205" / "train_places205.csv"
    csv.write_text(csv.read_text().replace("a/abbey/2.jpg 0", "a/abbey/2.jpg"))
    with pytest.raises(UserError, match="cannot be read as the list of a dataset"):
        open_source(places, "train")


@pytest.mark.parametrize("kind", ["places", "inat"])
def test_mutated_lists(kind, request):
    """Refused, or a list of as many images and classes as the published one, with labels that are classes."""
    root = request.getfixturevalue(kind)
    path = root / ("train2018.json" if kind == "inat" else "trainvalsplit_places205/train_places205.csv")
    content, sound, refused = path.read_bytes(), open_source(root, "train"), 0
    for mutant in (json_mutants if kind == "inat" else mutants)(content, seed=0):
        path.write_bytes(mutant)
        source = outcome(lambda: open_source(root, "train"))
        if isinstance(source, UserError):
            refused += 1
        else:
            assert len(source) == len(sound) and len(source.classes) == len(sound.classes)
            assert all(isinstance(name, str) for name in source.names)
            assert set(source.labels.tolist()) <= set(range(len(source.classes)))
    assert 100 < refused < COUNT


def test_a_list_that_is_no_text_has_one_sentence(places):
    path = places / "trainvalsplit_places205" / "val_places205.csv"
    path.write_bytes(b"a/b\xe9.jpg 0\n")
    with pytest.raises(UserError, match=r"^\S*val_places205\.csv is not a text file \(.*\); download it again$"):
        open_source(places, "val")


def test_images_that_are_not_there(inat):
    (inat / "train_val2018/Fungi/0/b.jpg").unlink()
    with pytest.raises(UserError, match=r"Fungi/0/b\.jpg is missing; unpack the images into"):
        open_source(inat, "train")
