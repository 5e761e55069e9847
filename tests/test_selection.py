"""What is converted of a dataset: images without classes, splits or classes by name, a list of classes, a held-out val.

The images are ImageNet's; pixels are compared with Pillow's, classes and labels with torchvision's ImageFolder.
"""

import io
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from pipeline.choices.subsets import held_out_subset
from pipeline.convert import ConvertConfig, main
from pipeline.errors import UserError
from pipeline.storage import store
from pipeline.storage.beton import file_rows, jpeg_bytes, open_beton
from pipeline.storage.sources.open import open_source, split_names
from pipeline.storage.sources.selection import of_classes
from pipeline.storage.sources.source import UNLABELLED, Source

COUNTS = {"n01": 12, "n02": 7, "n03": 5}  # images of three classes


@pytest.fixture
def place(tmp_path, imagenet_sample):
    """Lays small ImageNet images out as the names say, relative to a folder; returns the folder."""
    small = iter([path for path in imagenet_sample if path.stat().st_size < 60_000])

    def lay(*names: str, folder: str = "images") -> Path:
        for name in names:
            (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(next(small), tmp_path / folder / name)
        return tmp_path / folder

    return lay


@pytest.fixture
def classes(place) -> Path:
    """One folder a class."""
    return place(*(f"{name}/{i:02d}.JPEG" for name, count in COUNTS.items() for i in range(count)))


def convert(source: Path, out: Path | None = None, **flags) -> Path:
    out = out or source.parent / "out"
    main(ConvertConfig(out, source, workers=1, **flags))
    return out


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def require_pixels(path: Path, root: Path) -> list[str]:
    """Every image of a .beton is that of the file it names, as Pillow reads both. Returns the names."""
    stored = open_beton(path)
    names = stored.file_names()
    for sample, name in enumerate(names):
        with Image.open(io.BytesIO(jpeg_bytes(stored, sample).tobytes())) as ours, Image.open(root / name) as given:
            assert np.array_equal(ours.convert("RGB"), given.convert("RGB"))
    return names


def require_image_folder(path: Path, root: Path, names: list[str] | None = None) -> None:
    """Names, labels and classes are torchvision's, of all or of `names`."""
    stored, theirs = open_beton(path), ImageFolder(root)
    expected = [(os.path.relpath(file, root), label) for file, label in theirs.samples]
    expected = [row for row in expected if names is None or row[0] in names]
    assert list(zip(stored.file_names(), stored.labels.tolist(), strict=True)) == expected
    assert stored.classes == theirs.classes and stored.labelled


# ---- images without classes ----


@pytest.mark.parametrize("layout", ["flat", "nested"])
def test_images_without_classes(place, layout):
    """A flat folder is seen to be one, with whatever lies in its other folders; a nested one has to be called so."""
    names = ["b.JPEG", "a.jpg", "c.jpeg"] if layout == "flat" else ["2020/01/a.jpg", "2021/b.jpg", "c.jpg"]
    root = place(*names)
    (root / "notes").mkdir()
    (root / "notes" / "notes.txt").write_text("no image")
    out = convert(root, unlabelled=layout == "nested", max_side=1000)
    stored = open_beton(out / "train.beton")
    assert require_pixels(out / "train.beton", root) == sorted(names)
    assert not stored.labelled and stored.classes == UNLABELLED and not stored.labels.any()
    assert stored.manifest["labelled"] is False and stored.manifest["left_out"] == {".txt": 1}
    assert left(out) == ["train.beton", "train.files.tsv", "train.manifest.json"]


def test_class_folders_without_splits_are_train(classes):
    out = convert(classes, max_side=1000)
    require_image_folder(out / "train.beton", classes)
    assert require_pixels(out / "train.beton", classes)
    taken = convert(classes, classes.parent / "all", unlabelled=True)
    assert open_beton(taken / "train.beton").file_names() == open_beton(out / "train.beton").file_names()
    assert not open_beton(taken / "train.beton").labelled
    classes.rename(classes.with_name("val"))
    assert left(convert(classes.with_name("val")))[3:] == ["val.beton", "val.files.tsv", "val.manifest.json"]


def test_splits_of_images_without_classes(place):
    root = place("train/1.jpg", "train/2.jpg", "val/3.jpg", "unlabelled/x/4.jpg", "unlabelled/5.jpg", "test/6.jpg")
    out = convert(root, max_side=1000)
    for split, names in (("train", ["1.jpg", "2.jpg"]), ("val", ["3.jpg"]), ("unlabelled", ["5.jpg", "x/4.jpg"])):
        assert require_pixels(out / f"{split}.beton", root / split) == names
        assert not open_beton(out / f"{split}.beton").labelled
        assert open_beton(out / f"{split}.beton").manifest["left_out"] == {"test/ beside the splits": 1}


def test_unlabelled_images_beside_classes(place):
    root = place("train/cat/1.jpg", "train/dog/2.jpg", "val/cat/3.jpg", "val/dog/4.jpg", "unlabelled/cat/5.jpg")
    (root / "docs").mkdir()
    out = convert(root)
    require_image_folder(out / "train.beton", root / "train")
    require_image_folder(out / "val.beton", root / "val")
    assert open_beton(out / "unlabelled.beton").file_names() == ["cat/5.jpg"]
    assert not open_beton(out / "unlabelled.beton").labelled


def test_most_images_beside_the_classes(place):
    root = place("1.jpg", "2.jpg", "3.jpg", "thumbs/4.jpg", "thumbs/5.jpg")
    with pytest.raises(UserError, match=r"3 images beside its class folders and 2 in them; .*--unlabelled"):
        convert(root)
    assert not left(root.parent / "out")
    (root / "1.jpg").unlink()  # as many: left out, and counted
    assert open_beton(convert(root) / "train.beton").manifest["left_out"] == {".jpg beside the class folders": 2}


def test_a_val_without_classes_beside_a_train_with(place):
    root = place("train/cat/1.jpg", "train/dog/2.jpg", "val/3.jpg")
    with pytest.raises(
        UserError, match=r"val has images without class folders, and .*train has classes; .*--split train"
    ):
        convert(root)
    assert not left(root.parent / "out")


def test_a_folder_in_a_folder_is_noted(place, capsys):
    root = place("photos/1.jpg", "photos/2.jpg")
    assert open_beton(convert(root) / "train.beton").classes == ["photos"]
    assert f"note: {root} has one class, photos; if it is none, pass --unlabelled" in capsys.readouterr().out


def test_unlabelled_finds_no_image(tmp_path):
    for root, said in ((tmp_path / "none", "is missing"), (tmp_path, "and the folders below it have no images")):
        with pytest.raises(UserError, match=said):
            main(ConvertConfig(tmp_path / "out", root, unlabelled=True))


# ---- a class that is called like a split ----


def test_a_class_called_train(place):
    root = place("train/1.jpg", "bus/2.jpg", "car/3.jpg")
    assert split_names(root) == []
    require_image_folder(convert(root) / "train.beton", root)


def test_a_class_called_val_beside_splits_of_classes(place):
    """As a model of trains, and a folder of class folders with one called val in each split."""
    root = place("train/val/1.jpg", "train/bus/2.jpg", "val/val/3.jpg", "val/bus/4.jpg")
    assert split_names(root) == ["train", "val"] and split_names(root / "train") == []
    out = convert(root)
    for split in ("train", "val"):
        require_image_folder(out / f"{split}.beton", root / split)


# ---- a list of classes ----


def test_a_list_of_classes(classes):
    """As ImageNet-100 lists are: a name, then what it means; in the source's order, whatever the list's."""
    listed = classes.parent / "list.txt"
    listed.write_text("# two of three\n\nn03 tench, Tinca tinca\nn01\tgoldfish\n")
    for split in ("train", "val"):
        shutil.copytree(classes, classes.parent / "both" / split)
    out = convert(classes.parent / "both", classes=listed, max_side=1000)
    shutil.rmtree(classes / "n02")
    for split in ("train", "val"):
        require_image_folder(out / f"{split}.beton", classes)
        assert len(require_pixels(out / f"{split}.beton", classes)) == 17
        assert open_beton(out / f"{split}.beton").manifest["left_out"] == {"images of other classes": 7}


def test_names_with_spaces_are_classes_too(place):
    root = place("golden retriever/1.jpg", "golden/2.jpg", "cat/3.jpg")
    (root.parent / "list.txt").write_text("golden retriever\ncat\n")
    assert open_beton(convert(root, classes=root.parent / "list.txt") / "train.beton").classes == [
        *("cat", "golden retriever"),
    ]


@pytest.mark.parametrize("content", ["n03 n01", "# two\nn03, n01,\n", "\ufeffn03\r\nn01\r\n"])
def test_a_list_in_one_line_or_of_other_systems(classes, content):
    (classes.parent / "list.txt").write_text(content, encoding="utf-8")
    out = convert(classes, classes=classes.parent / "list.txt")
    assert open_beton(out / "train.beton").classes == ["n01", "n03"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("n01\nn04 x\nn05\n", r"2 of its 3 names are no class of .*images \(n04, n05\); its 3 classes .* such as n01"),
        ("n01\nn02\nn01 again\n", "names n01 twice"),
        ("# nothing\n", "0 of its 0 names are no class"),
    ],
)
def test_lists_that_do_not_fit(classes, content, said):
    (classes.parent / "list.txt").write_text(content)
    with pytest.raises(UserError, match=said):
        convert(classes, classes=classes.parent / "list.txt")
    assert not left(classes.parent / "out")


