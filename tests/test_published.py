"""The published numbers and what may stand beside them."""

import json
from dataclasses import replace

import pytest

from eval.protocols import PROTOCOLS, Protocol, published_rows, with_all_settings
from eval.reporting.comparison import compare, comparison_markdown, comparisons, duration
from eval.subject import RESULTS, read_results
from pipeline.disk import append_line

# Every published row, copied by hand from the paper's tables, model card or README that its last column names:
# numbers | method | share of labels | protocol | epochs | view | features | metric | source
CENTRE, GAP, RES5 = "resize 256, centre crop 224", "average pool", "res5, pooled to 2 × 2"
TABLE_1, TABLE_2, TABLE_3, TABLE_4 = (f"Zbontar 2021, table {i}" for i in (1, 2, 3, 4))
CARD = "MMSelfSup v0.9.0, configs/selfsup/barlowtwins/README.md"
ROWS = f"""
73.2 91.0 | barlow_twins | 1 | linear-bt | 1000 | {CENTRE} | {GAP} | accuracy | {TABLE_1}
71.4 90.2 | barlow_twins | 1 | linear-bt | 300 | {CENTRE} | {GAP} | accuracy | Zbontar 2021, section 4
71.8 | barlow_twins | 1 | linear-bt | 300 | {CENTRE} | {GAP} | accuracy | MMSelfSup 1.x, configs/selfsup/barlowtwins/metafile.yml, line 34
60.6 | MoCo | 1 | linear-avgpool | 200 | {CENTRE} | {GAP} | accuracy | {TABLE_1}
71.1 | moco_v2 | 1 | linear-avgpool | 800 | {CENTRE} | {GAP} | accuracy | {TABLE_1}
76.5 | supervised | 1 | all weights trained with labels | 90 | {CENTRE} | {GAP} | accuracy | {TABLE_1}
63.6 | PIRL | 1 | PIRL's own | 800 | {CENTRE} | {GAP} | accuracy | {TABLE_1}
69.3 | simclr | 1 | SimCLR's own, 90 epochs of batch 4096 | 1000 | {CENTRE} | {GAP} | accuracy | {TABLE_1}
71.3 | simsiam | 1 | SimSiam's own, LARS, 90 epochs of batch 4096 | 800 | {CENTRE} | {GAP} | accuracy | {TABLE_1}
71.8 | swav | 1 | SimSiam's, which reproduced it | 800 | {CENTRE} | {GAP} | accuracy | {TABLE_1}
75.3 | SwAV, multi-crop | 1 | linear-bt | 800 | {CENTRE} | {GAP} | accuracy of the best epoch | {TABLE_1}
74.3 | byol | 1 | BYOL's own | 1000 | {CENTRE} | {GAP} | accuracy | {TABLE_1}
55.0 79.2 | barlow_twins | 0.01 | semisup-bt | 1000 | {CENTRE} | {GAP} | accuracy | {TABLE_2}
69.7 89.3 | barlow_twins | 0.1 | semisup-bt | 1000 | {CENTRE} | {GAP} | accuracy | {TABLE_2}
25.4 | supervised | 0.01 | from random weights (Zhai 2019) | 0 | {CENTRE} | {GAP} | accuracy | {TABLE_2}
48.3 | simclr | 0.01 | SimCLR's own | 1000 | {CENTRE} | {GAP} | accuracy | {TABLE_2}
53.2 | byol | 0.01 | BYOL's own | 1000 | {CENTRE} | {GAP} | accuracy | {TABLE_2}
53.9 | SwAV, multi-crop | 0.01 | SwAV's own, rates 0.02 and 5, × 0.2 after epochs 12 and 16 | 800 | {CENTRE} | {GAP} | accuracy of the best epoch | {TABLE_2}
56.4 | supervised | 0.1 | from random weights (Zhai 2019) | 0 | {CENTRE} | {GAP} | accuracy | {TABLE_2}
65.6 | simclr | 0.1 | SimCLR's own | 1000 | {CENTRE} | {GAP} | accuracy | {TABLE_2}
68.8 | byol | 0.1 | BYOL's own | 1000 | {CENTRE} | {GAP} | accuracy | {TABLE_2}
70.2 | SwAV, multi-crop | 0.1 | SwAV's own, rates 0.01 and 0.2, × 0.2 after epochs 12 and 16 | 800 | {CENTRE} | {GAP} | accuracy of the best epoch | {TABLE_2}
15.51 | barlow_twins | 1 | heads-mmselfsup | 300 | {CENTRE} | stage maps, pooled | accuracy | {CARD}, line 33
33.98 | barlow_twins | 1 | heads-mmselfsup | 300 | {CENTRE} | stage maps, pooled | accuracy | {CARD}, line 33
45.96 | barlow_twins | 1 | heads-mmselfsup | 300 | {CENTRE} | stage maps, pooled | accuracy | {CARD}, line 33
61.90 | barlow_twins | 1 | heads-mmselfsup | 300 | {CENTRE} | stage maps, pooled | accuracy | {CARD}, line 33
71.01 | barlow_twins | 1 | heads-mmselfsup | 300 | {CENTRE} | stage maps, pooled | accuracy | {CARD}, line 33
71.66 | barlow_twins | 1 | linear-avgpool | 300 | {CENTRE} | {GAP} | accuracy | {CARD}, line 33
63.6 | barlow_twins | 1 | knn-mmselfsup | 300 | {CENTRE} | {GAP} | accuracy | {CARD}, line 41
63.8 | barlow_twins | 1 | knn-mmselfsup | 300 | {CENTRE} | {GAP} | accuracy | {CARD}, line 41
62.7 | barlow_twins | 1 | knn-mmselfsup | 300 | {CENTRE} | {GAP} | accuracy | {CARD}, line 41
61.9 | barlow_twins | 1 | knn-mmselfsup | 300 | {CENTRE} | {GAP} | accuracy | {CARD}, line 41
86.2 | barlow_twins | 1 | svm-voc07 | 1000 | whole image squashed to 224 | {RES5} | mAP as the area under the curve | {TABLE_3}
54.1 | barlow_twins | 1 | transfer-places205 | 1000 | {CENTRE} | {RES5} | accuracy | {TABLE_3}
46.5 | barlow_twins | 1 | transfer-inat18 | 1000 | {CENTRE} | {RES5} | accuracy | {TABLE_3}
56.8 82.6 63.4 | barlow_twins | 1 | detection-voc0712 | 1000 | shorter side 800 | C4 body, fine-tuned | AP as Detectron2 measures VOC | {TABLE_4}
39.2 59.0 42.5 | barlow_twins | 1 | detection-coco | 1000 | shorter side 800 | C4 body, fine-tuned | AP as pycocotools measures it | {TABLE_4}
34.3 56.0 36.5 | barlow_twins | 1 | detection-coco | 1000 | shorter side 800 | C4 body, fine-tuned | AP as pycocotools measures it | {TABLE_4}
92.10 | barlow_twins | 1 | a linear layer trained beside the encoder, on its augmented views | 1000 | whole image, 32 px | average pool of the encoder as it trains | online accuracy (offline 91.56) | da Costa 2022 (solo-learn), README.md, line 219
84.2 | barlow_twins | 1 | lightly's kNN, T = 0.1, after pretraining with batches of 128 | 200 | whole image, 32 px | {GAP} | accuracy of the best epoch | lightly's CIFAR-10 benchmark
"""  # noqa: E501

