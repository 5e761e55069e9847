"""The results of some runs as one Markdown table: printed, and written as report.md to the last of them.

    python eval/report.py runs/demo-untrained runs/demo

A row is what was measured (raw pixels, an untrained encoder, a run's encoder), a column a kind of evaluation; a cell
is the newest result of that kind. Every protocol that a column's numbers come from is named below the table, and in
the cell itself where one column holds several.
"""

from dataclasses import dataclass
from pathlib import Path

import tyro

from eval.subject import read_results
from pipeline.command import RUNS, UserError, run_command

# Column title → (beginning of the protocol's name, fraction of the labels).
COLUMNS = {
    "kNN top-1": ("knn", 1.0),
    "linear top-1": ("linear", 1.0),
    "1 % semi-supervised top-1": ("semisup", 0.01),
    "10 % semi-supervised top-1": ("semisup", 0.1),
}
KINDS = ("raw pixels", "untrained", "trained")  # the order of rows


@dataclass(frozen=True)
class ReportConfig:
    """A table of the results of some runs."""

    runs: tyro.conf.Positional[tuple[Path, ...]] = (RUNS / "latest",)
    """Run folders, each with a results.jsonl; the report is written to the last."""


def row_title(result: dict, run: Path) -> str:
    """What a result belongs to, for a person."""
    if result["encoder"] == "raw pixels":
        return f"raw pixels ({result['dataset']})"
    what = "untrained encoder" if result["encoder"] == "untrained" else f"encoder of {run.name}"
    return f"{what} ({result['arch']}, {result['dataset']})"


def newest_cells(runs: list[Path]) -> dict[str, dict[str, dict]]:
    """{row title: {column title: newest result}}, raw pixels first, then untrained, then trained encoders."""
    found = []
    for run in runs:
        for result in read_results(run):
            for column, (protocol, fraction) in COLUMNS.items():
                if result["protocol"].startswith(protocol) and result["fraction"] == fraction:
                    found.append((KINDS.index(result["encoder"]), row_title(result, run), column, result))
    rows: dict[str, dict[str, dict]] = {}
    for _, row, column, result in sorted(found, key=lambda item: item[0]):  # stable: later lines replace earlier
        rows.setdefault(row, {})[column] = result
    return rows


def protocol_notes(results: list[dict]) -> list[str]:
    """One line a protocol: its name, headline metric, seeds, number of images and what was changed."""
    notes = {}
    for r in results:
        changed = "".join(f", {key} {value}" for key, value in r["changed"].items())
        where = f"{r['split']}: {r['train_images']} training and {r['val_images']} validation images of {r['dataset']}"
        notes[f"- `{r['protocol']}` {r['metric']}, seed {r['seed']}{changed}; {where}"] = None
    return list(notes)


def markdown_table(rows: dict[str, dict[str, dict]]) -> str:
    """The table and the notes below it. Columns without any result are left out."""
    columns = [column for column in COLUMNS if any(column in cells for cells in rows.values())]
    protocols = {c: {cells[c]["protocol"] for cells in rows.values() if c in cells} for c in columns}
    lines = [f"| | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    for row, cells in rows.items():
        texts = []
        for column in columns:
            name = f" `{cells[column]['protocol']}`" if column in cells and len(protocols[column]) > 1 else ""
            texts.append(f"{cells[column]['value']:.2f}{name}" if column in cells else "–")
        lines.append(f"| {row} | {' | '.join(texts)} |")
    notes = protocol_notes([cells[column] for column in columns for cells in rows.values() if column in cells])
    return "\n".join([*lines, "", "Percent of the validation images; the last epoch's, not the best.", "", *notes])


def main(config: ReportConfig) -> None:
    rows = newest_cells(list(config.runs))
    if not rows:
        raise UserError(
            f"no kNN, linear or semi-supervised result in {config.runs[-1]}; run `python eval/knn.py` first"
        )
    text = markdown_table(rows)
    print(text)
    (config.runs[-1] / "report.md").write_text(text + "\n")


if __name__ == "__main__":
    run_command(ReportConfig, main)
