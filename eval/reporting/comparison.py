"""Our results laid beside the published numbers.

A difference is given only where ours was measured by exactly the published protocol, on the published view, features
and metric, with the published architecture, pretrained for as many epochs, on the published dataset. Everything else
is shown with a remark that says what differs.
"""

import statistics
from dataclasses import dataclass

from eval.protocols import PROTOCOLS, Published, published_rows
from eval.reporting.page import TABLES
from pipeline.constants import IMAGENET_LIST_IMAGES

NAMED_BY_PROTOCOL = ("VOC07", "VOC07+12", "COCO")  # whose protocols use all labels, too


def duration(seconds: float | None) -> str:
    """12 s, 3.4 min, 2.1 h."""
    if seconds is None:
        return ""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


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

    @property
    def time(self) -> str:
        """How long ours took, for a person."""
        return duration(self.seconds)


def on_dataset(result: dict, published: Published) -> bool:
    """Whether a result was measured on a row's dataset, or on a part of it with all of its validation images."""
    known = published.dataset in NAMED_BY_PROTOCOL
    return known or [result["classes"], result["val_images"]] == published.images[:2]


def other_images(published: Published, result: dict) -> list[str]:
    """What is not the published choice of images."""
    _, val_images, train_images = published.images
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


def other_protocol(published: Published, result: dict) -> list[str]:
    """What of the measuring is not as published: settings, the protocol, its view, its features, its metric."""
    at_side = ("resolution_px", published.resolution_px)
    changed = {k: v for k, v in result["changed"].items() if (k, v) != at_side}
    remarks = ["modified: " + ", ".join(f"{key} {value}" for key, value in changed.items())] if changed else []
    name = result["protocol"].removesuffix("-modified")
    ours = {"protocol": name}
    if protocol := PROTOCOLS.get(name.removesuffix("-sweep")):
        ours |= {"view": protocol.view, "features": protocol.features, "metric": protocol.measure}
    if at_side in result["changed"].items():
        ours["view"] = published.view  # the protocol's words are of 224 px, where these images are smaller
    theirs = {what: getattr(published, what) for what in ("protocol", "view", "features", "metric")}
    return remarks + [f"published {what}: {text}" for what, text in theirs.items() if text != ours.get(what)]


def pretraining(published: Published, result: dict) -> tuple[str, bool]:
    """For how long the encoder was pretrained, for a person; whether that is the published number of epochs."""
    own = (
        f"pretrained for {result['epochs']} epochs"
        if result["epochs"]
        else "pretrained for an unknown number of epochs"
    )
    same = result["epochs"] == published.epochs
    return own + ("" if same else f", the published one for {published.epochs}"), same


def matching(published: Published, results: list[dict]) -> list[dict]:
    """Our newest results that belong in a row, one a seed, all of one checkpoint and one setting.

    A result that the published settings made is preferred to a newer one of modified settings.
    """

    def fits(r: dict) -> bool:
        name = r["protocol"].removesuffix("-modified")
        return (
            (name == published.protocol or (published.similar != "" and name.startswith(published.similar)))
            and r["encoder"] == "trained"
            and r["method"] == published.method
            and (published.dataset in NAMED_BY_PROTOCOL or r["fraction"] == published.fraction)
            and on_dataset(r, published)
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
    differs += other_protocol(published, last) + other_images(published, last)
    differs += [published.remark] if published.remark else []
    epochs, same_epochs = pretraining(published, last)
    remarks = [f"step {last['step']}, checkpoint {last['checkpoint_sha256'][:8]}"] if name_checkpoint else []
    same = same_epochs and not differs
    return Comparison(
        published,
        " / ".join(f"{m:.2f}" + (f" ± {s:.2f}" if s is not None else "") for m, s in zip(means, spreads, strict=True)),
        " / ".join(f"{m - p:+.2f}" for m, p in zip(means, published.values.values(), strict=True)) * same,
        last["protocol"],
        ", ".join(str(r["seed"]) for r in found),
        sum(r["seconds"] for r in found),
        "; ".join([epochs, *remarks, *differs]),
    )


def comparisons(results: list[dict]) -> dict[str, list[Comparison]]:
    """Every published row with ours, by table, in the order of published.toml.

    `results` are the lines of some runs' results.jsonl, oldest first, each with the `method` that made its encoder.
    Rows of several checkpoints name theirs.
    """
    found = [(published, matching(published, results)) for published in published_rows()]
    checkpoints = {r["checkpoint_sha256"] for _, ours in found for r in ours}
    tables: dict[str, list[Comparison]] = {}
    for published, ours in found:
        tables.setdefault(published.table, []).append(compare(published, ours, len(checkpoints) > 1))
    return tables


def comparison_markdown(results: list[dict]) -> str:
    """Every published table as Markdown, one row a published number, ours beside it."""
    return TABLES.beside_published(comparisons(results)).strip()
