"""What some runs measured and learnt, beside the published numbers: a table, and one HTML page with pictures.

    python eval/report.py                                  the newest run
    python eval/report.py runs/demo-untrained runs/demo    several; the page shows the last one's curves and pictures

Prints the table of results and writes report.md and report.html to the last run. Both hold every published table
with ours beside it; the page also has training curves, views, the correlation matrix, a map of the features, nearest
neighbours and the accuracy of each class. A part whose data are missing is left out with a sentence that says why, and
every part says of which checkpoint it is. The page is one file that needs no network.
"""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from eval.folder import result_folder
from eval.reporting.charts import curves
from eval.reporting.comparison import comparison_markdown, comparisons
from eval.reporting.correlation import config_from, of_correlation
from eval.reporting.neighbours import of_kept_features
from eval.reporting.page import PARTS, or_sentence, page, readable
from eval.reporting.summary import Rows, measured, newest_cells, newest_of_encoder, summary_markdown
from eval.subject import RESULTS, read_results
from pipeline.command import RUNS, run_command
from pipeline.disk import write_whole
from pipeline.errors import UserError
from train.methods.barlow_ablations import is_ablated
from train.runlog import METRICS


@dataclass(frozen=True)
class ReportConfig:
    """A table and a page about some runs."""

    runs: tyro.conf.Positional[tuple[Path, ...]] = (RUNS / "latest",)
    """Run folders or checkpoint files, each with a results.jsonl in its folder; the report is written to the last."""
    data: Path | None = None
    """The dataset whose kept features are shown. None: the data the encoder was trained on."""
    method: str = ""
    """Which method made the encoder of a folder without config.json, such as barlow_twins or supervised; without it,
    such results stand beside no method's published numbers."""


def method_of(run: Path, otherwise: str) -> str:
    """The pretraining method that a run folder tells; an ablation of one is another method."""
    try:
        config = config_from(json.loads((run / "config.json").read_text("utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        return otherwise
    changed = (config.method == "barlow_twins" and is_ablated(config)) or config.without
    return config.method + (", ablated" if changed else "")


def heading(run: Path, r: dict | None, method: str) -> str:
    """The run's name, and what its newest result is of."""
    if r is None:
        return PARTS.heading(run.resolve().name, f"{method.replace('_', ' ')} · no result yet")
    facts = [method.replace("_", " "), r["arch"], f"{r['epochs']} epochs, step {r['step']}" if r["epochs"] else ""]
    facts += [f"{r['resolution_px']} px", f"checkpoint {r['checkpoint_sha256'][:12]}", f"measured {r['time'][:10]}"]
    return PARTS.heading(run.resolve().name, " · ".join(filter(None, facts)))


def make_page(config: ReportConfig, results: list[tuple[Path, dict]], rows: Rows) -> str:
    """The whole page about the last run."""
    run = config.runs[-1]
    plain, own = [r for _, r in results], [r for where, r in results if where == run]
    shown = newest_of_encoder(own or plain) or next(reversed(own or plain), None)
    parts = [
        heading(run, shown, method_of(run, config.method)),
        or_sentence("Results", lambda: measured(rows)),
        PARTS.section("Beside the published numbers", PARTS.beside_published(comparisons(plain))),
        or_sentence("Training", lambda: curves(run)),
        *of_correlation(run, shown),
        *of_kept_features(run, own, config.data),
    ]
    return page(f"{run.resolve().name}: report", parts)


def main(config: ReportConfig) -> None:
    """Prints the table and writes report.md and report.html. Raises UserError where there is nothing to report."""
    config = replace(config, runs=tuple(result_folder(run).resolve() for run in config.runs))  # runs/latest may change
    # Of a run that was trained here the training can be shown before the first result, or without labels.
    trained = {run for run in config.runs if (run / METRICS).is_file()}
    measured_runs = [run for run in config.runs if run not in trained or (run / RESULTS).is_file()]
    results = [
        (run, result | {"method": method_of(run, config.method)})
        for run in measured_runs
        for result in read_results(run)
    ]
    if not results and config.runs[-1] not in trained:
        raise UserError(
            f"no result in {config.runs[-1]}; measure this run first, for example with `python eval/knn.py`"
        )
    rows = newest_cells(results)
    summary = summary_markdown(rows) if rows else "No kNN, linear or semi-supervised result yet."
    beside = comparison_markdown([result for _, result in results])
    run = config.runs[-1]
    write_whole(run / "report.md", readable(f"{summary}\n\n## Beside the published numbers\n\n{beside}\n"))
    write_whole(run / "report.html", readable(make_page(config, results, rows)))
    print(readable(summary))
    print(f"{run / 'report.html'} and report.md hold the rest", file=sys.stderr)


if __name__ == "__main__":
    run_command(ReportConfig, main)
