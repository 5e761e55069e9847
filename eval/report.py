"""What some runs measured and learnt, beside the published numbers: a table, and one HTML page with pictures.

    python eval/report.py                                  the newest run
    python eval/report.py runs/demo-untrained runs/demo    several; the page shows the last one's curves and pictures

Prints the table of results and writes report.md and report.html to the last run. Both hold every published table
with ours beside it; the page also has training curves, views, the correlation matrix, a map of the features, nearest
neighbours and the accuracy of each class. A part whose data are missing is left out with a sentence that says why, and
every part says of which checkpoint it is. The page is one file that needs no network.
"""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from eval.reporting.charts import line_chart, scatter
from eval.reporting.comparison import comparison_markdown, comparisons
from eval.reporting.correlation import Correlation, config_from, correlate
from eval.reporting.neighbours import (
    SHOWN,
    VOTERS,
    KeptFeatures,
    Vote,
    class_accuracy,
    embedding_map,
    kept_features,
    shown_queries,
    vote,
)
from eval.reporting.page import PARTS, matrix_picture, page, picture, readable, with_code
from eval.reporting.summary import (
    EXPLANATION,
    Rows,
    newest_cells,
    newest_of_encoder,
    protocol_notes,
    summary_markdown,
    table_cells,
)
from eval.subject import read_results
from pipeline.command import RUNS, run_command
from pipeline.disk import read_lines, write_whole
from pipeline.errors import UserError
from pipeline.loaders.reference import decode_pil
from pipeline.storage.beton import Beton
from train.methods.barlow_ablations import is_ablated

SHOWN_DIMENSIONS = 256  # of the correlation matrix
MOST_CLASSES = 40  # that are listed one by one; of more, the best and the worst
CURVES = {
    "on_diagonal": "Σ (C_ii − 1)²",
    "off_diagonal": "Σ C_ij², i ≠ j",
    "diagonal_mean": "mean of C's diagonal",
    "off_diagonal_rms": "RMS of C off the diagonal",
    "embedding_spread": "spread of embeddings",
    "effective_dimensions": "effective dimensions",
    "lr_weights": "learning rate, weights",
    "lr_biases": "learning rate, biases",
    "images_per_s": "images/s",
    "data_wait_share": "share of time waiting for data",
}


@dataclass(frozen=True)
class ReportConfig:
    """A table and a page about some runs."""

    runs: tyro.conf.Positional[tuple[Path, ...]] = (RUNS / "latest",)
    """Run folders, each with a results.jsonl; the report is written to the last."""
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


def or_sentence(title: str, make: Callable[[], str]) -> str:
    """A section, or why it is not there."""
    try:
        return PARTS.section(title, make())
    except UserError as error:
        return left_out(title, error)


def left_out(title: str, error: UserError) -> str:
    """A section that says why it is empty."""
    return PARTS.section(title, PARTS.left_out(error))


def heading(run: Path, r: dict, method: str) -> str:
    """The run's name, and what its newest result is of."""
    facts = [method.replace("_", " "), r["arch"], f"{r['epochs']} epochs, step {r['step']}" if r["epochs"] else ""]
    facts += [f"{r['resolution_px']} px", f"checkpoint {r['checkpoint_sha256'][:12]}", f"measured {r['time'][:10]}"]
    return PARTS.heading(run.resolve().name, " · ".join(filter(None, facts)))


def measured(rows: Rows) -> str:
    """The table of results as HTML."""
    if not rows:
        raise UserError("no kNN, linear or semi-supervised result; `python eval/knn.py` measures the first")
    head, body = table_cells(rows)
    return PARTS.measured(head, [[row[0], *map(with_code, row[1:])] for row in body], EXPLANATION, protocol_notes(rows))


def is_number(value) -> bool:
    """Whether a value of metrics.jsonl can be drawn."""
    return isinstance(value, int | float) and math.isfinite(value)


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


