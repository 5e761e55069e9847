"""Every protocol as one object: its name, its published settings, and the published numbers of it.

A result counts as a protocol's own only where every setting is the published one; else its name ends in "-modified"
and the result says which settings differ. Two settings belong to all protocols on features: views of 224 px, and
features kept as float32. So a result of CIFAR-10, at 32 px, is a modified one. The decoder is recorded and not
compared, because no published protocol names one and those of the CPU agree bit for bit. Normalization is the
encoder's own, and the share of the labels is a value of its own, `fraction`.

Sources of the settings: each evaluation's file. The published numbers are in published.toml.
"""

import functools
import tomllib
from dataclasses import dataclass
from pathlib import Path

from train.knn_vote import KNN_HEADLINE, KNN_NEIGHBOURS, KNN_TEMPERATURE


@functools.cache
def published_file() -> dict:
    """What published.toml holds: tables of numbers, the methods' titles, the datasets' sizes."""
    return tomllib.loads(Path(__file__).with_name("published.toml").read_text("utf-8"))


@dataclass(frozen=True)
class Published:
    """One published row, with all that decides whether a number of ours may be compared with it.

    table     the heading it stands under
    method    as config.json names it, or a method that this program does not train
    values    name among the `values` of our results → the published number
    protocol  our protocol with exactly the published settings; in words where we have none
    epochs    of pretraining; 0: there was none
    view      what the encoder saw of a validation image; this and the next two as `Protocol` has them
    features  what was classified or fine-tuned
    metric    what kind of number it is
    source    where it stands
    similar   beginning of our protocols that may stand beside it, without a difference; "" for none
    fraction  share of the training labels
    remark    what differs even where all of these are ours
    """

    table: str
    method: str
    what: str
    values: dict[str, float]
    protocol: str
    epochs: int
    view: str
    features: str
    metric: str
    source: str
    similar: str = ""
    dataset: str = "ImageNet"
    arch: str = "resnet50"
    fraction: float = 1.0
    resolution_px: int = 224
    remark: str = ""

    @property
    def images(self) -> list[int]:
        """How many classes, validation images and training images the dataset has."""
        return published_file()["sizes"][self.dataset]

    @property
    def title(self) -> str:
        """The method, and for how long it was pretrained."""
        title = published_file()["titles"].get(self.method, self.method)
        return f"{title}, {self.epochs} epochs" if self.epochs else title

    @property
    def text(self) -> str:
        """The numbers, with two places where one is not enough."""
        return " / ".join(f"{v:.1f}" if round(v, 1) == v else f"{v:.2f}" for v in self.values.values())


@dataclass(frozen=True)
class Protocol:
    """One way of measuring.

    settings    the published ones by name, as a result records them
    metric      which of a result's values is the headline
    view        in words, what the encoder sees of a validation image
    features    in words, what is classified or fine-tuned
    measure     in words, what kind of number the values are
    milestones  epochs, of detection iterations, after which the learning rate falls to a tenth; (): it has none
    """

    name: str
    settings: dict
    metric: str = "top1"
    milestones: tuple[int, ...] = ()
    view: str = "resize 256, centre crop 224"
    features: str = "average pool"
    measure: str = "accuracy"

    def with_flags(self, config) -> dict:
        """The published settings, but those that `config` has as an attribute other than None from there."""
        given = {name: getattr(config, name, None) for name in self.settings}
        return self.settings | {name: value for name, value in given.items() if value is not None}

    def milestones_at(self, length: int) -> tuple[int, ...]:
        """The milestones at the same shares of a training of another length, in epochs (detection: iterations)."""
        published = self.settings["iterations" if "iterations" in self.settings else "epochs"]
        return tuple(round(milestone * length / published) for milestone in self.milestones)

    def compared(self, settings: dict) -> tuple[str, dict]:
        """The name of a result with these settings, and those of them that are not the published ones."""
        changed = {name: value for name, value in settings.items() if value != self.settings[name]}
        return self.name + "-modified" * bool(changed), changed


@functools.cache
def published_rows() -> tuple[Published, ...]:
    """Every published number, in the order of the report."""
    rows = []
    for table in published_file()["table"]:
        shared = {name: value for name, value in table.items() if name not in ("title", "row")}
        rows += [Published(**{"table": table["title"]} | shared | row) for row in table["row"]]
    return tuple(rows)


ON_FEATURES = {"resolution_px": 224, "feature_type": "float32"}
RES5 = "res5, pooled to 2 × 2"


def _trained(
    name: str,
    epochs: int,
    lr: float,
    weight_decay: float,
    milestones=(),
    *,
    metric="top1",
    features=Protocol.features,
    **more,
) -> Protocol:
    """A protocol that trains classifiers on a frozen encoder by SGD, 256 images a step; `more` are settings."""
    settings = {"epochs": epochs, "batch": 256, "lr": lr, "weight_decay": weight_decay}
    return Protocol(name, settings | more | ON_FEATURES, metric, milestones, features=features)


