"""SimCLR's lists, when they apply, and what stands in for them elsewhere."""

import hashlib
import json
import tarfile
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from eval import splits
from eval.splits import LISTS, imagenet_list, labelled_subset, open_dataset
from pipeline.errors import UserError
from tests.evaluation import write_dataset, write_split

# The digests as google-research/simclr's files have them, written down apart from constants.py.
DIGESTS = {
    1: "71e82a48ba78252683ae334c4d019ebd5c6e855b9599c1389fbe83eb9549cf17",
    10: "6d09de11e7bdaf5b1f3b1f249b6183695f97310cdd20f0c03e7235b6b9392091",
}


def stand_in(names: list[str]):
    """What a split needs of a .beton: file names, labels and classes, from paths like n01440764/n01440764_1.JPEG."""
    classes = sorted({name.split("/")[0] for name in names})
    labels = np.array([classes.index(name.split("/")[0]) for name in names])

    class Named(SimpleNamespace):
        def __len__(self):
            return len(names)

    return Named(classes=classes, labels=labels, file_names=lambda: names)


def in_folders(names) -> list[str]:
    return sorted(f"{name.split('_')[0]}/{name}" for name in names)


@pytest.mark.parametrize(("percent", "images"), [(1, 12_811), (10, 128_116)])
def test_the_published_lists(percent, images):
    content = (LISTS / f"imagenet_{percent}percent.txt").read_bytes()
    assert hashlib.sha256(content).hexdigest() == DIGESTS[percent]
    per_class = Counter(name.split("_")[0] for name in imagenet_list(percent))
    assert (len(imagenet_list(percent)), len(per_class)) == (images, 1000)
    assert min(per_class.values()) >= 7 * percent and max(per_class.values()) <= 13 * percent


def test_a_changed_list_is_refused(tmp_path, monkeypatch):
    whole = (LISTS / "imagenet_1percent.txt").read_bytes()
    monkeypatch.setattr(splits, "LISTS", tmp_path)
    for content in (None, whole[:-1], whole.replace(b"n01440764", b"n0144\xff764", 1)):
        if content:
            (tmp_path / "imagenet_1percent.txt").write_bytes(content)
        with pytest.raises(UserError, match=r"not the published list.*git checkout"):
            imagenet_list.__wrapped__(1)


def test_imagenet_gets_the_whole_list():
    listed = imagenet_list(1)
    train = stand_in(in_folders([*listed, *(f"{name.split('_')[0]}_other_{name}" for name in listed)]))
    subset = labelled_subset(train, 0.01, 0)
    assert (subset.name, subset.images) == ("imagenet-1percent", 12_811)
    assert {train.file_names()[i].split("/")[1] for i in subset.ids} == set(listed)
    assert (np.diff(subset.ids) > 0).all()


def test_real_imagenet_10(shared_data):
    """The 12,894 training files of ten ImageNet classes: the lists pick 129 and 1,282 of them."""
    with tarfile.open(shared_data / "imagenette-128.tar") as tar:
        names = [name.split("/")[-2:] for name in tar.getnames() if name.endswith(".JPEG")]
    train = stand_in(sorted("/".join(name) for name in names if not name[1].startswith("ILSVRC2012_val")))
    assert len(train) == 12_894
    for fraction, name, images in (
        (0.01, "imagenet-1percent (129 of 12811 files)", 129),
        (0.1, "imagenet-10percent (1282 of 128116 files)", 1282),
    ):
        subset = labelled_subset(train, fraction, 0)
        assert (subset.name, subset.images, len(subset.ids)) == (name, images, images)
        listed = imagenet_list(round(fraction * 100))
        assert all(train.file_names()[i].split("/")[1] in listed for i in subset.ids)


@pytest.mark.parametrize("ending", [".jpg", ".png", "", "_{synset}.JPEG", "_{synset}.jpeg"])
@pytest.mark.parametrize("class_of", [lambda synset: synset, lambda synset: f"class {synset[1:]}"])
def test_other_suffixes_and_classes_are_the_same_list(ending, class_of):
    """Names as Hugging Face, DALI's and WebDataset's copies of ImageNet have them, beside as many others."""
    listed = sorted(imagenet_list(1))
    names = []
    for name in listed:
        stem, synset = name.removesuffix(".JPEG"), name.split("_")[0]
        names += [f"{class_of(synset)}/{stem}{ending.format(synset=synset)}", f"{class_of(synset)}/{stem}0000.JPEG"]
    subset = labelled_subset(stand_in(names), 0.01, 0)
    assert subset.name == "imagenet-1percent"
    assert subset.ids.tolist() == list(range(0, 2 * len(listed), 2))


