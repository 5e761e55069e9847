"""COCO's and VOC's annotations, damaged: refused in one sentence that names file and place, or read as plain JSON and
ElementTree read them; nothing that pycocotools would end the process with reaches it.
"""

import copy
import json
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask

from eval.detector.coco import open_coco
from eval.detector.data import open_voc
from eval.detector.outlines import outline_fits, outline_mask
from eval.detector.scores import coco_scores
from eval.voc import image_targets
from pipeline.errors import UserError
from tests.mutants import json_mutants, mutants, outcome

# ---- COCO ----

SQUARE = [10.0, 5.0, 30.0, 5.0, 30.0, 25.0, 10.0, 25.0]
RUNS = [400, 5, 35, 5, 40 * 50 - 445]
TEXT = "`<5S10`_1"  # the same in COCO's text
IMAGES = [{"id": i, "file_name": f"{i}.jpg", "height": 40, "width": 50} for i in (3, 5, 8)]
OBJECTS = [
    {"image_id": 3, "category_id": 2, "bbox": [10, 5, 20, 20], "segmentation": [SQUARE], "iscrowd": 0},
    {"image_id": 3, "category_id": 9, "bbox": [10.5, 0, 2, 5], "segmentation": {"size": [40, 50], "counts": RUNS}},
    {"image_id": 5, "category_id": 2, "bbox": [10, 0, 2, 5], "segmentation": {"size": [40, 50], "counts": TEXT}},
]
CATEGORIES = [{"id": 9, "name": "cat"}, {"id": 2, "name": "dog"}]
INSTANCES = {"images": IMAGES, "annotations": OBJECTS, "categories": CATEGORIES}


@pytest.fixture
def coco(tmp_path) -> Path:
    """COCO's file in a folder of images, which nobody opens."""
    (tmp_path / "annotations").mkdir()
    (tmp_path / "val2017").mkdir()
    for image in IMAGES:
        (tmp_path / "val2017" / image["file_name"]).touch()
    return tmp_path / "annotations" / "instances_val2017.json"


def test_coco(coco):
    """What is taken is what plain JSON has, and pycocotools draws and scores it."""
    sound, refused = json.dumps(INSTANCES).encode(), 0
    for mutant in [sound, *json_mutants(sound, 1)]:
        coco.write_bytes(mutant)
        split = outcome(lambda: open_coco(coco.parents[1], "val2017"))
        if isinstance(split, UserError):
            assert str(coco) in str(split)
            refused += 1
            continue
        told = json.loads(mutant)
        ids = sorted(category["id"] for category in told["categories"])
        for image, record in zip(told["images"], split.records, strict=True):
            assert (image["id"], image["height"], image["width"]) == (record.image_id, record.height, record.width)
            own = [o for o in told["annotations"] if o["image_id"] == image["id"]]
            assert record.labels.tolist() == [1 + ids.index(o["category_id"]) for o in own]
            expected = np.array([o["bbox"] for o in own], np.float32).reshape(-1, 4)
            expected[:, 2:] += expected[:, :2]
            np.testing.assert_array_equal(record.boxes, expected)
            for outline in record.outlines:
                assert outline_mask(outline, record.height, record.width).shape == (record.height, record.width)
        found = [{"image_id": r.image_id, "category_id": 1, "bbox": [1, 1, 9, 9], "score": 0.5} for r in split.records]
        for detection, r in zip(found, split.records, strict=True):
            detection["segmentation"] = mask.encode(np.ones((r.height, r.width), np.uint8, order="F"))
        assert all(coco_scores(split.truth(), found, kind)["AP"] <= 100 for kind in ("bbox", "segm"))
    assert 100 < refused < 295


@pytest.mark.parametrize(
    "outline",
    [
        *([], [[]], SQUARE, "x", None, {}, [SQUARE[:4]], [SQUARE[:7]], [SQUARE, SQUARE[:2]]),
        *([[*SQUARE[:-1], last]] for last in (1e9, -1e9, float("nan"), float("inf"), "1", 10**400, [25.0], None)),
        *({"size": [40, 50]}, {"size": [50, 40], "counts": RUNS}, {"size": [40.0, 50], "counts": RUNS}),
        *({"size": [40, 50], "counts": counts} for counts in ([*RUNS, 1], [], [2001, -1], [2000.0], 7, RUNS[:-1])),
        *({"size": [40, 50], "counts": text} for text in (TEXT[:-1], f"{TEXT}1", f"{TEXT}\0", "o" * 20, "", "é")),
    ],
)
def test_outlines_that_pycocotools_must_not_see(outline):
    """C would read or write beside its memory, fill all of it, or take a polygon for a box."""
    assert not outline_fits(outline, 40, 50)


