"""Small charts as SVG text that takes its colours from the page around it, so that they read in light and in dark."""

import html
import math
from collections.abc import Iterable, Sequence

WIDTH, HEIGHT = 340, 210  # the view box, px; a chart fills the width of its place, a phone's or a third of a desk's
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 30, 34
MOST_POINTS = 400  # of a curve; more cannot be told apart at this width
COLOURS = 10  # --c0 … --c9 in the page's style


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


def axes(title: str, x_title: str, x_span: tuple[float, float], y_span: tuple[float, float]) -> tuple[str, list]:
    """Grid, ticks and titles as SVG, and the two functions from data to px."""
    (x0, x1), (y0, y1) = x_span, y_span

    def to_x(x: float) -> float:
        return LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)

    def to_y(y: float) -> float:
        return HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<text class="t" x="2" y="16">{html.escape(title)}</text>']
    for y in nice_ticks(y0, y1):
        parts.append(f'<path class="g" d="M{LEFT} {to_y(y):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="e" x="{LEFT - 5}" y="{to_y(y) + 3.5:.1f}">{tick_text(y)}</text>')
    for x in nice_ticks(x0, x1):
        parts.append(f'<text class="m" x="{to_x(x):.1f}" y="{HEIGHT - BOTTOM + 14}">{tick_text(x)}</text>')
    parts.append(f'<text class="m" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}">{html.escape(x_title)}</text>')
    return "".join(parts), [to_x, to_y]


def svg(content: str, label: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(label)}">{content}</svg>'


def line_chart(title: str, x_title: str, xs: Sequence[float], ys: Sequence[float]) -> str:
    """One curve. A value that is not finite interrupts nothing: it is left out. Needs one finite value."""
    points = thinned([(x, y) for x, y in zip(xs, ys, strict=True) if math.isfinite(y)])
    frame, (to_x, to_y) = axes(title, x_title, span(x for x, _ in points), span(y for _, y in points))
    path = "L".join(f"{to_x(x):.1f} {to_y(y):.1f}" for x, y in points)
    dot = f'<circle class="p" cx="{to_x(points[-1][0]):.1f}" cy="{to_y(points[-1][1]):.1f}" r="2.5"/>'
    last = f'<text class="e" x="{WIDTH - RIGHT}" y="16">last {points[-1][1]:.4g}</text>'
    return svg(f'{frame}<path class="l" d="M{path}"/>{dot}{last}', f"{title} over {x_title}")


def scatter(points: Sequence[Sequence[float]], labels: Sequence[int], names: Sequence[str]) -> str:
    """(n, 2) points coloured by label, an index into at most COLOURS names, with a legend of HTML below."""
    (x0, x1), (y0, y1) = (span(p[i] for p in points) for i in (0, 1))
    size = 400
    dots = "".join(
        f'<circle style="fill:var(--c{label})" cx="{6 + (x - x0) / (x1 - x0) * (size - 12):.1f}" '
        f'cy="{6 + (y - y0) / (y1 - y0) * (size - 12):.1f}" r="2.6"/>'
        for (x, y), label in zip(points, labels, strict=True)
    )
    legend = "".join(
        f'<span><i style="background:var(--c{i})"></i>{html.escape(name)}</span>' for i, name in enumerate(names)
    )
    return (
        f'<svg viewBox="0 0 {size} {size}" role="img" aria-label="features in two dimensions">{dots}</svg>'
        f'<p class="legend">{legend}</p>'
    )


def bars(names: Sequence[str], percents: Sequence[float]) -> str:
    """Horizontal bars from 0 to 100 %, in the order given."""
    rows = "".join(
        f'<div><span>{html.escape(name)}</span><b><i style="width:{value:.1f}%"></i></b><em>{value:.1f}</em></div>'
        for name, value in zip(names, percents, strict=True)
    )
    return f'<div class="bars">{rows}</div>'
