"""What some runs measured and learnt, beside the published numbers: a table, and one HTML page with pictures.

    python eval/report.py                                  the newest run
    python eval/report.py runs/demo-untrained runs/demo    several side by side; the pictures are the last one's
    python eval/report.py --csv > table.csv                the table for other programs; --latex for a paper
    python eval/report.py --charts pdf                     every chart as a file, too, in the run's charts/

Prints the table of results and writes report.md and report.html to the last run. Both begin with what was measured and
hold every published table with ours beside it; the page also has training curves, views, the correlation matrix, a map
of the features, nearest neighbours and the accuracy of each class. It needs no result yet and no labels: a part whose
data are missing is left out with a sentence that says why. The page is one file that needs no network.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from eval.folder import result_folder
from eval.reporting.charts import Charts, training
from eval.reporting.comparison import comparison_markdown, comparisons
from eval.reporting.correlation import of_correlation
from eval.reporting.facts import Run, fact_rows, method_of, other_settings, read_config, read_json, with_epochs_done
from eval.reporting.neighbours import of_kept_features
from eval.reporting.page import PARTS, TABLES, as_markdown, or_sentence, page, readable
from eval.reporting.summary import (
    NO_RESULT,
    Rows,
    controls_ahead,
    difference,
    measured,
    newest_cells,
    newest_of_encoder,
    summary_csv,
    summary_latex,
    summary_markdown,
)
from eval.subject import RESULTS, read_results
from pipeline.command import RUNS, run_command
from pipeline.disk import write_whole
from pipeline.errors import UserError
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
    csv: bool = False
    """Print the table of results as CSV, in place of Markdown."""
    latex: bool = False
    """Print the table of results as a LaTeX tabular, in place of Markdown."""
    charts: Literal["none", "svg", "pdf"] = "none"
    """Also write every chart as a file of this kind to the folder charts/ beside the page."""


def read_runs(config: ReportConfig) -> list[Run]:
    """The runs with their results. Raises UserError for a folder that is no run's."""
    folders = [result_folder(run).resolve() for run in config.runs]  # runs/latest may change
    short = [folder.name for folder in folders]
    names = [n if short.count(n) == 1 else f"{f.parent.name}/{n}" for f, n in zip(folders, short, strict=True)]
    runs = []
    for name, folder in zip(names, folders, strict=True):
        # Of a run that was trained here the training can be shown before the first result, or without labels.
        found = read_results(folder) if (folder / RESULTS).is_file() or not (folder / METRICS).is_file() else []
        method = method_of(folder, config.method)
        results = [result | {"method": method, "run": name} for result in with_epochs_done(found, folder)]
        runs.append(Run(name, folder, read_config(folder), read_json(folder / "env.json"), results))
    if not any(run.results for run in runs) and not (runs[-1].folder / METRICS).is_file():
        raise UserError(
            f"no result in {runs[-1].folder}; measure this run first, for example with `python eval/knn.py`"
        )
    return runs


def make_page(config: ReportConfig, runs: list[Run], about: tuple, rows: Rows, compared: list[str]) -> str:
    """The whole page; its pictures are of the last run. `about`: what was measured, as PARTS.facts takes it."""
    run, results = runs[-1], [result for run in runs for result in run.results]
    shown = newest_of_encoder(run.results or results) or next(reversed(run.results or results), None)
    if config.charts != "none":
        try:
            (run.folder / "charts").mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"{run.folder / 'charts'} is no folder and cannot be made one: {error.strerror}") from None
    charts = Charts(run.folder / "charts" if config.charts != "none" else None, config.charts)
    names = [run.name for run in runs]
    curves = {run.name: (run.folder, run.config) for run in runs}
    sections = [
        ("What was measured", PARTS.facts(*about, controls_ahead(rows))),
        or_sentence("Results", lambda: measured(rows, compared)),
        ("Beside the published numbers", PARTS.beside_published(comparisons(results))),
        or_sentence("Training", lambda: training(curves, charts)),
        *of_correlation(run.folder, shown, charts),
        *of_kept_features(run.folder, run.results, config.data, charts),
    ]
    return page(" and ".join(names), sections)


def main(config: ReportConfig) -> None:
    """Prints the table and writes report.md and report.html. Raises UserError where there is nothing to report."""
    if config.csv and config.latex:
        raise UserError("--csv and --latex are two forms of the one table; give one of them")
    runs = read_runs(config)
    rows = newest_cells([(run.name, result) for run in runs for result in run.results])
    if (config.csv or config.latex) and not rows:
        raise UserError(NO_RESULT)
    compared = difference(rows, runs[0].name, runs[-1].name) if len(runs) == 2 and rows else []
    summary = summary_markdown(rows, compared) if rows else f"Left out: {NO_RESULT}."
    ahead = as_markdown(controls_ahead(rows))
    if config.csv or config.latex:
        print(readable(summary_csv(rows) if config.csv else summary_latex(rows, compared)))
    else:
        print(readable("\n\n".join(filter(None, [summary, ahead]))))
    beside = comparison_markdown([result for run in runs for result in run.results])
    about = [run.name for run in runs], fact_rows(runs), other_settings(runs)
    parts = [TABLES.facts(*about), ahead, summary, "## Beside the published numbers", beside]
    folder = runs[-1].folder
    write_whole(folder / "report.md", readable("\n\n".join(filter(None, parts)) + "\n"))
    write_whole(folder / "report.html", readable(make_page(config, runs, about, rows, compared)))
    print(f"{folder / 'report.html'} and report.md hold the rest", file=sys.stderr)


if __name__ == "__main__":
    run_command(ReportConfig, main)
