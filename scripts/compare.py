"""Methods or ablations on one card: one run each and seed, the same evaluations for all, one table and one plot.

    python scripts/compare.py methods                               all methods on cifar10-demo
    python scripts/compare.py methods --card cifar10 --seeds 0 1 2 --only simclr byol
    python scripts/compare.py ablations -- --workers 1              what follows -- goes to train/pretrain.py

The runs are runs/compare-CARD-METHOD-SEED and runs/ablate-CARD-NAME-SEED. What is done already is not done again, so
the same command continues after a stop. table.md and plot.png go to runs/compare-CARD or runs/ablate-CARD: a column is
a protocol with its changed settings, a value of several seeds is the mean with its 95 % interval (Student's t), and of
each run only the checkpoint that is there counts. Ablations stand beside the paper's values.
"""

import hashlib
import io
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from bench.measure import as_text, interval

from eval.subject import RESULTS, read_results
from pipeline.command import REPO, RUNS, run_command
from pipeline.disk import write_whole
from pipeline.errors import UserError
from train.cards import PRESETS
from train.checkpoint import CHECKPOINT
from train.content import read_once
from train.methods.choose import METHODS

# Ablation → flags, in which widths follow the card's projector, so that one table serves every card; and the paper's
# linear top-1 on ImageNet after 300 epochs. Source: Zbontar 2021, tables 5 and 6; batch sizes: Barlow Twins, issue 7.
ABLATIONS = {
    "baseline": ("", 71.4),
    "invariance": ("--loss invariance", 57.3),
    "redundancy": ("--loss redundancy", 0.1),
    "feature-norm": ("--embedding-norm feature", 69.8),
    "no-projector-bn": ("--projector-norm none", 71.2),
    "no-norm": ("--projector-norm none --embedding-norm none", 53.4),
    "cross-entropy": ("--loss cross-entropy", 63.3),
    "stop-gradient": ("--stop-gradient", 70.5),
    "predictor": ("--predictor {width}-{width}", 70.2),
    "stop-gradient-predictor": ("--stop-gradient --predictor {width}-{width}", 61.3),
    "no-grey": ("--without grey", None),
    "no-jitter": ("--without grey jitter", None),
    "crop-blur": ("--without grey jitter solarize", None),
    "crop-only": ("--without grey jitter solarize blur", None),
    "no-crop": ("--without crop", None),
    "width-half": ("--projector {hidden}-{half}", None),
    "width-double": ("--projector {hidden}-{double}", None),
    "depth-1": ("--projector {width}", None),
    "depth-3": ("--projector {hidden}-{hidden}-{width}", None),
    "batch-512": ("--global-batch 512", 71.4),
    "batch-1024": ("--global-batch 1024", 71.7),
    "batch-2048": ("--global-batch 2048", 71.4),
}

Values = dict[str, dict[str, dict[int, float]]]  # column → row → seed → percent


@dataclass(frozen=True)
class CompareConfig:
    """What to compare."""

    rows: tyro.conf.Positional[Literal["methods", "ablations"]]
    """What a row of the table is."""
    flags: tyro.conf.Positional[tuple[str, ...]] = ()
    """After --: flags of train/pretrain.py that all runs get."""
    card: str = "cifar10-demo"
    """The preset that all share: cifar10-demo, cifar10 or imagenet."""
    seeds: tuple[int, ...] = (0,)
    """Each row is run with each of these."""
    only: tuple[str, ...] = ()
    """Names of rows to run; none given: all."""


