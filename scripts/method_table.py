"""The results of several methods and seeds as one table and one plot (scripts/compare_methods.sh makes the runs).

    python scripts/method_table.py --out runs/compare-cifar10-demo RUN [RUN ...]

Writes table.md and plot.png into --out. With several seeds a value is the mean with its 95 % interval (Student's t).
"""

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from scipy import stats

from pipeline.command import UserError, run_command


@dataclass(frozen=True)
class TableConfig:
    """One row a method, one column a protocol."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders with results.jsonl and config.json."""
    out: Path
    """The folder for table.md and plot.png."""


def collect(runs: tuple[Path, ...]) -> dict[str, dict[str, dict[int, float]]]:
    """{protocol: {method: {seed: newest value in percent}}}."""
    values: dict = defaultdict(lambda: defaultdict(dict))
    for run in runs:
        for name in ("results.jsonl", "config.json"):
            if not (run / name).is_file():
                raise UserError(f"{run / name} is missing; make it with scripts/compare_methods.sh")
        config = json.loads((run / "config.json").read_text())
        for line in (run / "results.jsonl").read_text().splitlines():
            result = json.loads(line)
            if result["encoder"] == "trained":
                values[result["protocol"]][config["method"]][config["seed"]] = result["value"]
    return values


def interval(values: list[float]) -> float:
    """Half the 95 % interval of the mean; 0 for a single value, which has none."""
    return float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)) if len(values) > 1 else 0.0


def table(values: dict) -> str:
    protocols = sorted(values)
    methods = list(dict.fromkeys(method for protocol in protocols for method in values[protocol]))
    lines = [f"| method | {' | '.join(protocols)} | seeds |", "|---|" + "---|" * (len(protocols) + 1)]
    for method in methods:
        cells, seeds = [], set()
        for protocol in protocols:
            found = values[protocol][method]
            seeds |= set(found)
            spread = f" ± {interval(list(found.values())):.2f}" if len(found) > 1 else ""
            cells.append(f"{np.mean(list(found.values())):.2f}{spread}" if found else "–")
        lines.append(f"| {method} | {' | '.join(cells)} | {', '.join(map(str, sorted(seeds)))} |")
    return "\n".join([*lines, "", "Top-1 in percent of the validation images, after the last epoch; ±: 95 % interval."])


def plot(values: dict, path: Path) -> None:
    """Bars of each method, one group a protocol; the axis starts at 0."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(values), figsize=(5 * len(values), 3.5), layout="constrained", squeeze=False)
    for axis, protocol in zip(axes[0], sorted(values), strict=True):
        found = {method: list(seeds.values()) for method, seeds in values[protocol].items()}
        bars = axis.bar(list(found), [np.mean(v) for v in found.values()], yerr=[interval(v) for v in found.values()])
        axis.bar_label(bars, fmt="%.1f")
        axis.set(title=protocol, ylabel="top-1, %")
        axis.tick_params(axis="x", rotation=20)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(config: TableConfig) -> None:
    values = collect(config.runs)
    if not values:
        raise UserError("no run has a result of a trained encoder; evaluate one with eval/knn.py first")
    config.out.mkdir(parents=True, exist_ok=True)
    text = table(values)
    (config.out / "table.md").write_text(text + "\n")
    plot(values, config.out / "plot.png")
    print(text)


if __name__ == "__main__":
    run_command(TableConfig, main)
