"""The results of several methods or ablations and seeds as one table and one plot.

    python scripts/comparison_table.py --out runs/compare-cifar10-demo RUN [RUN ...]
    python scripts/comparison_table.py --rows ablation --out runs/ablate-cifar10-demo RUN [RUN ...]

scripts/compare_methods.sh and scripts/ablate.sh make the runs. Writes table.md and plot.png into --out. With several
seeds a value is the mean with its 95 % interval (Student's t). A column is a protocol with its changed settings, on one
dataset; of each run only the checkpoint of its last step counts.
"""

import hashlib
import io
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from scipy import stats

from eval.subject import RESULTS, read_results
from pipeline.command import run_command
from pipeline.disk import write_whole
from pipeline.errors import UserError
from train.checkpoint import CHECKPOINT
from train.content import read_once

# Linear top-1 on ImageNet after 300 epochs. Source: Zbontar 2021, tables 5 and 6; batch sizes: Barlow Twins, issue 7.
PAPER = {
    "baseline": 71.4,
    "invariance": 57.3,
    "redundancy": 0.1,
    "feature-norm": 69.8,
    "no-projector-bn": 71.2,
    "no-norm": 53.4,
    "cross-entropy": 63.3,
    "stop-gradient": 70.5,
    "predictor": 70.2,
    "stop-gradient-predictor": 61.3,
    "batch-256": 70.7,
    "batch-512": 71.4,
    "batch-1024": 71.7,
    "batch-2048": 71.4,
}


@dataclass(frozen=True)
class TableConfig:
    """One row a method or an ablation, one column a protocol."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders with results.jsonl and config.json."""
    out: Path
    """The folder for table.md and plot.png."""
    rows: Literal["method", "ablation"] = "method"
    """ablation: a row is what the folder is called (ablate-CARD-NAME-SEED), with the paper's value beside it."""


def row_name(run: Path, config: dict, rows: str) -> str:
    """What a run is called in the table."""
    return (
        run.name.removeprefix(f"ablate-{config['preset']}-").rsplit("-", 1)[0]
        if rows == "ablation"
        else config["method"]
    )


def results_of_checkpoint(run: Path) -> list[dict]:
    """A run's results of its trained encoder: of the checkpoint that is there, else of the one measured last."""
    trained = [r for r in read_results(run) if r["encoder"] == "trained"]
    if not trained:
        return []
    path = run / CHECKPOINT
    there = hashlib.sha256(read_once(path)).hexdigest() if path.is_file() else ""
    of = [r for r in trained if r["checkpoint_sha256"] == there] or trained[-1:]
    return [r for r in trained if r["checkpoint_sha256"] == of[-1]["checkpoint_sha256"]]


def column_name(result: dict) -> str:
    """The protocol with what was changed of it: "knn-mmselfsup, resolution_px 32"; of a share of the labels, which."""
    facts = [f"{name} {value}" for name, value in result["changed"].items()]
    if result["fraction"] != 1:
        facts.append(f"fraction {result['fraction']}" if result["fraction"] else f"{result['train_images']} images")
    return ", ".join([result["protocol"].removesuffix("-modified"), *facts])


def collect(runs: tuple[Path, ...], rows: str) -> dict[str, dict[str, dict[int, float]]]:
    """{column: {row: {seed: newest value in percent}}}. Raises UserError where a column would mix what cannot be
    compared."""
    values: dict = defaultdict(lambda: defaultdict(dict))
    datasets, taken = {}, {}
    for run in runs:
        for name in (RESULTS, "config.json"):
            if not (run / name).is_file():
                raise UserError(
                    f"{run / name} is missing; make it with scripts/compare_methods.sh or scripts/ablate.sh"
                )
        config = json.loads((run / "config.json").read_text("utf-8"))
        row = row_name(run, config, rows), config["seed"]
        if taken.setdefault(row, run) != run:
            raise UserError(f"{taken[row]} and {run} are both {row[0]} with seed {row[1]}; leave one of them out")
        for result in results_of_checkpoint(run):
            column, data = column_name(result), result["dataset_sha256"]
            if datasets.setdefault(column, (data, run))[0] != data:
                raise UserError(
                    f"{column} was measured on other images in {run} than in {datasets[column][1]}; "
                    "measure both on the same, or make a table of each"
                )
            values[column][row[0]][row[1]] = result["value"]
    return values


def interval(values: list[float]) -> float:
    """Half the 95 % interval of the mean; 0 for a single value, which has none."""
    return float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)) if len(values) > 1 else 0.0


def table(values: dict, rows: str) -> str:
    protocols = sorted(values)
    names = list(dict.fromkeys(name for protocol in protocols for name in values[protocol]))
    paper = ["paper: ImageNet, linear"] if rows == "ablation" else []
    lines = [f"| {' | '.join([rows, *protocols, *paper, 'seeds'])} |", "|---|" + "---|" * (len(protocols + paper) + 1)]
    for name in names:
        cells, seeds = [], set()
        for protocol in protocols:
            found = values[protocol].get(name, {})
            seeds |= set(found)
            spread = f" ± {interval(list(found.values())):.2f}" if len(found) > 1 else ""
            cells.append(f"{np.mean(list(found.values())):.2f}{spread}" if found else "–")
        cells += [f"{PAPER[name]:.1f}" if name in PAPER else "–"] if paper else []
        lines.append(f"| {' | '.join([name, *cells, ', '.join(map(str, sorted(seeds)))])} |")
    return "\n".join([*lines, "", "Top-1 in percent of the validation images, after the last epoch; ±: 95 % interval."])


def plot(values: dict, path: Path) -> None:
    """Bars of each method, one group a protocol; the axis starts at 0."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = max(len(found) for found in values.values())
    many = rows >= 8
    grid = (len(values), 1) if many else (1, len(values))
    size = (max(5, 0.55 * rows) * grid[1], (4.5 if many else 3.5) * grid[0])
    figure, axes = pyplot.subplots(*grid, figsize=size, layout="constrained", squeeze=False)
    for axis, protocol in zip(axes.flat, sorted(values), strict=True):
        found = {name: list(seeds.values()) for name, seeds in values[protocol].items()}
        bars = axis.bar(list(found), [np.mean(v) for v in found.values()], yerr=[interval(v) for v in found.values()])
        axis.bar_label(bars, fmt="%.1f")
        axis.margins(y=0.12)
        axis.set(title=protocol, ylabel="top-1, %")
        axis.tick_params(axis="x", rotation=90 if many else 20)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=110)
    pyplot.close(figure)
    write_whole(path, drawn.getvalue())


def main(config: TableConfig) -> None:
    values = collect(config.runs, config.rows)
    if not values:
        raise UserError("no run has a result of a trained encoder; evaluate one with eval/knn.py first")
    config.out.mkdir(parents=True, exist_ok=True)
    text = table(values, config.rows)
    write_whole(config.out / "table.md", text + "\n")
    plot(values, config.out / "plot.png")
    print(text)


if __name__ == "__main__":
    run_command(TableConfig, main)
