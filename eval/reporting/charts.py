"""Charts: drawn once by matplotlib, as SVG inside the page and, on request, as files beside it.

Inside the page a chart takes its colours from style.css, so that it follows light and dark; titles and legends are HTML
there, which wraps on a phone. A file has both in the picture, in the light colours.
"""

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup, escape

from eval.reporting.page import PARTS, STYLE, readable
from pipeline.disk import whole_file
from pipeline.errors import UserError
from train.config import PretrainConfig, projector_widths
from train.curves import QUANTITIES, Quantity, draw_curves, grouped, read_curves
from train.runlog import METRICS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The light colours by the names of their variables, the page's own.
PALETTE = dict(re.findall(r"--(\w+):(#[0-9a-f]{6})", STYLE.split("@media")[0]))
SERIES = [PALETTE[f"c{i}"] for i in range(10)]
RULES: dict[Any, Any] = {
    "axes.edgecolor": PALETTE["line"],
    "axes.labelcolor": PALETTE["soft"],
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "grid.color": PALETTE["line"],
    "legend.frameon": False,
    "pdf.fonttype": 42,  # letters stay letters, which journals ask for
    "svg.fonttype": "none",
    "text.color": PALETTE["fg"],
    "text.parse_math": False,  # names are of files: a $ in one is no formula
    "xtick.color": PALETTE["soft"],
    "ytick.color": PALETTE["soft"],
}
METADATA = ("Date", "Creator", "Format", "Type")  # of an SVG, left out on the page


@dataclass(frozen=True)
class Charts:
    """Shows charts on the page, and writes each to `folder`, where there is one, as `kind`."""

    folder: Path | None = None
    kind: str = "svg"

    def show(
        self,
        name: str,
        draw: Callable[["Axes"], None],
        *,
        title: str,
        legend: Sequence[str] = (),
        size_px: tuple[int, int] = (340, 190),
    ) -> Markup:
        """What `draw` puts on axes, as an <svg>. `legend`: what the colours of SERIES stand for."""
        import matplotlib  # half a second, which --help and --csv do without
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D

        with matplotlib.rc_context(RULES | {"svg.hashsalt": name}):  # the salt keeps ids apart, and the same next time
            width, height = (px / 72 for px in size_px)
            figure = Figure((width, height), layout="constrained")
            axes = figure.add_subplot()
            draw(axes)
            text = io.StringIO()
            figure.savefig(
                text, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
            )
            if self.folder:
                axes.set_title(readable(title))
                handles = [Line2D([], [], color=colour, marker="o", linestyle="") for colour in SERIES[: len(legend)]]
                if handles:
                    figure.legend(handles, [readable(text) for text in legend], loc="outside lower center", ncols=4)
                with whole_file(self.folder / f"{name}.{self.kind}") as file, warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "Glyph .* missing")  # letters the font lacks are boxes in a PDF
                    figure.savefig(file, format=self.kind)
        return inline(text.getvalue(), title)


def inline(svg: str, title: str) -> Markup:
    """A file's SVG as part of the page: no prolog, no ids that others have too, the page's colours."""
    svg = svg[svg.index("<svg") :]
    box = re.search('viewBox="[^"]*"', svg)
    assert box
    svg = f'<svg role="img" aria-label="{escape(title)}" {box[0]}>' + svg[svg.index(">") + 1 :]
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>|<g id=\"[^\"]*\">(?=\s*</g>)", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"\s*\n\s*", " ", svg).replace("xlink:href", "href")
    for name, colour in PALETTE.items():
        svg = svg.replace(colour, f"var(--{name})")
    return Markup(svg)


def shown_number(value: float, name: str, dimensions: int | None) -> str:
    """A curve's last value; effective dimensions of how many."""
    if name == "effective_dimensions":
        return f"{value:.1f}" + (f" of {dimensions}" if dimensions else "")
    return f"{value:.4g}"


def training(runs: Mapping[str, tuple[Path, PretrainConfig | None]], charts: Charts) -> str:
    """Every number of metrics.jsonl over the epochs, by group; the curves of several runs in one chart.

    `runs`: folder and configuration by name; the last one's record must be there.
    """
    of = {name: read_curves(folder / METRICS) for name, (folder, _) in runs.items()}
    last_folder, last_config = list(runs.values())[-1]
    if not list(of.values())[-1]:
        raise UserError(f"{last_folder / METRICS} has no line: this run was not trained here, or for no step")
    drawn = {name: points for name, points in of.items() if any(points.values())}
    names = dict.fromkeys(number for points in of.values() for number in points)
    finite = [number for number in names if any(points.get(number) for points in drawn.values())]

    def chart(number: str) -> tuple:
        quantity = QUANTITIES.get(number, Quantity(number))
        series = {run: points[number] for run, points in drawn.items() if points.get(number)}
        colours = {run: i % len(SERIES) for i, run in enumerate(drawn)}

        def draw(axes: "Axes") -> None:
            draw_curves(axes, number, [(points, SERIES[colours[run]]) for run, points in series.items()])

        dimensions = {run: projector_widths(config.projector)[-1] for run, (_, config) in runs.items() if config}
        last = [
            (colours[run], shown_number(points[-1][1], number, dimensions.get(run))) for run, points in series.items()
        ]
        svg = charts.show(re.sub(r"\W", "_", number), draw, title=quantity.title, legend=list(drawn)[: len(SERIES)])
        return quantity.title, svg, last, quantity.healthy

    groups = {group: [chart(number) for number in members] for group, members in grouped(finite).items()}
    lost = [QUANTITIES.get(number, Quantity(number)).title for number in names if number not in finite]
    return PARTS.curves(groups, list(drawn) if len(runs) > 1 else [], lost, most_in_a_batch(last_config))


def most_in_a_batch(config: PretrainConfig | None) -> str:
    """What bounds the effective dimensions besides the embedding, where that is the batch."""
    if config is None or config.global_batch > projector_widths(config.projector)[-1]:
        return ""
    return f"A batch of {config.global_batch} images shows at most {config.global_batch - 1} effective dimensions."


def scatter(places: np.ndarray, labels: np.ndarray, names: Sequence[str], charts: Charts) -> Markup:
    """(n, 2) points coloured by label, an index into at most ten names."""

    def draw(axes: "Axes") -> None:
        for i in range(len(names)):
            axes.plot(*places[labels == i].T, "o", markersize=4.5, markeredgewidth=0, color=SERIES[i])
        axes.set_axis_off()

    return charts.show("feature_map", draw, title="map of the features", legend=names, size_px=(460, 380))


def matrix(values: np.ndarray, charts: Charts) -> Markup:
    """A (d, d) matrix in [−1, 1] with its scale: blue above 0, orange below, at 0 clear, so that the page shows."""

    def draw(axes: "Axes") -> None:
        from matplotlib.colors import ListedColormap

        steps = np.linspace(-1, 1, 257)
        colours = np.where(steps[:, None] > 0, [0.17, 0.455, 0.784], [0.886, 0.431, 0.098])
        shades = ListedColormap(np.column_stack([colours, np.abs(steps)]))
        image = axes.imshow(values, cmap=shades, vmin=-1, vmax=1, interpolation="none")
        axes.set(xlabel="dimension, view 2", ylabel="dimension, view 1")
        scale = axes.figure.colorbar(image, ticks=[-1, -0.5, 0, 0.5, 1], label="correlation")
        if scale.solids is not None:
            scale.solids.set(rasterized=True, edgecolor="none")

    return charts.show("correlation_matrix", draw, title="cross-correlation matrix", size_px=(380, 320))