def whose(shown: dict, c: Correlation | None = None) -> str:
    """Of which checkpoint a part is: of the one of the result `shown`, or what the correlation was made with."""
    own = f"Checkpoint {shown['checkpoint_sha256'][:12]}, step {shown['step']}."
    if c is None or c.checkpoint_sha256 == shown["checkpoint_sha256"]:
        return own
    return f"Checkpoint {c.checkpoint_sha256[:12]}, step {c.step}. The results are of another: {own}"


def of_correlation(run: Path, shown: dict) -> list[str]:
    """The sections about what the loss saw; one that says why where that cannot be made."""
    try:
        c = correlate(run)
    except UserError as error:
        return [left_out("Views and correlation matrix", error)]
    pairs = [[picture(pair[v], f"image {i}, view {v + 1}") for v in (0, 1)] for i, pair in enumerate(c.pairs, 1)]
    shown_px = min(SHOWN_DIMENSIONS, len(c.matrix))
    drawn = matrix_picture(c.matrix[:shown_px, :shown_px], "cross-correlation matrix")
    return [
        PARTS.section("Both views", PARTS.views(pairs, whose(shown, c))),
        PARTS.section("Correlation matrix", PARTS.matrix(drawn, c, shown_px, whose(shown, c))),
    ]


def feature_map(kept: KeptFeatures) -> str:
    """A point for each of some validation images, near to those with like features."""
    places, labels, names = embedding_map(kept)
    drawn = scatter(places.tolist(), labels.tolist(), names)
    return PARTS.feature_map(drawn, len(places), names, len(kept.dataset.train.classes), whose(kept.result))


def neighbours(kept: KeptFeatures, found: Vote) -> str:
    """Rows of pictures: a validation image, then its nearest training images."""
    train, val, classes = kept.dataset.train, kept.dataset.val, kept.dataset.train.classes

    def shown(kind: str, beton: Beton, sample: int, caption: str) -> tuple:
        return kind, picture(decode_pil(beton, sample), caption, 160), caption

    rows = []
    for query in shown_queries(kept, found):
        sample = int(found.queries[query])
        label = kept.dataset.val_labels[sample]
        row = [shown("query", val, sample, classes[label])]
        for near, similarity in zip(found.rows[query, :SHOWN], found.similarity[query, :SHOWN], strict=True):
            kind = "hit" if train.labels[near] == label else "miss"
            row.append(shown(kind, train, int(near), f"{classes[train.labels[near]]} {similarity:.2f}"))
        rows.append(row)
    return PARTS.neighbours(rows, whose(kept.result))


def classes_accuracy(kept: KeptFeatures, found: Vote) -> str:
    """A bar for each class, or for the best and the worst of many."""
    accuracy = list(class_accuracy(kept, found).items())
    return PARTS.bars(accuracy, MOST_CLASSES, VOTERS, len(found.queries), len(kept.val), whose(kept.result))


def of_kept_features(run: Path, own: list[dict], data: Path | None) -> list[str]:
    """The sections made of kept features; one that says why where there are none."""
    try:
        kept = kept_features(run, own, data)
    except UserError as error:
        return [left_out("Features", error)]
    parts = [or_sentence("Map of the features", lambda: feature_map(kept))]
    try:
        found = vote(kept)
    except UserError as error:
        return [*parts, left_out("Nearest neighbours", error)]
    parts.append(or_sentence("Nearest neighbours", lambda: neighbours(kept, found)))
    return [*parts, or_sentence("Accuracy of each class", lambda: classes_accuracy(kept, found))]


def make_page(config: ReportConfig, results: list[tuple[Path, dict]], rows: Rows) -> str:
    """The whole page about the last run."""
    run = config.runs[-1]
    plain, own = [r for _, r in results], [r for where, r in results if where == run]
    shown = newest_of_encoder(own or plain) or (own or plain)[-1]
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
    """Prints the table and writes report.md and report.html. Raises UserError where there is no result."""
    config = replace(config, runs=tuple(run.expanduser().resolve() for run in config.runs))  # runs/latest may change
    results = [
        (run, result | {"method": method_of(run, config.method)}) for run in config.runs for result in read_results(run)
    ]
    if not results:
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
