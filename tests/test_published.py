"""The published numbers and what may stand beside them."""

import json

import pytest

from eval import protocols
from eval.protocols import Protocol, published_rows
from eval.reporting.comparison import comparison_markdown, comparisons, duration
from eval.subject import RESULTS, read_results
from pipeline.disk import append_line

# Copied by hand from the papers' and model cards' tables.
NUMBERS = """
73.2 91.0 71.4 90.2 76.5 60.6 63.6 69.3 71.1 71.3 71.8 75.3 74.3
55.0 79.2 69.7 89.3 25.4 48.3 53.2 53.9 56.4 65.6 68.8 70.2
15.51 33.98 45.96 61.90 71.01 71.66 63.6 63.8 62.7 61.9
86.2 54.1 46.5 56.8 82.6 63.4 39.2 59.0 42.5 34.3 56.0 36.5 92.10 84.2
"""


def result(protocol, values, **more):
    imagenet = {"dataset": "imagenet", "classes": 1000, "val_images": 50_000, "arch": "resnet50", "fraction": 1.0}
    run = {"encoder": "trained", "method": "barlow_twins", "epochs": 300, "checkpoint_sha256": "a", "seed": 0}
    rest = {"changed": {}, "dataset_sha256": {}, "seconds": 90.0, "protocol": protocol, "values": values}
    share = {1.0: ("all", 1_281_167), 0.01: ("imagenet-1percent", 12_811)}[more.get("fraction") or 1.0]
    rest |= {"step": 9, "details": {}, "split": share[0], "train_images": share[1]}
    return imagenet | run | rest | more


def rows(results):
    """{(table, method, what, epochs): Comparison}"""
    return {
        (t, c.published.method, c.published.what, c.published.epochs): c
        for t, compared in comparisons(results).items()
        for c in compared
    }


LINEAR = ("Linear, ImageNet", "barlow_twins", "linear top-1/top-5", 1000)
ONE_PERCENT = ("Semi-supervised, ImageNet", "barlow_twins", "1 % labels, top-1/top-5", 1000)


def test_every_published_number_is_there():
    assert sorted(v for p in published_rows() for v in p.values.values()) == sorted(map(float, NUMBERS.split()))
    text = comparison_markdown([])
    assert text.count("not measured") == len(published_rows()) and text.count("###") == 6
    assert published_rows()[0].text == "73.2 / 91.0"


def test_every_row_with_a_protocol_names_one_of_ours():
    ours = [p for p in vars(protocols).values() if isinstance(p, Protocol)]
    ours += [*protocols.TRANSFER.values(), *protocols.DETECTION.values()]
    assert len({p.name for p in ours}) == len(ours) == 12
    by_protocol = [row for p in ours for row in p.published]
    assert len(by_protocol) == sum(bool(row.protocol) for row in published_rows()) == len(published_rows()) - 2


def test_a_result_is_the_protocols_own_only_with_its_settings():
    protocol = Protocol("of-four", {"epochs": 90, "lr": 0.1}, milestones=(60, 80))
    assert protocol.compared({"epochs": 90, "lr": 0.1}) == ("of-four", {})
    assert protocol.compared({"epochs": 9, "lr": 0.1}) == ("of-four-modified", {"epochs": 9})
    assert protocol.milestones_at(9) == (6, 8) and protocol.milestones_at(90) == (60, 80)


def test_difference_of_the_same_protocol():
    c = rows([result("linear-bt", {"top1": 72.0, "top5": 91.5})])[LINEAR]
    assert (c.ours, c.difference, c.protocol) == ("72.00 / 91.50", "-1.20 / +0.50", "linear-bt")
    assert (c.seeds, c.seconds, c.remark) == ("0", 90.0, "pretrained for 300 epochs")


@pytest.mark.parametrize(
    "protocol, more, remark",
    [
        ("linear-bt-modified", {"changed": {"epochs": 10}}, "modified: epochs 10"),
        ("linear-bt-modified", {"changed": {"resolution_px": 64}}, "modified: resolution_px 64"),
        ("linear-bt", {"arch": "resnet18"}, "resnet18"),
        ("linear-bt", {"train_images": 130_000}, "130000 train images, not 1281167"),
    ],
)
def test_no_difference_where_anything_differs(protocol, more, remark):
    c = rows([result(protocol, {"top1": 72.0, "top5": 91.5}, **more)])[LINEAR]
    assert c.ours == "72.00 / 91.50" and c.difference == "" and remark in c.remark


@pytest.mark.parametrize(
    "more",
    [
        {"method": "simclr"},
        {"method": ""},
        {"encoder": "untrained"},
        {"val_images": 500, "classes": 10},
        {"fraction": None, "split": "5-shot-seed0"},
        {"protocol": "linear-cached"},
    ],
)
def test_what_does_not_belong_there(more):
    assert rows([result("linear-bt", {"top1": 72.0, "top5": 91.5}) | more])[LINEAR].ours == ""


def test_another_methods_run_stands_in_its_own_row():
    found = rows([result("linear-bt", {"top1": 69.0, "top5": 89.0}, method="simclr")])
    assert [key[1] for key, c in found.items() if c.ours] == ["simclr"]
    assert found["Linear, ImageNet", "simclr", "linear top-1", None].difference == "-0.30"


def test_seeds_are_averaged_of_one_checkpoint_and_setting():
    lines = [result("semisup-bt", {"top1": 90.0, "top5": 99.0}, fraction=0.01, checkpoint_sha256="old", seed=7)]
    lines += [result("semisup-bt", {"top1": t, "top5": 80.0}, fraction=0.01, seed=s) for s, t in ((0, 1.0), (0, 54.0))]
    lines += [result("semisup-bt", {"top1": 56.0, "top5": 80.0}, fraction=0.01, seed=1)]
    lines += [result("semisup-bt-modified", {"top1": 99.0, "top5": 99.0}, fraction=0.01, changed={"epochs": 9})]
    c = rows(lines)[ONE_PERCENT]
    assert c.ours == "55.00 ± 1.41 / 80.00 ± 0.00" and c.seeds == "0, 1" and c.seconds == 180.0
    assert c.difference == "+0.00 / +0.80"


