"""The published numbers, each with what it was measured by, and how many images their datasets have.

eval/reporting/comparison.py lays our results beside them.
"""

from dataclasses import dataclass

BARLOW_TWINS = "Zbontar 2021"
MMSELFSUP = "MMSelfSup's Barlow Twins model card (barlowtwins_resnet50_8xb256-coslr-300e_in1k)"
SOLO_LEARN = "da Costa 2022 (solo-learn), CIFAR-10 table"
LIGHTLY = "lightly's CIFAR-10 benchmark"
JITTERED = "published with colour jitter in training besides"
METHOD_TITLES = {
    "barlow_twins": "Barlow Twins",
    "simclr": "SimCLR",
    "byol": "BYOL",
    "simsiam": "SimSiam",
    "supervised": "Supervised",
}


@dataclass(frozen=True)
class Published:
    """One published row.

    method    as config.json names it, or a method that this program does not train
    values    name among the `values` of our results → the published number
    protocol  our protocol with exactly the published settings; "" where we have none
    similar   beginnings of our protocols that may stand beside it, without a difference
    resolution_px   side of its views
    remark    what differs even where the protocol's settings are the published ones
    """

    table: str
    method: str
    what: str
    values: dict[str, float]
    source: str
    epochs: int | None = None
    protocol: str = ""
    similar: tuple[str, ...] = ()
    dataset: str = "ImageNet"
    arch: str = "resnet50"
    fraction: float | None = 1.0
    resolution_px: int = 224
    remark: str = ""


def _linear(method, top1, top5=None, epochs=None, source=f"{BARLOW_TWINS}, table 1"):
    values = {"top1": top1} | ({"top5": top5} if top5 else {})
    what = "linear top-1" + "/top-5" * bool(top5)
    return Published("Linear, ImageNet", method, what, values, source, epochs, "linear-bt")


def _semisup(method, percent, top1, top5=None, epochs=None):
    values = {"top1": top1} | ({"top5": top5} if top5 else {})
    what = f"{percent} % labels, top-1" + "/top-5" * bool(top5)
    table, source = "Semi-supervised, ImageNet", f"{BARLOW_TWINS}, table 2"
    return Published(table, method, what, values, source, epochs, "semisup-bt", fraction=percent / 100)


def _mmselfsup(what, values, protocol, remark=""):
    table = "MMSelfSup, ImageNet, 300 epochs"
    return Published(table, "barlow_twins", what, values, MMSELFSUP, 300, protocol, remark=remark)


def _transfer(what, value, protocol, dataset):
    source = f"{BARLOW_TWINS}, table 3"
    return Published("Transfer, linear", "barlow_twins", what, value, source, 1000, protocol, dataset=dataset)


def _detection(what, values, protocol, dataset):
    return Published(
        "Detection and segmentation, R50-C4",
        "barlow_twins",
        what,
        values,
        f"{BARLOW_TWINS}, table 4",
        1000,
        protocol,
        dataset=dataset,
        fraction=None,
        remark="torchvision's detector, published with Detectron2's",
    )


PUBLISHED = (
    _linear("barlow_twins", 73.2, 91.0, 1000),
    _linear("barlow_twins", 71.4, 90.2, 300, f"{BARLOW_TWINS}, section 4"),
    *(
        _linear(method, top1)
        for method, top1 in {
            "supervised": 76.5,
            "MoCo": 60.6,
            "PIRL": 63.6,
            "simclr": 69.3,
            "MoCo v2": 71.1,
            "simsiam": 71.3,
            "SwAV": 71.8,
            "SwAV, multi-crop": 75.3,
            "byol": 74.3,
        }.items()
    ),
    _semisup("barlow_twins", 1, 55.0, 79.2, 1000),
    _semisup("barlow_twins", 10, 69.7, 89.3, 1000),
    *(
        _semisup(method, percent, top1)
        for percent, row in {
            1: {"supervised": 25.4, "simclr": 48.3, "byol": 53.2, "SwAV": 53.9},
            10: {"supervised": 56.4, "simclr": 65.6, "byol": 68.8, "SwAV": 70.2},
        }.items()
        for method, top1 in row.items()
    ),
    *(
        _mmselfsup(f"Feature{i}, linear top-1", {f"feature{i}_top1": top1}, "heads-mmselfsup", JITTERED)
        for i, top1 in enumerate((15.51, 33.98, 45.96, 61.90, 71.01), 1)
    ),
    _mmselfsup("AvgPool, linear top-1", {"top1": 71.66}, "linear-avgpool"),
    *(
        _mmselfsup(f"kNN top-1, k = {k}", {f"top1_k{k}": top1}, "knn-mmselfsup")
        for k, top1 in {10: 63.6, 20: 63.8, 100: 62.7, 200: 61.9}.items()
    ),
    _transfer("VOC07, mAP", {"map": 86.2}, "svm-voc07", "VOC07"),
    _transfer("Places205, top-1", {"top1": 54.1}, "transfer-places205", "Places205"),
    _transfer("iNaturalist 2018, top-1", {"top1": 46.5}, "transfer-inat18", "iNat18"),
    _detection("VOC07+12, AP/AP50/AP75", {"AP": 56.8, "AP50": 82.6, "AP75": 63.4}, "detection-voc0712", "VOC07+12"),
    _detection("COCO box AP/AP50/AP75", {"AP": 39.2, "AP50": 59.0, "AP75": 42.5}, "detection-coco", "COCO"),
    _detection(
        "COCO mask AP/AP50/AP75", {"mask_AP": 34.3, "mask_AP50": 56.0, "mask_AP75": 36.5}, "detection-coco", "COCO"
    ),
    Published(
        "CIFAR-10, ResNet-18",
        "barlow_twins",
        "linear top-1",
        {"top1": 92.10},
        SOLO_LEARN,
        1000,
        similar=("linear",),
        dataset="CIFAR-10",
        arch="resnet18",
        resolution_px=32,
    ),
    Published(
        "CIFAR-10, ResNet-18",
        "barlow_twins",
        "kNN top-1, k = 200",
        {"top1_k200": 84.2},
        LIGHTLY,
        200,
        similar=("knn",),
        dataset="CIFAR-10",
        arch="resnet18",
        resolution_px=32,
    ),
)

# Classes, validation images and training images. By the first two a result's own record tells some datasets, whatever
# their folders are called; the protocols of the others name theirs, and of COCO only images with an object train.
# Sources: ILSVRC 2012; CIFAR-10; Places205 (Zhou 2014); iNaturalist 2018 (Van Horn 2018); PASCAL VOC; COCO 2017.
SIZES = {
    "ImageNet": (1000, 50_000, 1_281_167),
    "CIFAR-10": (10, 10_000, 50_000),
    "Places205": (205, 20_500, 2_448_873),
    "iNat18": (8142, 24_426, 437_513),
    "VOC07": (20, 4952, 5011),
    "VOC07+12": (20, 4952, 16_551),
    "COCO": (80, 5000, 117_266),
}
NAMED_BY_PROTOCOL = ("VOC07", "VOC07+12", "COCO")


def published_text(published: Published) -> str:
    return " / ".join(f"{v:.1f}" if round(v, 1) == v else f"{v:.2f}" for v in published.values.values())


def method_title(published: Published) -> str:
    title = METHOD_TITLES.get(published.method, published.method)
    return f"{title}, {published.epochs} epochs" if published.epochs else title