def test_outlines_in_cocos_text():
    """As pycocotools writes them, of masks with many runs and few."""
    rng = np.random.default_rng(0)
    for share in (0.0, 0.02, 0.5, 1.0):
        drawn = np.asfortranarray(rng.random((40, 50)) < share, np.uint8)
        packed = mask.encode(drawn)
        text = {"size": packed["size"], "counts": packed["counts"].decode()}
        assert outline_fits(text, 40, 50) and np.array_equal(outline_mask(text, 40, 50), drawn)


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"images": [*IMAGES, IMAGES[0]]}, "images has an id twice"),
        ({"images": IMAGES[2:]}, "annotations has no object of an image that is listed"),
        ({"categories": CATEGORIES[:1]}, r"annotations\[0\] is of a category that is not listed"),
        ({"categories": []}, "categories is missing or lists nothing"),
        ({"annotations": [{**OBJECTS[0], "bbox": [10, 5, -3, 20]}]}, r"annotations\[0\] has a bbox that is not in an"),
        ({"annotations": [*OBJECTS, {**OBJECTS[0], "bbox": [1, 2, 3]}]}, r"annotations\[3\] has bbox \[1, 2, 3\], exp"),
        ({"annotations": [{**OBJECTS[0], "segmentation": [SQUARE[:4]]}]}, r"\[0\] has a segmentation that is not in"),
        ({"annotations": [{**OBJECTS[0], "iscrowd": 2}]}, r"annotations\[0\] has iscrowd 2"),
        ({"images": [{**IMAGES[0], "id": True}]}, r"images\[0\] has id True, expected is a whole number"),
        ({"images": [{**IMAGES[0], "file_name": "9" * 5000}, *IMAGES[1:]]}, "is missing, one of 1 of the 3 images"),
    ],
)
def test_a_fault_in_cocos_file_has_a_place(coco, changes, place):
    coco.write_text(json.dumps(INSTANCES | changes))
    with pytest.raises(UserError, match=place):
        open_coco(coco.parents[1], "val2017")


def test_polygons_of_fewer_than_three_corners_are_left_out(coco):
    """As Detectron2 does; one beside a whole one is no reason to refuse all of the file."""
    both = {**OBJECTS[0], "segmentation": [SQUARE[:4], SQUARE, SQUARE[2:4]]}
    coco.write_text(json.dumps(INSTANCES | {"annotations": [both, *OBJECTS[1:]]}))
    assert open_coco(coco.parents[1], "val2017").records[0].outlines[0] == [SQUARE]


def test_objects_of_images_that_are_not_listed_are_left_out(coco, capsys):
    """As pycocotools does: whoever shortens the list often leaves the objects as they are."""
    coco.write_text(json.dumps(INSTANCES | {"images": IMAGES[1:]}))
    assert [len(record.labels) for record in open_coco(coco.parents[1], "val2017").records] == [1, 0]
    assert "2 of 3 objects left out, of images not listed" in capsys.readouterr().err


# ---- VOC ----

ANNOTATION = b"""<annotation><folder>VOC2007</folder><size><width>50</width><height>40</height></size>
<object><name>dog</name><difficult>0</difficult>
<bndbox><xmin>11</xmin><ymin>6</ymin><xmax>30</xmax><ymax>25</ymax></bndbox></object>
<object><name>cat</name><difficult>1</difficult>
<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>50</xmax><ymax>40</ymax></bndbox></object>
</annotation>"""


@pytest.fixture
def voc(tmp_path) -> Path:
    """The annotation of the only image of a VOCdevkit."""
    for folder in ("ImageSets/Main", "JPEGImages", "Annotations"):
        (tmp_path / "VOC2007" / folder).mkdir(parents=True)
    (tmp_path / "VOC2007" / "ImageSets" / "Main" / "trainval.txt").write_text("000001\n")
    (tmp_path / "VOC2007" / "JPEGImages" / "000001.jpg").touch()
    return tmp_path / "VOC2007" / "Annotations" / "000001.xml"