# The published settings, copied by hand: milestones, and of each protocol the settings that its source states.
BT = {"batch": 256, "weight_decay": 1e-6}
VISSL = {"batch": 256, "lr": 0.01, "weight_decay": 5e-4}
SETTINGS = {
    # BT's evaluate.py, lines 35 to 46, and README, linear classification
    "linear-bt": ((), BT | {"epochs": 100, "lr": 0.3}),
    # BT's README, semi-supervised learning; evaluate.py, lines 37, 96 and 147: 256 images on 8 GPUs, plain batch norm
    "semisup-bt": (
        (),
        {"epochs": 20, "batch": 256, "norm_images": 32, "lr_backbone": 0.005, "lr_classifier": 0.5, "weight_decay": 0},
    ),
    # MMSelfSup v0.9.0, resnet50_mhead_linear-8xb32-steplr-90e_in1k.py, lines 13 to 48; transforms.py, line 395
    "heads-mmselfsup": (
        (30, 60),
        {"epochs": 90, "batch": 256, "lr": 0.01, "weight_decay": 1e-4, "jitter": [0.4, 0.4, 0.4, 0], "lighting": 0.1},
    ),
    # MMSelfSup's resnet50_linear-8xb32-steplr-100e_in1k.py; MoCo's main_lincls.py
    "linear-avgpool": ((60, 80), {"epochs": 100, "batch": 256, "lr": 30, "weight_decay": 0}),
    "knn-mmselfsup": ((), {"neighbours": [10, 20, 100, 200], "temperature": 0.07}),
    # VISSL's svm and linear configurations
    "svm-voc07": ((), {"folds": 3, "costs": [0.01, 0.1, 1, 2, 5, 10, 15, 20, 50, 100, 1000]}),
    "transfer-places205": ((4, 8, 12), VISSL | {"epochs": 14}),
    "transfer-inat18": ((24, 48, 72), VISSL | {"epochs": 84}),
    # Zbontar 2021, appendix C.2; VISSL's rn50_transfer_voc0712_simclr_swav.yaml, lines 3 to 5, and the file it extends
    "detection-voc0712": (
        (18_000, 22_000),
        {"iterations": 24_000, "batch": 16, "lr": 0.1, "warmup": 1000, "warmup_from": 0.3333},
    ),
    # Zbontar 2021, appendix C.2; Detectron2's 1x schedule and its WARMUP_FACTOR
    "detection-coco": (
        (60_000, 80_000),
        {"iterations": 90_000, "batch": 16, "lr": 0.03, "warmup": 1000, "warmup_from": 0.001},
    ),
}