def test_a_file_has_no_folders_to_pass_over(tmp_path):
    (tmp_path / "images.parquet").touch()
    with pytest.raises(UserError, match="--unlabelled takes images below a folder, and .*images.parquet is a file"):
        convert(tmp_path / "images.parquet", unlabelled=True)


def test_images_without_classes_have_none_to_choose(place):
    root = place("1.jpg")
    (root.parent / "list.txt").write_text("n01\n")
    with pytest.raises(UserError, match="has images without classes; leave it out"):
        convert(root, classes=root.parent / "list.txt")


def test_classes_of_pixels(tmp_path):
    """A source without files, as CIFAR-10."""
    pixels = np.arange(12, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    names = [f"{i:02d}" for i in range(12)]
    source = Source("cifar-10", "train", list("abcd"), names, np.arange(12) % 4, Path("x"), pixels=pixels)
    (tmp_path / "list.txt").write_text("d\nb\n")
    chosen = of_classes(source, tmp_path / "list.txt")
    assert chosen.classes == ["b", "d"] and chosen.names == ["01", "03", "05", "07", "09", "11"]
    assert chosen.labels.tolist() == [0, 1] * 3 and chosen.pixels[:, 0, 0, 0].tolist() == [1, 3, 5, 7, 9, 11]


# ---- a val held out of train ----


@pytest.mark.parametrize(("holdout", "expected"), [(0.25, [3, 2, 1]), (6, [3, 2, 1]), (3, [1, 1, 1]), (8, [4, 2, 2])])
def test_a_held_out_val(classes, holdout, expected):
    """The shares of 12, 7 and 5 images, by hand; no image in both, all in one, as torchvision labels them."""
    out = convert(classes, holdout=holdout, max_side=1000)
    train, val = (open_beton(out / f"{split}.beton") for split in ("train", "val"))
    assert np.bincount(val.labels).tolist() == expected
    names = train.file_names(), val.file_names()
    assert not set(names[0]) & set(names[1]) and len(train) + len(val) == sum(COUNTS.values())
    for split, own in zip(("train", "val"), names, strict=True):
        require_image_folder(out / f"{split}.beton", classes, own)
        assert require_pixels(out / f"{split}.beton", classes) == sorted(own)
    for beton in (train, val):
        assert {"holdout": holdout, "seed": 0}.items() <= beton.manifest["settings"].items()
        assert {"holdout": holdout, "seed": 0}.items() <= beton.manifest["identity"].items()
    assert val.manifest["source"]["split"] == "val"


def test_another_holdout_is_refused_and_the_seed_decides(classes, capsys):
    out = convert(classes, holdout=0.25)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    convert(classes, holdout=0.25)
    assert capsys.readouterr().out.count("nothing to do") == 2
    for flags, said in (
        ({"holdout": 0.5}, r"train\.beton exists with holdout 0.25, asked for is 0.5; pass --fresh"),
        ({"holdout": 0.25, "seed": 1}, "exists with seed 0, asked for is 1"),
        ({}, "exists with holdout 0.25, asked for is None"),
    ):
        with pytest.raises(UserError, match=said):
            convert(classes, **flags)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    other = convert(classes, classes.parent / "other", holdout=0.25, seed=1)
    assert open_beton(other / "val.beton").file_names() != open_beton(out / "val.beton").file_names()


def test_a_val_that_is_there_is_not_made_again(place):
    root = place("train/cat/1.jpg", "train/cat/2.jpg", "val/cat/3.jpg")
    with pytest.raises(UserError, match=r"--source holds train and val; leave it out, or pass --split train"):
        convert(root, holdout=1)
    assert not left(root.parent / "out")
    out = convert(root, holdout=1, split="train")
    assert len(open_beton(out / "train.beton")) == len(open_beton(out / "val.beton")) == 1
    with pytest.raises(UserError, match="--source holds val; give train|leave it out"):
        convert(root, holdout=1, split="val")


def test_every_class_keeps_an_image(place):
    root = place("cat/1.jpg", "cat/2.jpg", "dog/3.jpg")
    with pytest.raises(UserError, match="--holdout takes all images of dog, which has 1"):
        convert(root, holdout=2)
    for count in (1, 3, 4):
        with pytest.raises(UserError, match=f"--holdout {count} takes {count} of 3 images; of each of the 2 classes"):
            convert(root, holdout=count)
    assert not left(root.parent / "out")


def test_a_share_of_images_without_labels(place):
    root = place(*(f"{i}.jpg" for i in range(10)))
    out = convert(root, holdout=0.3)
    train, val = (open_beton(out / f"{split}.beton") for split in ("train", "val"))
    assert (len(train), len(val), train.labelled, val.labelled) == (7, 3, False, False)
    assert not set(train.file_names()) & set(val.file_names())


def test_images_that_are_there_twice_are_noted(classes, capsys):
    for path in list((classes / "n03").iterdir()):
        shutil.copyfile(path, path.with_name(f"copy of {path.name}"))
    out = convert(classes, holdout=0.4)
    rows = {split: file_rows(open_beton(out / f"{split}.beton")) for split in ("train", "val")}
    shared = sum(row[3] in {other[3] for other in rows["train"]} for row in rows["val"])
    assert shared > 0
    said = capsys.readouterr().out
    assert f"note: {shared} of {len(rows['val'])} images of {out / 'val.beton'} are in train.beton too (n03/" in said


def test_held_out_shares_are_proportional_and_nested():
    """Of many classes; a smaller holdout lies within a larger, and a share is the number it comes to."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(np.arange(40), rng.integers(20, 400, 40)))
    members, smaller = np.bincount(labels), np.array([], int)
    for count in (40, 200, 1000, 3000):
        ids = held_out_subset(5, labels, count)
        assert len(set(ids)) == len(ids) == count and set(smaller) <= set(ids)
        share = np.maximum(1, count * members / len(labels))
        assert count < 200 or np.abs(np.bincount(labels[ids]) - share).max() <= 1.01
        smaller = ids
    assert np.array_equal(held_out_subset(5, labels, 1000), held_out_subset(5, labels, 1000 / len(labels)))
    equal = np.arange(1000) % 10
    assert Counter(equal[held_out_subset(0, equal, 0.1)].tolist()) == dict.fromkeys(range(10), 10)


# ---- how large the images are kept ----


@pytest.fixture
def large(tmp_path, imagenet_sample) -> Path:
    """train/ and val/ with two of ImageNet's classes, a large image in each."""
    by_size = sorted(imagenet_sample, key=lambda path: -path.stat().st_size)
    for split in ("train", "val"):
        for path in by_size[:2]:
            (tmp_path / "images" / split / path.parent.name).mkdir(parents=True)
            shutil.copyfile(path, tmp_path / "images" / split / path.parent.name / path.name)
    return tmp_path / "images"


def longest(path: Path) -> int:
    return int(np.maximum(open_beton(path).widths, open_beton(path).heights).min())


def test_val_of_imagenet_keeps_its_pixels(large):
    out = convert(large)
    assert longest(out / "train.beton") == 500 < longest(out / "val.beton")
    assert require_pixels(out / "val.beton", large / "val")
    assert open_beton(out / "val.beton").manifest["settings"]["max_side_px"] == store.ANY_SIDE_PX
    for given in ("val", "other"):  # by the name of the file, or of the folder
        source, target = large / "val", out / f"{given}2" / ("val.beton" if given == "val" else "x.beton")
        assert longest(convert(source, target)) > 500
    asked = convert(large, large.parent / "asked", max_side=400)
    assert longest(asked / "train.beton") == longest(asked / "val.beton") == 400
    for name in (large / "val").iterdir():
        name.rename(name.with_name(f"class_{name.name}"))
    assert longest(convert(large / "val", large.parent / "val.beton")) == 500


def test_an_older_val_of_imagenet_is_not_replaced(large):
    out = convert(large, max_side=500)
    with pytest.raises(
        UserError, match=r"val\.beton exists with max_side_px 500, .*--max-side 500 to keep it, or .*--fresh"
    ):
        convert(large)
    assert longest(out / "val.beton") == 500


def test_a_val_image_that_no_page_holds_is_resized(large, monkeypatch):
    path = next((large / "val").rglob("*.JPEG"))
    how = store.How(store.ANY_SIDE_PX, 90, decode_all=False)
    at_500 = store.store_image(path.read_bytes(), how._replace(max_side_px=500))
    monkeypatch.setattr(store, "PAGE_BYTES", 100_000)
    assert at_500.size_bytes < 100_000 < path.stat().st_size
    assert store.store_image(path.read_bytes(), how) == at_500
    with pytest.raises(store.Unreadable, match="lower --max-side"):
        store.store_image(path.read_bytes(), how._replace(max_side_px=10_000))


# ---- refusals ----


def test_what_is_near_is_named(place, shared_voc):
    root = place("down/set/train/cat/1.jpg", "down/set/val/cat/2.jpg")
    for source in (root, root / "down"):
        with pytest.raises(
            UserError, match=r"set looks like a dataset \(folders: train and val\), give --source .*/down/set$"
        ):
            open_source(source)
    (root / "down" / "set" / "train" / "dog").mkdir()
    with pytest.raises(
        UserError, match=r"no class folders and no images .*; .*set looks like .*give --source .*/down/set$"
    ):
        open_source(root / "down" / "set" / "train" / "dog")
    for source in (
        shared_voc / "VOCdevkit" / "VOC2007" / "ImageSets",
        shared_voc / "VOCdevkit" / "VOC2007" / "Annotations",
    ):
        with pytest.raises(UserError, match=r"VOC2007 looks like a dataset \(voc2007: train and val\)"):
            open_source(source)
    (root.parent / "above").mkdir()
    (root.parent / "above" / "x").symlink_to(shared_voc / "VOCdevkit")
    with pytest.raises(UserError, match=r"one folder, x, .*x looks like a dataset \(voc2007: train and val\), give --"):
        open_source(root.parent / "above")


def test_two_images_of_one_name(tmp_path, shared_voc):
    """A list that names an image twice."""
    shutil.copytree(shared_voc / "VOCdevkit", tmp_path / "VOCdevkit")
    listed = tmp_path / "VOCdevkit" / "VOC2007" / "ImageSets" / "Main" / "trainval.txt"
    first = listed.read_text().splitlines()[0].split()[0]
    listed.write_text(listed.read_text() + first + "\n")
    with pytest.raises(UserError, match=rf"has 2 images of the name JPEGImages/{first}\.jpg; every image needs"):
        open_source(tmp_path, "train")
    assert len(open_source(tmp_path, "val"))
