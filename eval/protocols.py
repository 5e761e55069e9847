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
    """One published row.

    table     the heading it stands under
    method    as config.json names it, or a method that this program does not train
    values    name among the `values` of our results → the published number
    protocol  our protocol with exactly the published settings; "" where we have none
    similar   beginning of our protocols that may stand beside it, without a difference; "" for none
    fraction  share of the training labels
    remark    what differs even where the protocol's settings are the published ones
    """

    table: str
    method: str
    what: str
    values: dict[str, float]
    source: str
    epochs: int | None = None
    protocol: str = ""
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
        """The numbers with the places they are published with."""
        return " / ".join(f"{v:.1f}" if round(v, 1) == v else f"{v:.2f}" for v in self.values.values())


@dataclass(frozen=True)
class Protocol:
    """One way of measuring.

    settings    the published ones by name, as a result records them
    metric      which of a result's values is the headline
    milestones  epochs, of detection iterations, after which the learning rate falls to a tenth; (): it has none
    """

    name: str
    settings: dict
    metric: str = "top1"
    milestones: tuple[int, ...] = ()

    @property
    def published(self) -> list[Published]:
        """The published numbers that were measured by exactly this protocol."""
        return [row for row in published_rows() if row.protocol == self.name]

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


def _trained(name: str, epochs: int, lr: float, weight_decay: float, milestones=(), metric="top1", **more) -> Protocol:
    """A protocol that trains classifiers on a frozen encoder by SGD, 256 images a step."""
    settings = {"epochs": epochs, "batch": 256, "lr": lr, "weight_decay": weight_decay}
    return Protocol(name, settings | more | ON_FEATURES, metric, milestones)


KNN = Protocol(
    "knn-mmselfsup",
    {"neighbours": list(KNN_NEIGHBOURS), "temperature": KNN_TEMPERATURE} | ON_FEATURES,
    metric=f"top1_k{KNN_HEADLINE}",
)
LINEAR_BT = _trained("linear-bt", 100, 0.3, 1e-6)
LINEAR_AVGPOOL = _trained("linear-avgpool", 100, 30.0, 0.0, (60, 80))
LINEAR_CACHED = _trained("linear-cached", 30, 3.0, 1e-6)
HEADS = _trained("heads-mmselfsup", 90, 0.01, 1e-4, (60, 80), metric="feature5_top1", pooling="as published")
SEMISUP = Protocol(
    "semisup-bt",
    {"epochs": 20, "batch": 256, "lr_backbone": 0.005, "lr_classifier": 0.5, "weight_decay": 0.0} | ON_FEATURES,
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
)
TRANSFER = {
    "places205": _trained("transfer-places205", 14, 0.01, 5e-4, (4, 8, 12), **STAGE),
    "inat18": _trained("transfer-inat18", 84, 0.01, 5e-4, (24, 48, 72), **STAGE),
    "folder": _trained("transfer-folder", 14, 0.01, 5e-4, (4, 8, 12), **STAGE),
}


def _detection(name: str, train: str, lr: float, smallest_px: int, iterations: int, milestones) -> Protocol:
    settings = {"train": train, "iterations": iterations, "batch": 16, "lr": lr, "warmup": 1000}
    settings |= {"sizes_px": list(range(smallest_px, 801, 32)), "rois": 512, "precise_bn": 200}
    return Protocol(name, settings, "AP", milestones)


DETECTION = {
    "voc": _detection(
        "detection-voc0712", "VOC2007 trainval+VOC2012 trainval", 0.1, 480, 24_000, milestones=(18_000, 22_000)
    ),
    "coco": _detection("detection-coco", "COCO train2017", 0.03, 640, 90_000, milestones=(60_000, 80_000)),
}