def result(protocol, values, **more):
    imagenet = {"dataset": "imagenet", "classes": 1000, "val_images": 50_000, "arch": "resnet50", "fraction": 1.0}
    run = {"encoder": "trained", "method": "barlow_twins", "epochs": 300, "checkpoint_sha256": "a", "seed": 0}
    rest = {"changed": {}, "dataset_sha256": {}, "seconds": 90.0, "protocol": protocol, "values": values}
    lists = {1.0: ("all", 1_281_167), 0.01: ("imagenet-1percent", 12_811), 0.1: ("imagenet-10percent", 128_116)}
    share = lists[more.get("fraction") or 1.0]
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


def test_every_published_number_with_all_that_decides_it():
    found = []
    for p in published_rows():
        numbers = " ".join(f"{v:.2f}" for v in p.values.values())
        found.append((numbers, p.method, p.fraction, p.protocol, p.epochs, p.view, p.features, p.metric, p.source))
    expected = []
    for line in ROWS.strip().splitlines():
        numbers, method, fraction, protocol, epochs, *rest = line.split(" | ")
        numbers = " ".join(f"{float(v):.2f}" for v in numbers.split())
        expected.append((numbers, method, float(fraction), protocol, int(epochs), *rest))
    assert sorted(found) == sorted(expected)
    text = comparison_markdown([])
    assert text.count("not measured") == len(published_rows()) and text.count("###") == 6
    assert published_rows()[0].text == "73.2 / 91.0"


@pytest.mark.parametrize("name", SETTINGS)
def test_every_published_setting(name):
    milestones, settings = SETTINGS[name]
    assert PROTOCOLS[name].milestones == milestones
    assert {key: PROTOCOLS[name].settings[key] for key in settings} == settings


def test_every_row_is_measured_by_one_of_our_protocols_or_stands_beside_some():
    assert len(PROTOCOLS) == 12
    for row in published_rows():
        assert (row.protocol in PROTOCOLS) != bool(row.similar) or row.method == "SwAV, multi-crop", row
        assert not row.similar or any(name.startswith(row.similar) for name in PROTOCOLS)


