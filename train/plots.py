"""loss.png in a run's folder, drawn at its end: the loss, and what shows a collapse."""

import math
from pathlib import Path

from pipeline.disk import read_lines, whole_file
from train.runlog import METRICS

TITLES = {
    "loss": "loss",
    "diagonal_mean": "mean of C's diagonal",
    "off_diagonal_rms": "RMS of C off the diagonal",
    "embedding_spread": "spread of embeddings",
    "effective_dimensions": "effective dimensions",
    "knn_top1": "kNN top-1, %",
}


def plot_loss(folder: Path) -> None:
    """Draws loss.png from metrics.jsonl: of each number the lines that have it."""
    lines = [line for line in read_lines(folder / METRICS) if is_number(line.get("epoch"))]
    curves = {name: [(line["epoch"], line[name]) for line in lines if is_number(line.get(name))] for name in TITLES}
    curves = {name: points for name, points in curves.items() if points}
    if not curves:
        return
    import matplotlib  # most of a second, and only the end of a run needs it

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(curves), figsize=(4 * len(curves), 3.5), layout="constrained", squeeze=False)
    for axis, (name, points) in zip(axes[0], curves.items(), strict=True):
        axis.plot(*zip(*points, strict=True), linewidth=1.2)
        axis.set(title=TITLES[name], xlabel="epoch")
        axis.grid(alpha=0.3)
    with whole_file(folder / "loss.png") as file:
        figure.savefig(file, format="png", dpi=110)
    pyplot.close(figure)


def is_number(value) -> bool:
    """Whether a value of metrics.jsonl can be drawn."""
    return isinstance(value, int | float) and math.isfinite(value)