KNN = Protocol(
    "knn-mmselfsup",
    {"neighbours": list(KNN_NEIGHBOURS), "temperature": KNN_TEMPERATURE} | ON_FEATURES,
    metric=f"top1_k{KNN_HEADLINE}",
)
LINEAR_BT = _trained("linear-bt", 100, 0.3, 1e-6)
LINEAR_AVGPOOL = _trained("linear-avgpool", 100, 30.0, 0.0, (60, 80))
LINEAR_CACHED = _trained("linear-cached", 30, 3.0, 1e-6)
HEADS = _trained(
    "heads-mmselfsup",
    90,
    0.01,
    1e-4,
    (30, 60),
    metric="feature5_top1",
    features="stage maps, pooled",
    pooling="as published",
    jitter=[0.4, 0.4, 0.4, 0.0],  # of brightness, contrast, saturation and hue, on every image
    lighting=0.1,
)
SEMISUP = Protocol(
    "semisup-bt",
    {"epochs": 20, "batch": 256, "norm_images": 32, "lr_backbone": 0.005, "lr_classifier": 0.5, "weight_decay": 0.0}
    | ON_FEATURES,
)
# VISSL's configurations of VOC07, Places205 and iNaturalist 2018 classify the pooled maps of five stages; the published
# number is the last one's, "feature5" (PIRL's 49.8 on Places205 is res5's in its table 7, and the paper of Barlow Twins
# follows PIRL: appendix C.1).
STAGE = {"stage": "feature5", "pooling": "as published"}
SVM = Protocol(
    "svm-voc07",
    {
        "view": "squash",
        "costs": [0.01, 0.1, 1.0, 2.0, 5.0, 10.0, 15.0, 20.0, 50.0, 100.0, 1000.0],
        "folds": 3,
        "low_shot_k": [1, 2, 4, 8, 16, 32, 64, 96],
        "low_shot_samples": 5,
    }
    | STAGE
    | ON_FEATURES,
    metric="map_area",
    view="whole image squashed to 224",
    features=RES5,
    measure="mAP as the area under the curve",
)
TRANSFER = {
    "places205": _trained("transfer-places205", 14, 0.01, 5e-4, (4, 8, 12), features=RES5, **STAGE),
    "inat18": _trained("transfer-inat18", 84, 0.01, 5e-4, (24, 48, 72), features=RES5, **STAGE),
    "folder": _trained("transfer-folder", 14, 0.01, 5e-4, (4, 8, 12), features=RES5, **STAGE),
}


def _detection(
    name: str, train: str, *, lr: float, warmup_from: float, smallest_px: int, iterations: int, milestones, measure: str
) -> Protocol:
    settings = {"train": train, "iterations": iterations, "batch": 16, "lr": lr, "warmup": 1000}
    settings["warmup_from"] = warmup_from
    settings |= {"sizes_px": list(range(smallest_px, 801, 32)), "rois": 512, "precise_bn": 200}
    view, features = "shorter side 800", "C4 body, fine-tuned"
    return Protocol(name, settings, "AP", milestones, view, features, measure)


DETECTION = {
    "voc": _detection(
        "detection-voc0712",
        "VOC2007 trainval+VOC2012 trainval",
        lr=0.1,
        warmup_from=0.3333,
        smallest_px=480,
        iterations=24_000,
        milestones=(18_000, 22_000),
        measure="AP as Detectron2 measures VOC",
    ),
    "coco": _detection(
        "detection-coco",
        "COCO train2017",
        lr=0.03,
        warmup_from=0.001,
        smallest_px=640,
        iterations=90_000,
        milestones=(60_000, 80_000),
        measure="AP as pycocotools measures it",
    ),
}
PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        KNN,
        LINEAR_BT,
        LINEAR_AVGPOOL,
        LINEAR_CACHED,
        HEADS,
        SEMISUP,
        SVM,
        *TRANSFER.values(),
        *DETECTION.values(),
    )
}
# What older lines of these protocols do not say: they were measured before there was a choice.
OLDER_SETTINGS: dict[str, dict] = {
    "heads-mmselfsup": {"jitter": [0.0, 0.0, 0.0, 0.0], "lighting": 0.0},
    "semisup-bt": {"norm_images": 0},
    "svm-voc07": {"stage": "output", "view": "centre"},
    **{protocol.name: {"stage": "output"} for protocol in TRANSFER.values()},
    **{protocol.name: {"warmup_from": 0.001} for protocol in DETECTION.values()},
}


def with_all_settings(result: dict) -> dict:
    """A line from before some settings were compared, as it would be written today."""
    name, settings = result["protocol"].removesuffix("-modified"), result["settings"]
    shared = {name: result[name] for name in ON_FEATURES} if "feature_type" in result else {}  # detection has none
    older = {key: value for key, value in (shared | OLDER_SETTINGS.get(name, {})).items() if key not in settings}
    published = ON_FEATURES | (PROTOCOLS[name].settings if name in PROTOCOLS else {})
    changed = result["changed"] | {key: value for key, value in older.items() if value != published[key]}
    name += "-modified" * bool(changed)
    if name.startswith(SVM.name) and result["metric"] == "map" and "map_area" in result["values"]:
        result = result | {"metric": SVM.metric, "value": result["values"][SVM.metric]}
    return result | {"protocol": name, "changed": changed, "settings": settings | older}