def test_seeds_of_one_line():
    seeds = [{"seed": s, "split": "all", "top1": t, "top5": 80.0} for s, t in enumerate((54.0, 56.0, 58.0))]
    line = result("semisup-bt", {"top1": 56.0, "top5": 80.0}, fraction=0.01, details={"seeds": seeds})
    c = rows([line])[ONE_PERCENT]
    assert (c.ours, c.seeds, c.seconds) == ("56.00 ± 2.00 / 80.00 ± 0.00", "0, 1, 2", 90.0)


def test_other_labelled_images_give_no_difference():
    """SimCLR's 1 % does not apply where classes are not named by WordNet ids: a balanced share stands in for it."""
    c = rows([result("semisup-bt", {"top1": 50.0, "top5": 80.0}, fraction=0.01, split="balanced-0.01-seed0")])
    c = c[ONE_PERCENT]
    assert c.ours and not c.difference and "other labelled images than SimCLR's 1 % (balanced-0.01-seed0)" in c.remark


def test_a_share_of_the_labels_is_not_transfer():
    places = {"classes": 205, "val_images": 20_500, "train_images": 2_448_873}
    row = ("Transfer, linear", "barlow_twins", "Places205, top-1", 1000)
    assert rows([result("transfer-places205", {"top1": 54.0}, **places)])[row].difference == "-0.10"
    for share in ({"fraction": 0.1, "split": "balanced-0.1-seed0"}, {"fraction": None, "split": "5-shot-seed0"}):
        assert not rows([result("transfer-places205", {"top1": 54.0}) | places | share])[row].ours


def test_svms_and_transfer_are_compared_only_as_published(tmp_path):
    """A line from before there was a choice of stage and view was measured on the average pool of centre crops."""
    voc = {"classes": 20, "val_images": 4952, "train_images": 5011}
    row = ("Transfer, linear", "barlow_twins", "VOC07, mAP", 1000)
    as_published = {"view": "squash", "stage": "feature5", "resolution_px": 224, "feature_type": "float32"}
    line = result("svm-voc07", {"map_area": 86.0, "map": 83.0}, **voc, metric="map_area", value=86.0, checkpoint="x")
    line |= {"settings": as_published, "resolution_px": 224, "feature_type": "float32", "time": "", "dataset": "voc07"}
    old = line | {"settings": {"resolution_px": 224, "feature_type": "float32"}, "metric": "map", "value": 83.0}
    old_transfer = old | {"protocol": "transfer-places205", "metric": "top1", "values": {"top1": 54.0}, "value": 54.0}
    kept = []
    for one in (line, old, old_transfer):
        append_line(tmp_path / RESULTS, json.dumps({k: v for k, v in one.items() if k != "method"}))
    for one in read_results(tmp_path):
        kept.append(one | {"method": "barlow_twins"})
    assert rows(kept[:1])[row].difference == "-0.20" and rows(kept[:2])[row].difference == "-0.20"
    assert kept[1]["changed"] == {"stage": "output", "view": "centre"}
    assert (kept[1]["protocol"], kept[1]["metric"], kept[1]["value"]) == ("svm-voc07-modified", "map_area", 86.0)
    assert (kept[2]["protocol"], kept[2]["changed"]) == ("transfer-places205-modified", {"stage": "output"})
    found = rows(kept[1:2])[row]
    assert found.ours == "86.00" and not found.difference and "modified: stage output, view centre" in found.remark


def test_rows_of_several_checkpoints_name_theirs():
    linear = result("linear-bt", {"top1": 72.0, "top5": 91.5}, step=21, checkpoint_sha256="b" * 64)
    for of_knn, named in (({}, True), ({"step": 21, "checkpoint_sha256": "b" * 64}, False)):
        knn = result("knn-mmselfsup", {"top1_k20": 63.0}, checkpoint_sha256="a" * 64) | of_knn
        remarks = [c.remark for c in rows([knn, linear]).values() if c.ours]
        assert ["step 9, checkpoint aaaaaaaa" in r for r in remarks] == [False, False, named]
        assert ["step 21, checkpoint bbbbbbbb" in r for r in remarks] == [named, named, False]


def test_cifar_and_detection_give_no_difference():
    cifar = {"classes": 10, "val_images": 10_000, "train_images": 50_000, "arch": "resnet18", "dataset": "anything"}
    cifar |= {"changed": {"resolution_px": 32}}  # which is the published side there
    voc = {"AP": 50.0, "AP50": 80.0, "AP75": 55.0}
    found = rows(
        [
            result("linear-cached-modified", {"top1": 91.0}, **cifar),
            result("detection-voc0712", voc, classes=20, fraction=None),
        ]
    )
    c = found["CIFAR-10, ResNet-18", "barlow_twins", "linear top-1", 1000]
    assert c.ours == "91.00" and c.difference == ""
    assert c.remark == "pretrained for 300 epochs; another protocol than the published one"
    c = found["Detection and segmentation, R50-C4", "barlow_twins", "VOC07+12, AP/AP50/AP75", 1000]
    assert c.ours == "50.00 / 80.00 / 55.00" and c.difference == "" and "Detectron2" in c.remark
    assert "50000 val images, not 4952" in c.remark


def test_duration():
    assert [duration(s) for s in (None, 5.4, 90, 7200)] == ["", "5 s", "1.5 min", "2.0 h"]
