"""The numbers of metrics.jsonl for a reader: which belong together, what is healthy, and how a curve is drawn.

loss.png at the end of a run and the charts of eval/report.py both come from here.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeGuard

from pipeline.disk import read_lines, whole_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_POINTS = 400  # of a curve; more cannot be told apart at a chart's width
LARGEST = 1e100  # of a number in a record; beyond it sums and axes overflow
Points = list[tuple[float, float]]  # (epoch, value)


class Quantity(NamedTuple):
    """What a number of metrics.jsonl says.

    title     with its unit
    healthy   what a good run has, in words; "" where that cannot be said
    band      the healthy values, which charts shade; None where they are no range
    factor    from the file's number to the one that is shown
    """

    title: str
    healthy: str = ""
    band: tuple[float, float] | None = None
    factor: float = 1.0


GROUPS: dict[str, dict[str, Quantity]] = {
    "Loss": {
        "loss": Quantity("loss", "falls; MoCo v2's rises at first"),
        "on_diagonal": Quantity("Σ (C_ii − 1)²", "falls towards 0"),
        "off_diagonal": Quantity("Σ C_ij², i ≠ j", "falls, after a rise at the start"),
        "invariance": Quantity("invariance term", "falls"),
        "variance": Quantity("variance term", "falls"),
        "covariance": Quantity("covariance term", "stays small"),
    },
    "Collapse": {
        "diagonal_mean": Quantity("mean of C's diagonal", "rises towards 1: both views agree"),
        "off_diagonal_rms": Quantity("RMS of C off the diagonal", "falls towards 0: no dimension repeats another"),
        "embedding_spread": Quantity("spread of the embeddings", "about 1; at 0 all are one point", (0.5, 1.0)),
        "effective_dimensions": Quantity(
            "effective dimensions", "well above 2; at 1 all are on a line", (2.0, math.inf)
        ),
    },
    "Accuracy in training": {
        "knn_top1": Quantity("kNN top-1, %", "rises"),
        "linear_top1": Quantity("online linear top-1, %", "rises"),
        "twin_top1": Quantity("twin view found first, %", "rises; MoCo v2's falls at first", factor=100),
        "prototype_top1": Quantity("twin view's prototype found first, %", "rises", factor=100),
    },
    "Steps": {
        "gradient_norm": Quantity("norm of the gradient", "falls or stays; no jumps"),
        "lr_weights": Quantity("learning rate of the weights"),
        "lr_biases": Quantity("learning rate of the biases"),
        "lr_predictor": Quantity("learning rate of the predictor"),
        "lr_prototypes": Quantity("learning rate of the prototypes"),
        "skipped_steps": Quantity("steps without an update", "0", (0.0, 0.0)),
        "substituted_images": Quantity("images that stand in for damaged ones", "0", (0.0, 0.0)),
    },
    "Speed": {
        "images_per_s": Quantity("images a second", "steady"),
        "data_wait_share": Quantity("waiting for data, % of the time", "under 5", (0.0, 5.0), 100),
    },
}
OTHERS = "Other numbers"
QUANTITIES = {name: quantity for group in GROUPS.values() for name, quantity in group.items()}
IN_PICTURE = ("loss", *GROUPS["Collapse"], "knn_top1", "linear_top1")  # what loss.png shows of a run


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value of a JSON line is a number that can be drawn and calculated with."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


def read_curves(metrics: Path) -> dict[str, Points]:
    """The points of every number in metrics.jsonl, as they are shown; [] for one that was never finite.

    A line without an epoch counts for nothing, a null (a step that fp16 left out) is no point.
    """
    lines = [line for line in (read_lines(metrics) if metrics.is_file() else []) if is_number(line.get("epoch"))]
    names = dict.fromkeys(name for line in lines for name in line if name not in ("step", "epoch", "knn_images"))
    factors = {name: QUANTITIES.get(name, Quantity(name)).factor for name in names}
    return {
        name: [(float(line["epoch"]), factors[name] * float(line[name])) for line in lines if is_number(line.get(name))]
        for name in names
    }


def grouped(names: Iterable[str]) -> dict[str, list[str]]:
    """Names by group, in the order of GROUPS; what a new method adds comes last."""
    names = list(names)
    found = {group: [name for name in known if name in names] for group, known in GROUPS.items()}
    found[OTHERS] = [name for name in names if name not in QUANTITIES]
    return {group: known for group, known in found.items() if known}


def thinned(points: Points) -> Points:
    """At most MOST_POINTS of them and the last one, evenly."""
    step = max(1, -(-len(points) // MOST_POINTS))
    return [*points[:-1:step], points[-1]]


def draw_curves(axes: "Axes", name: str, curves: Iterable[tuple[Points, str | None]]) -> None:
    """Curves (points, colour) of one number over the epochs, and where healthy values lie; few points are marked."""
    for points, colour in curves:
        marker = "o" if len(points) < 3 else None
        axes.plot(*zip(*thinned(points), strict=True), linewidth=1.4, marker=marker, markersize=4, color=colour)
    axes.set_xlabel("epoch")
    axes.grid(True)
    band = QUANTITIES.get(name, Quantity(name)).band
    if band:
        axes.update_datalim([(axes.dataLim.x0, band[0])])  # the axis reaches it, so that a run far below shows as that
        axes.autoscale_view()
        low, high = axes.get_ylim()
        axes.axhspan(band[0], min(band[1], high), color="#1a7437", alpha=0.1, linewidth=0)
        axes.set_ylim(low, high)


def plot_loss(metrics: Path) -> None:
    """Draws loss.png beside metrics.jsonl: the loss, what shows a collapse, and the accuracy if it was measured."""
    curves = {name: points for name, points in read_curves(metrics).items() if points and name in IN_PICTURE}
    if not curves:
        return
    from matplotlib.figure import Figure  # most of a second, and only the end of a run needs it

    figure = Figure(figsize=(4 * len(curves), 3.5), layout="constrained")
    axes = figure.subplots(1, len(curves), squeeze=False)[0]
    for axis, name in zip(axes, [name for name in IN_PICTURE if name in curves], strict=True):
        draw_curves(axis, name, [(curves[name], None)])
        axis.set_title(QUANTITIES[name].title)
    with whole_file(metrics.with_name("loss.png")) as file:
        figure.savefig(file, format="png", dpi=110)