TEXTS = ("", "x", "-1", "0", "1", "7", "12.5", "1e9", "nan", "inf", "9" * 5000, "cat", "\ud7ff", " 20 ")


def xml_mutants(sound: bytes, seed: int) -> Iterator[bytes]:
    """Damaged copies of an XML file: two of three are XML still, with an element of another text, name or number."""
    rng = np.random.default_rng(seed)
    for number, damaged in enumerate(mutants(sound, seed)):
        root = ET.fromstring(sound)
        elements = list(root.iter())
        inside = elements[rng.integers(0, len(elements))]
        element = elements[rng.integers(0, len(elements))]
        change = rng.integers(0, 6)
        if change == 0:
            inside.append(copy.deepcopy(element))
        elif change == 1:
            inside[:] = inside[1:]
        elif change == 2:
            element.tag = ("object", "bndbox", "xmin", "x")[rng.integers(0, 4)]
        else:
            element.text = TEXTS[rng.integers(0, len(TEXTS))]
        yield damaged if number % 3 == 0 else ET.tostring(root, "utf-8")


def test_voc(voc):
    """What is taken is what ElementTree reads, for detection and for classification."""
    refused = 0
    for mutant in [ANNOTATION, *xml_mutants(ANNOTATION, 2)]:
        voc.write_bytes(mutant)
        split = outcome(lambda: open_voc(voc.parents[2], [("VOC2007", "trainval")]))
        targets = outcome(lambda: image_targets(voc))
        if isinstance(split, UserError):
            assert str(voc) in str(split)
            refused += 1
            continue
        (record,), root = split.records, ET.fromstring(mutant)
        assert (record.height, record.width) == tuple(int(root.find(f"size/{s}").text) for s in ("height", "width"))
        ends = ("xmin", "ymin", "xmax", "ymax")
        boxes = ([found.find(f"bndbox/{end}") for end in ends] for found in root.findall("object"))
        corners = [[float(end.text) for end in box] for box in boxes]
        np.testing.assert_allclose(record.boxes, np.array(corners) - [1, 1, 0, 0], rtol=1e-6)
        difficult = [found.findtext("difficult", "").strip() == "1" for found in root.findall("object")]
        assert record.ignored.tolist() == difficult and set(targets.tolist()) <= {-1, 0, 1}
    assert 100 < refused < 280


BOMB = "".join(f'<!ENTITY a{i} "{f"&a{i - 1};" * 10}">' for i in range(1, 7))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f'<!DOCTYPE a [<!ENTITY a0 "lollollollol">{BOMB}]><annotation>&a6;</annotation>'.encode(), "amplification"),
        (b'<?xml version="1.0" encoding="no such"?><annotation/>', "not an annotation"),
        (b'<?xml version="1.0" encoding="hex"?><annotation/>', "not an annotation"),
        (b"<a>" * 200_000, "not an annotation"),
        (ANNOTATION.replace(b">6<", b">nan<"), "a box from 11, nan to 30, 25 in an image of 50×40 px"),
        (ANNOTATION.replace(b">30<", b">3<"), "a box from 11, 6 to 3, 25"),
        (ANNOTATION.replace(b"<width>50", b"<width>0"), "an image of 0×40 px"),
        (ANNOTATION.replace(b">1</diff", b">7</diff"), "difficult '7', expected is 0 or 1"),
    ],
    ids="bomb unknown hex deep nan swapped empty difficult".split(),
)
def test_xml_that_is_no_annotation(voc, content, message):
    voc.write_bytes(content)
    error = outcome(lambda: open_voc(voc.parents[2], [("VOC2007", "trainval")]))
    assert isinstance(error, UserError) and message in str(error)


def test_a_listing_with_an_image_twice(voc):
    voc.write_bytes(ANNOTATION)
    (voc.parents[1] / "ImageSets" / "Main" / "trainval.txt").write_text("000001\n000001\n")
    with pytest.raises(UserError, match=r"trainval\.txt lists an image twice"):
        open_voc(voc.parents[2], [("VOC2007", "trainval")])
