"""Where the points of small charts lie, which parts.html draws, and the curves of a run."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from markupsafe import Markup

from eval.reporting.page import PARTS
from pipeline.disk import read_lines
from pipeline.errors import UserError
from train.sinks import TITLES, is_number

WIDTH, HEIGHT = 340, 210  # the view box, px; a chart fills the width of its place, a phone's or a third of a desk's
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 30, 34
CURVES = TITLES | {
    "on_diagonal": "Σ (C_ii − 1)²",
    "off_diagonal": "Σ C_ij², i ≠ j",
    "lr_weights": "learning rate, weights",
    "lr_biases": "learning rate, biases",
    "images_per_s": "images/s",
    "data_wait_share": "share of time waiting for data",
}
MAP_PX, MAP_MARGIN_PX = 400, 6
MOST_POINTS = 400  # of a curve; more cannot be told apart at this width


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers that cover [low, high]; low < high."""
    rough = (high - low) / count
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= rough)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def tick_text(value: float) -> str:
    """Short: 0.05, 12, 3.4k, 1e-06."""
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:.4g}" if abs(value) >= 1e-4 or abs(value) < 1e-12 else f"{value:.0e}"


def thinned(values: Sequence) -> list:
    """At most MOST_POINTS of them, evenly, the last one always among them."""
    step = max(1, -(-len(values) // MOST_POINTS))
    return [*values[:-1:step], values[-1]]


def span(values: Iterable[float]) -> tuple[float, float]:
    """Smallest and largest, widened where they are equal."""
    values = list(values)
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - (abs(low) or 1) * 0.1, high + (abs(high) or 1) * 0.1)


def line_chart(title: str, x_title: str, xs: Sequence[float], ys: Sequence[float]) -> Markup:
    """One curve. A value that is not finite interrupts nothing: it is left out. Needs one finite value."""
    points = thinned([(x, y) for x, y in zip(xs, ys, strict=True) if math.isfinite(y)])
    (x0, x1), (y0, y1) = (span(axis) for axis in zip(*points, strict=True))

    def to_x(x: float) -> float:
        return LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)

    def to_y(y: float) -> float:
        return HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)

    return PARTS.line_chart(
        (WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM),
        title,
        x_title,
        [(to_x(x), tick_text(x)) for x in nice_ticks(x0, x1)],
        [(to_y(y), tick_text(y)) for y in nice_ticks(y0, y1)],
        [(to_x(x), to_y(y)) for x, y in points],
        f"{points[-1][1]:.4g}",
    )


def scatter(points: Sequence[Sequence[float]], labels: Sequence[int], names: Sequence[str]) -> Markup:
    """(n, 2) points coloured by label, an index into at most ten names, with a legend below."""
    (x0, x1), (y0, y1) = (span(axis) for axis in zip(*points, strict=True))
    scale = MAP_PX - 2 * MAP_MARGIN_PX
    placed = [
        (MAP_MARGIN_PX + (x - x0) / (x1 - x0) * scale, MAP_MARGIN_PX + (y - y0) / (y1 - y0) * scale, label)
        for (x, y), label in zip(points, labels, strict=True)
    ]
    return PARTS.scatter(MAP_PX, placed, names)


def curves(run: Path) -> str:
    """Every number of metrics.jsonl over the epochs. A step that fp16 skipped has null in place of some."""
    path = run / "metrics.jsonl"
    lines = [line for line in (read_lines(path) if path.is_file() else []) if is_number(line.get("epoch"))]
    if not lines:
        raise UserError(f"{path} has no line: this run was not trained here, or for no step")
    names = dict.fromkeys(name for line in lines for name in line if name not in ("step", "epoch"))
    points = {n: [(line["epoch"], line[n]) for line in lines if is_number(line.get(n))] for n in names}
    drawn = [line_chart(CURVES.get(n, n), "epoch", *zip(*found, strict=True)) for n, found in points.items() if found]
    return PARTS.curves(drawn, lines[-1].get("step"), [CURVES.get(n, n) for n, found in points.items() if not found])