def alike(row):
    """A result by which a row's number was measured exactly as it was published."""
    classes, val_images, train_images = row.images
    size = {"classes": classes, "val_images": val_images, "arch": row.arch}
    size |= {} if row.dataset == "ImageNet" else {"train_images": train_images}
    side = {} if row.resolution_px == 224 else {"changed": {"resolution_px": row.resolution_px}}
    name = next(n for n in PROTOCOLS if n == row.protocol or (row.similar and n.startswith(row.similar)))
    about = {"method": row.method, "epochs": row.epochs, "fraction": row.fraction} | size | side
    return result(name, dict(row.values), **about)


@pytest.mark.parametrize("row", published_rows(), ids=lambda row: f"{row.method}-{row.epochs}-{row.text}")
def test_a_difference_only_where_all_of_it_is_ours(row):
    """The same number, measured as published, then with one thing after the other made different."""
    (protocol,) = [p for p in PROTOCOLS.values() if p.name == row.protocol] or [None]
    ours = protocol and (row.view, row.features, row.metric) == (protocol.view, protocol.features, protocol.measure)
    printed = compare(row, [alike(row)], False)
    assert bool(printed.difference) == bool(ours and not row.remark)
    assert printed.ours and (
        printed.difference or row.remark or row.protocol in printed.remark or row.metric in printed.remark
    )
    row = replace(row, remark="")
    assert bool(compare(row, [alike(row)], False).difference) == bool(ours)
    for change in ("view", "features", "metric")[row.resolution_px != 224 :]:  # at another side the view is the row's
        other = compare(replace(row, **{change: "another"}), [alike(row)], False)
        assert not other.difference and "another" in other.remark
    for more, said in (({"epochs": 7}, f"for 7 epochs, the published one for {row.epochs}"), ({"arch": "x"}, "x")):
        other = compare(row, [alike(row) | more], False)
        assert not other.difference and said in other.remark


def test_a_result_is_the_protocols_own_only_with_its_settings():
    protocol = Protocol("of-four", {"epochs": 90, "lr": 0.1}, milestones=(60, 80))
    assert protocol.compared({"epochs": 90, "lr": 0.1}) == ("of-four", {})
    assert protocol.compared({"epochs": 9, "lr": 0.1}) == ("of-four-modified", {"epochs": 9})
    assert protocol.milestones_at(9) == (6, 8) and protocol.milestones_at(90) == (60, 80)


@pytest.mark.parametrize(
    ("protocol", "older", "modified"),
    [
        ("heads-mmselfsup", {"jitter": [0.0, 0.0, 0.0, 0.0], "lighting": 0.0}, True),
        ("semisup-bt", {"norm_images": 0}, True),
        ("detection-voc0712", {"warmup_from": 0.001}, True),
        ("detection-coco", {"warmup_from": 0.001}, False),  # as it is published there
    ],
)
def test_a_line_from_before_a_setting_was_compared(protocol, older, modified):
    """It is read as it would be written today; a line of today stays as it is."""
    today = result(protocol, {}, settings=PROTOCOLS[protocol].settings)
    today |= {} if "detection" in protocol else {"feature_type": "float32", "resolution_px": 224}
    assert with_all_settings(today) == today
    before = {name: value for name, value in today["settings"].items() if name not in older}
    read = with_all_settings(today | {"settings": before})
    assert read["settings"] == today["settings"] | older
    assert (read["protocol"], read["changed"]) == (protocol + "-modified" * modified, older if modified else {})


