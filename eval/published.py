"""The published numbers, each with what it was measured by, and our results laid beside them.

A difference is given only where ours was measured by exactly the published protocol on the published dataset with
the published architecture. Everything else is shown with a remark that says what differs.
"""

import statistics
from dataclasses import dataclass

from pipeline.constants import IMAGENET_LIST_IMAGES

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


@dataclass(frozen=True)
class Comparison:
    """A published row and ours as text; "" where there is none."""

    published: Published
    ours: str = ""
    difference: str = ""
    protocol: str = ""
    seeds: str = ""
    seconds: float | None = None
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


def on_dataset(result: dict, dataset: str) -> bool:
    """Whether a result was measured on a published dataset, or on a part of it with all of its validation images."""
    return dataset in NAMED_BY_PROTOCOL or (result["classes"], result["val_images"]) == SIZES[dataset][:2]


def other_images(published: Published, result: dict) -> list[str]:
    """What is not the published choice of images."""
    _, val_images, train_images = SIZES[published.dataset]
    remarks = []
    if published.fraction in (0.01, 0.1):
        percent = round(100 * published.fraction)
        train_images = IMAGENET_LIST_IMAGES[percent]
        if result["split"] != f"imagenet-{percent}percent":
            remarks.append(f"other labelled images than SimCLR's {percent} % ({result['split']})")
    for what, expected in (("train_images", train_images), ("val_images", val_images)):
        if result[what] != expected:
            remarks.append(f"{result[what]} {what.replace('_', ' ')}, not {expected}")
    return remarks


def matching(published: Published, results: list[dict]) -> list[dict]:
    """Our newest results that belong in a row, one a seed, all of one checkpoint and one setting.

    A result that the published settings made is preferred to a newer one of modified settings.
    """

    def fits(r: dict) -> bool:
        name = r["protocol"].removesuffix("-modified")
        return (
            (name == published.protocol or name.startswith(published.similar))
            and r["encoder"] == "trained"
            and r["method"] == published.method
            and (published.fraction is None or r["fraction"] == published.fraction)
            and on_dataset(r, published.dataset)
            and all(key in r["values"] for key in published.values)
        )

    found = [r for r in results if fits(r)]
    chosen = [r for r in found if r["protocol"] == published.protocol and r["arch"] == published.arch] or found
    if not chosen:
        return []

    def same(r: dict) -> tuple:
        return r["checkpoint_sha256"], r.get("key", ""), r["protocol"], r["changed"], r["dataset_sha256"]

    by_seed = {one["seed"]: one for r in chosen if same(r) == same(chosen[-1]) for one in single_seeds(r)}
    return list(by_seed.values())


def single_seeds(result: dict) -> list[dict]:
    """A result as one a seed: of several seeds, the line's details hold each one's values."""
    seeds = result["details"].get("seeds") or [result["values"] | {"seed": result["seed"]}]
    return [result | {"seed": s["seed"], "values": s, "seconds": result["seconds"] / len(seeds)} for s in seeds]


def compare(published: Published, found: list[dict], name_checkpoint: bool) -> Comparison:
    """A published row and our results that belong in it, one a seed; `name_checkpoint`: with whose they are."""
    if not found:
        return Comparison(published)
    last, count = found[-1], len(found)
    means = [statistics.fmean(r["values"][key] for r in found) for key in published.values]
    spreads = [statistics.stdev(r["values"][key] for r in found) if count > 1 else None for key in published.values]
    differs = [last["arch"]] if last["arch"] != published.arch else []
    changed = {k: v for k, v in last["changed"].items() if (k, v) != ("resolution_px", published.resolution_px)}
    if changed:
        differs.append("modified: " + ", ".join(f"{key} {value}" for key, value in changed.items()))
    if last["protocol"].removesuffix("-modified") != published.protocol:
        differs.append("another protocol than the published one")
    differs += other_images(published, last) + ([published.remark] if published.remark else [])
    remarks = [f"pretrained for {last['epochs']} epochs"] if last["epochs"] else []
    remarks += [f"step {last['step']}, checkpoint {last['checkpoint_sha256'][:8]}"] if name_checkpoint else []
    return Comparison(
        published,
        " / ".join(f"{m:.2f}" + (f" ± {s:.2f}" if s is not None else "") for m, s in zip(means, spreads, strict=True)),
        " / ".join(f"{m - p:+.2f}" for m, p in zip(means, published.values.values(), strict=True)) * (not differs),
        last["protocol"],
        ", ".join(str(r["seed"]) for r in found),
        sum(r["seconds"] for r in found),
        "; ".join(remarks + differs),
    )


def comparisons(results: list[dict]) -> dict[str, list[Comparison]]:
    """Every published row with ours, by table, in the order above. `results`: the lines of some runs' results.jsonl,
    oldest first, each with the `method` that made its encoder. Rows of several checkpoints name theirs."""
    found = [(published, matching(published, results)) for published in PUBLISHED]
    checkpoints = {r["checkpoint_sha256"] for _, ours in found for r in ours}
    tables: dict[str, list[Comparison]] = {}
    for published, ours in found:
        tables.setdefault(published.table, []).append(compare(published, ours, len(checkpoints) > 1))
    return tables


def published_text(published: Published) -> str:
    return " / ".join(f"{v:.1f}" if round(v, 1) == v else f"{v:.2f}" for v in published.values.values())


def method_title(published: Published) -> str:
    title = METHOD_TITLES.get(published.method, published.method)
    return f"{title}, {published.epochs} epochs" if published.epochs else title


def duration(seconds: float | None) -> str:
    """12 s, 3.4 min, 2.1 h."""
    if seconds is None:
        return ""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def comparison_markdown(results: list[dict]) -> str:
    """Every published table as Markdown, one row a published number, ours beside it."""
    head = "| method | evaluation | ours | published | difference | protocol | seeds | time | remark |"
    parts = []
    for table, rows in comparisons(results).items():
        lines = [f"### {table}", "", head, "|" + "---|" * 9]
        for c in rows:
            p = c.published
            first = (method_title(p), p.what, c.ours or "not measured", published_text(p), c.difference or "–")
            lines.append("| " + " | ".join((*first, c.protocol, c.seeds, duration(c.seconds), c.remark)) + " |")
        sources = "; ".join(dict.fromkeys(c.published.source for c in rows))
        parts.append("\n".join([*lines, "", f"Published: {sources}."]))
    return "\n\n".join(parts)