def test_names_that_only_begin_like_listed_ones():
    """n01440764_190 is listed nowhere; neither is a copy that another program has numbered."""
    names = [name.replace(".JPEG", other) for name in in_folders(imagenet_list(1)) for other in ("_2.JPEG", "-1.JPEG")]
    assert labelled_subset(stand_in(names), 0.01, 0).name == "balanced-0.01-seed0"


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([f"n0144076{k}/val_{i}.JPEG" for k in range(3) for i in range(99)], "0 of 297 files are on it"),
        # Tiny ImageNet numbers its images itself: some have names of others of ImageNet
        ([f"n01440764/n01440764_{i}.JPEG" for i in range(12_000)], "of 12000 files are on it"),
        ([f"{k:04d}/{i}.png" for k in range(1000) for i in range(2)], "0 of 2000 files are on it"),
        ([f"cat/n01440764_{i}.JPEG" for i in range(500_000, 500_099)], "0 of 99 files are on it"),
        ([f"{k}/{i}.png" for k in range(30) for i in range(9)], ""),
    ],
)
def test_what_looks_like_imagenet_is_told_that_no_list_applies(names, said, capsys):
    assert labelled_subset(stand_in(names), 0.01, 0).name == "balanced-0.01-seed0"
    note = capsys.readouterr().err
    assert said in note and bool(note) == bool(said) and note.count("\n") == bool(said)
    if said:
        assert "SimCLR's list of ImageNet's 1 % does not apply" in note and "class-balanced share is used" in note
    labelled_subset(stand_in(names), 0.05, 0)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("spoil", ["class without a listed file", "another fraction"])
def test_where_the_list_does_not_apply(spoil, capsys):
    names = in_folders(imagenet_list(1))
    fraction = 0.01
    if spoil == "class without a listed file":
        names.append("n99999999/n99999999_1.JPEG")
    else:
        fraction = 0.05
    subset = labelled_subset(stand_in(names), fraction, 3)
    assert subset.name == f"balanced-{fraction:g}-seed3"
    assert subset.images == len(subset.ids) >= 1000
    assert ("none of n99999999 is on it" in capsys.readouterr().err) == (fraction == 0.01)


def test_elsewhere_the_share_is_balanced_and_seeded():
    train = stand_in([f"{'cat' if i % 3 else 'dog'}/{i}.png" for i in range(3000)])
    subset = labelled_subset(train, 0.1, 0)
    assert Counter(train.labels[subset.ids].tolist()) == {0: 200, 1: 100}
    assert subset.name == "balanced-0.1-seed0"
    assert np.array_equal(subset.ids, labelled_subset(train, 0.1, 0).ids)
    other = labelled_subset(train, 0.1, 1)
    assert not np.array_equal(subset.ids, other.ids)
    assert labelled_subset(train, 1.0, 0) == splits.Subset(None, "all", 3000)


@pytest.mark.parametrize("fraction", [0, -0.1, 1.01, float("nan")])
def test_a_fraction_out_of_range(fraction):
    with pytest.raises(UserError, match=r"--fraction .* is outside \(0, 1\]"):
        labelled_subset(stand_in(["cat/1.png", "dog/2.png"]), fraction, 0)


def test_validation_classes_are_matched_by_name(tmp_path):
    """val lacks classes "a" and "c" of train: its label 0 is train's 1, its 1 train's 3."""
    write_split(tmp_path / "train.beton", np.array([0, 1, 2, 3]), ["a", "b", "c", "d"], 0)
    write_split(tmp_path / "val.beton", np.array([1, 0, 1]), ["b", "d"], 1)
    for given in (tmp_path, tmp_path / "train.beton"):
        dataset = open_dataset(given)
        assert dataset.val_labels.tolist() == [3, 1, 3]
        assert (dataset.name, len(dataset.train), len(dataset.val)) == (tmp_path.name, 4, 3)


def test_validation_classes_unknown_to_train(tmp_path):
    write_split(tmp_path / "train.beton", np.array([0, 1]), ["a", "b"], 0)
    write_split(tmp_path / "val.beton", np.array([0, 1, 2]), ["a", "b", "zebra"], 1)
    with pytest.raises(UserError, match=r"has 1 of 3 classes that train\.beton lacks \(zebra\)"):
        open_dataset(tmp_path)


def test_a_missing_dataset_names_the_command(tmp_path):
    with pytest.raises(UserError, match=r"train\.beton is missing; make it with pipeline/convert\.py"):
        open_dataset(tmp_path)
    write_dataset(tmp_path)
    (tmp_path / "val.beton").unlink()
    with pytest.raises(UserError, match=r"val\.beton is missing"):
        open_dataset(tmp_path)


def test_a_class_without_training_images(tmp_path):
    """As --skip-unreadable leaves it behind where none of a class's images can be read."""
    write_split(tmp_path / "train.beton", np.array([0, 2, 2]), ["ant", "bee", "cat"], 0)
    write_split(tmp_path / "val.beton", np.array([0, 1]), ["ant", "bee"], 1)
    with pytest.raises(UserError, match=r"no image of 1 of its 3 classes \(bee first\)"):
        open_dataset(tmp_path)


def test_labels_out_of_range(tmp_path):
    write_split(tmp_path / "train.beton", np.array([0, 1, 2]), ["ant", "bee", "cat"], 0)
    manifest = tmp_path / "train.manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"classes": ["ant", "bee"]}))
    with pytest.raises(UserError, match=r"labels from 0 to 2, train\.manifest\.json names 2 classes \(labels 0 to 1\)"):
        open_dataset(tmp_path)
