"""VOC's annotations as classification targets, and its images for the converter."""

import numpy as np
import pytest

from eval.voc import CLASSES, image_targets, voc_targets
from pipeline.errors import UserError
from pipeline.storage.sources.open import open_source, split_names


def annotation(*objects: tuple[str, str]) -> str:
    inside = "".join(f"<object><name>{n}</name><difficult>{d}</difficult></object>" for n, d in objects)
    return f"<annotation><filename>000001.jpg</filename>{inside}</annotation>"


def write_voc(root, **images: str):
    """VOCdevkit/VOC2007 with these annotations by image id; images that start with 1 are trainval."""
    voc = root / "VOCdevkit" / "VOC2007"
    for folder in ("ImageSets/Main", "JPEGImages", "Annotations"):
        (voc / folder).mkdir(parents=True, exist_ok=True)
    for name, xml in images.items():
        (voc / "JPEGImages" / f"{name[1:]}.jpg").write_bytes(b"x")
        (voc / "Annotations" / f"{name[1:]}.xml").write_text(xml)
    for split, first in (("trainval", "1"), ("test", "2")):
        names = [name[1:] for name in images if name[1] == first]
        (voc / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
    return voc


def test_difficult_objects_are_ignored_unless_another_is_not(tmp_path):
    voc = write_voc(
        tmp_path,
        _101=annotation(("dog", "0"), ("cat", "1"), ("car", "1"), ("car", "0")),
        _201=annotation(("car", "0"), ("car", "1"), ("person", "0")),
    )
    targets = voc_targets(tmp_path, ["JPEGImages/101.jpg", "JPEGImages/201.jpg"])
    expected = np.zeros((2, 20), np.int8)
    for row, name, value in ((0, "dog", 1), (0, "cat", -1), (0, "car", 1), (1, "car", 1), (1, "person", 1)):
        expected[row, CLASSES.index(name)] = value
    assert np.array_equal(targets, expected)
    assert image_targets(voc / "Annotations" / "101.xml").dtype == np.int8


def test_the_sample_has_difficult_objects_and_twenty_classes(shared_voc):
    source = open_source(shared_voc, "train")
    targets = voc_targets(shared_voc, source.names)
    assert targets.shape == (160, 20) and set(np.unique(targets)) == {-1, 0, 1}
    assert (targets == 1).sum(0).min() >= 2


def test_the_source_lists_trainval_and_test(tmp_path):
    write_voc(tmp_path, _101=annotation(("dog", "0")), _102=annotation(("cat", "0")), _201=annotation(("cat", "0")))
    assert split_names(tmp_path) == ["train", "val"]
    train, val = (open_source(tmp_path, split) for split in ("train", "val"))
    assert train.names == ["JPEGImages/101.jpg", "JPEGImages/102.jpg"] and val.names == ["JPEGImages/201.jpg"]
    assert train.classes == val.classes == ["image"] and train.labels.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("xml", "message"),
    [
        (annotation(), r"101\.xml has no object"),
        (annotation(("zebra", "0")), "'zebra', none of VOC's 20"),
        ("<annotation><object>", "is not an annotation of PASCAL VOC"),
    ],
)
def test_annotations_that_cannot_be_used(tmp_path, xml, message):
    write_voc(tmp_path, _101=xml)
    with pytest.raises(UserError, match=message):
        voc_targets(tmp_path, ["JPEGImages/101.jpg"])


def test_missing_parts(tmp_path):
    with pytest.raises(UserError, match="no VOC2007 in"):
        voc_targets(tmp_path, [])
    voc = write_voc(tmp_path, _101=annotation(("dog", "0")), _201=annotation(("dog", "0")))
    (voc / "JPEGImages" / "201.jpg").unlink()
    with pytest.raises(UserError, match=r"lists 1 images, 1 of them are missing \(JPEGImages/201\.jpg first\)"):
        open_source(tmp_path, "val")
    (voc / "Annotations" / "101.xml").unlink()
    with pytest.raises(UserError, match=r"101\.xml is missing; unpack the annotations of VOC2007"):
        voc_targets(tmp_path, ["JPEGImages/101.jpg"])