def test_difference_of_the_same_protocol():
    found = rows([result("linear-bt", {"top1": 72.0, "top5": 91.5}, epochs=1000)])
    c = found[LINEAR]
    assert (c.ours, c.difference, c.protocol) == ("72.00 / 91.50", "-1.20 / +0.50", "linear-bt")
    assert (c.seeds, c.seconds, c.remark) == ("0", 90.0, "pretrained for 1000 epochs")
    shorter = found["Linear, ImageNet", "barlow_twins", "linear top-1/top-5", 300]
    assert shorter.ours == c.ours and shorter.difference == ""
    assert shorter.remark == "pretrained for 1000 epochs, the published one for 300"
    (unknown,) = [c for c in rows([result("linear-bt", {"top1": 7.0}, epochs=0)]).values() if c.ours]
    assert not unknown.difference and unknown.remark.startswith("pretrained for an unknown number of epochs, the pub")


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
    c = rows([result(protocol, {"top1": 72.0, "top5": 91.5}, epochs=1000, **more)])[LINEAR]
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
    c = found["Linear, ImageNet", "simclr", "linear top-1", 1000]
    assert c.difference == "" and "published protocol: SimCLR's own, 90 epochs of batch 4096" in c.remark
    found = rows([result("linear-avgpool", {"top1": 70.9, "top5": 89.9}, method="moco_v2", epochs=800)])
    assert found["Linear, ImageNet", "moco_v2", "linear top-1", 800].difference == "-0.20"


def test_seeds_are_averaged_of_one_checkpoint_and_setting():
    lines = [result("semisup-bt", {"top1": 90.0, "top5": 99.0}, fraction=0.01, checkpoint_sha256="old", seed=7)]
    lines += [result("semisup-bt", {"top1": t, "top5": 80.0}, fraction=0.01, seed=s) for s, t in ((0, 1.0), (0, 54.0))]
    lines += [result("semisup-bt", {"top1": 56.0, "top5": 80.0}, fraction=0.01, seed=1)]
    lines += [result("semisup-bt-modified", {"top1": 99.0, "top5": 99.0}, fraction=0.01, changed={"epochs": 9})]
    c = rows(lines)[ONE_PERCENT]
    assert c.ours == "55.00 ± 1.41 / 80.00 ± 0.00" and c.seeds == "0, 1" and c.seconds == 180.0
    assert c.difference == "" and "the paper's appendix B.2 has rates 0.002 and 0.5" in c.remark


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
    assert rows([result("transfer-places205", {"top1": 54.0}, epochs=1000, **places)])[row].difference == "-0.10"
    for share in ({"fraction": 0.1, "split": "balanced-0.1-seed0"}, {"fraction": None, "split": "5-shot-seed0"}):
        assert not rows([result("transfer-places205", {"top1": 54.0}) | places | share])[row].ours


def test_svms_and_transfer_are_compared_only_as_published(tmp_path):
    """A line from before there was a choice of stage and view was measured on the average pool of centre crops."""
    voc = {"classes": 20, "val_images": 4952, "train_images": 5011, "epochs": 1000}
    row = ("Transfer, linear", "barlow_twins", "VOC07, mAP (area)", 1000)
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
        assert ["step 9, checkpoint aaaaaaaa" in r for r in remarks] == [False, False, False, named]
        assert ["step 21, checkpoint bbbbbbbb" in r for r in remarks] == [named, named, named, False]


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
    c = found["CIFAR-10, ResNet-18", "barlow_twins", "online linear top-1", 1000]
    assert c.ours == "91.00" and c.difference == ""
    assert c.remark == (
        "pretrained for 300 epochs, the published one for 1000; published protocol: a linear layer trained beside the "
        "encoder, on its augmented views; published features: average pool of the encoder as it trains; published "
        "metric: online accuracy (offline 91.56); the same of our run is linear_top1 of metrics.jsonl, with --knn-every"
    )
    c = found["Detection and segmentation, R50-C4", "barlow_twins", "VOC07+12, AP/AP50/AP75", 1000]
    assert c.ours == "50.00 / 80.00 / 55.00" and c.difference == "" and "Detectron2" in c.remark
    assert "50000 val images, not 4952" in c.remark


def test_a_protocol_of_somebodys_own_stands_there_without_a_difference():
    found = rows([result("linear-mine", {"top1": 70.0}, method="simsiam", epochs=800)])
    c = found["Linear, ImageNet", "simsiam", "linear top-1", 800]
    assert c.ours == "70.00" and not c.difference and "published view: resize 256, centre crop 224" in c.remark


def test_duration():
    assert [duration(s) for s in (None, 5.4, 90, 7200)] == ["", "5 s", "1.5 min", "2.0 h"]