def ablations(card: str) -> dict[str, str]:
    """Name → flags for a card."""
    hidden, *_, last = PRESETS[card].projector.split("-")
    widths = {"hidden": hidden, "width": last, "half": int(last) // 2, "double": 2 * int(last)}
    return {name: flags.format(**widths) for name, (flags, _) in ABLATIONS.items()}


def chosen_rows(config: CompareConfig) -> dict[str, str]:
    """Name → flags of the rows that are wanted. Raises UserError for a card or a row that there is not."""
    if config.card not in PRESETS:
        raise UserError(f"--card {config.card} is no preset; there are {', '.join(PRESETS)}")
    rows = {method: f"--method {method}" for method in METHODS}
    if config.rows == "ablations":
        rows = ablations(config.card)
    if unknown := [name for name in config.only if name not in rows]:
        raise UserError(f"--only {unknown[0]} is none of the {config.rows}; there are {', '.join(rows)}")
    return {name: flags for name, flags in rows.items() if name in config.only or not config.only}


def run_python(script: str, *arguments: str) -> None:
    """Runs one of this project's commands, and ends with its exit code if that is not 0."""
    code = subprocess.run([sys.executable, script, *arguments], cwd=REPO).returncode
    if code:
        sys.exit(code)


# ---- the table ----


def results_of_checkpoint(run: Path) -> list[dict]:
    """A run's results of its trained encoder: of the checkpoint that is there, else of the one measured last."""
    trained = [r for r in read_results(run) if r["encoder"] == "trained"]
    if not trained:
        return []
    path = run / CHECKPOINT
    there = hashlib.sha256(read_once(path)).hexdigest() if path.is_file() else trained[-1]["checkpoint_sha256"]
    of = [r for r in trained if r["checkpoint_sha256"] == there]
    if not of:
        raise UserError(
            f"{path} has no results, only earlier checkpoints of the run have; run scripts/eval_all.sh {run}"
        )
    return of


def column_name(result: dict) -> str:
    """The protocol and its changed settings: "knn-mmselfsup, resolution_px 32"; with fewer labels also how many."""
    facts = [f"{name} {value}" for name, value in result["changed"].items()]
    if result["fraction"] != 1:
        facts.append(f"fraction {result['fraction']}" if result["fraction"] else f"{result['train_images']} images")
    return ", ".join([result["protocol"].removesuffix("-modified"), *facts])


def collect(runs: dict[tuple[str, int], Path]) -> Values:
    """The newest value of each protocol from runs by row and seed.

    Raises UserError where a run has no results, or a column would mix values that cannot be compared.
    """
    values: Values = {}
    datasets: dict[str, tuple[dict, Path]] = {}
    for (row, seed), run in runs.items():
        if not (run / RESULTS).is_file():
            raise UserError(f"{run / RESULTS} is missing; evaluate the run with scripts/eval_all.sh")
        for result in results_of_checkpoint(run):
            column, data = column_name(result), result["dataset_sha256"]
            if datasets.setdefault(column, (data, run))[0] != data:
                raise UserError(
                    f"{column} was measured on other images in {run} than in {datasets[column][1]}; "
                    "measure both on the same, or make a table of each"
                )
            values.setdefault(column, {}).setdefault(row, {})[seed] = result["value"]
    if not values:
        raise UserError("no run has a result of a trained encoder; evaluate one with eval/knn.py first")
    return values


def table(values: Values, rows: str) -> str:
    """Markdown: a line a row, a column a protocol."""
    protocols = sorted(values)
    names = list(dict.fromkeys(name for protocol in protocols for name in values[protocol]))
    paper = ["paper: ImageNet, linear"] if rows == "ablations" else []
    head = [rows.removesuffix("s"), *protocols, *paper, "seeds"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name in names:
        found = [values[protocol].get(name, {}) for protocol in protocols]
        cells = [as_text(interval(list(one.values())), 2) if one else "–" for one in found]
        if paper:
            value = ABLATIONS[name][1]
            cells.append("–" if value is None else f"{value:.1f}")
        seeds = sorted(set().union(*found))
        lines.append(f"| {' | '.join([name, *cells, ', '.join(map(str, seeds))])} |")
    return "\n".join([*lines, "", "Top-1 in percent of the validation images, after the last epoch; ±: 95 % interval."])


def plot(values: Values, path: Path) -> None:
    """Bars of each row, one group a protocol; the axis starts at 0."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = max(len(found) for found in values.values())
    many = rows >= 8
    grid = (len(values), 1) if many else (1, len(values))
    size = (max(5, 0.55 * rows) * grid[1], (4.5 if many else 3.5) * grid[0])
    figure, axes = pyplot.subplots(*grid, figsize=size, layout="constrained", squeeze=False)
    for axis, protocol in zip(axes.flat, sorted(values), strict=True):
        means = {name: interval(list(seeds.values())) for name, seeds in values[protocol].items()}
        heights, spread = ([of[part] or 0 for of in means.values()] for part in ("mean", "ci95"))
        axis.bar_label(axis.bar(list(means), heights, yerr=spread), fmt="%.1f")
        axis.margins(y=0.12)
        axis.set(title=protocol, ylabel="top-1, %")
        axis.tick_params(axis="x", rotation=90 if many else 20)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=110)
    pyplot.close(figure)
    write_whole(path, drawn.getvalue())


def tabulate(runs: dict[tuple[str, int], Path], rows: str, out: Path) -> None:
    """Prints the table of some runs and writes it with its plot into a folder."""
    values = collect(runs)
    out.mkdir(parents=True, exist_ok=True)
    text = table(values, rows)
    write_whole(out / "table.md", text + "\n")
    plot(values, out / "plot.png")
    print(text)


def main(config: CompareConfig) -> None:
    rows, runs = chosen_rows(config), {}
    out = RUNS / f"{'compare' if config.rows == 'methods' else 'ablate'}-{config.card}"
    for seed in config.seeds:
        for name, flags in rows.items():
            run = runs[name, seed] = out.with_name(f"{out.name}-{name}-{seed}")
            own = ["--preset", config.card, "--seed", str(seed), "--name", str(run), *flags.split()]
            run_python("train/pretrain.py", *own, *config.flags)
            run_python("scripts/eval_all.py", str(run), "--only", "knn", "cached")
    tabulate(runs, config.rows, out)


if __name__ == "__main__":
    run_command(CompareConfig, main)
