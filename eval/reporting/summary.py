"""What some runs measured, as one table: a row an encoder, a column a kind of evaluation.

A row is what was measured: raw pixels, an untrained encoder, a run's encoder. Results stand in one row only where they
are of the same network of the same checkpoint, the same dataset (by digests) and the same side of the views; titles
that would be equal then say what differs. A cell is the newest result of its kind. Every protocol that a column's
numbers come from is named below the table, and in the cell itself where one column holds several.
"""

import csv
import io
import json
import re
from pathlib import Path

from eval.features import KINDS
from eval.reporting.page import PARTS, TABLES, with_code
from pipeline.errors import UserError

# Column title → (beginning of the protocol's name, fraction of the labels; detection has none).
COLUMNS: dict[str, tuple[str, float | None]] = {
    "kNN top-1": ("knn", 1.0),
    "linear top-1": ("linear", 1.0),
    "linear on stage 5 top-1": ("heads", 1.0),
    "1 % semi-supervised top-1": ("semisup", 0.01),
    "10 % semi-supervised top-1": ("semisup", 0.1),
    "SVM mAP": ("svm", 1.0),
    "transfer top-1": ("transfer", 1.0),
    "detection AP": ("detection", None),
}
NO_RESULT = (
    "no result for a table yet; on labelled images `python eval/knn.py --checkpoint RUN --data DATASET` gets one"
)
EXPLANATION = "Percent of the validation images, or mean average precision; the last epoch's, not the best."

Rows = dict[str, dict[str, dict]]  # {row title: {column title: newest result}}


def newest_of_encoder(results: list[dict]) -> dict | None:
    """The newest result of a trained encoder, else of an untrained one, else None."""
    of_kind = {r["encoder"]: r for r in results}
    return of_kind.get("trained", of_kind.get("untrained"))


def row_key(result: dict) -> tuple:
    """What results of one row share. Of raw pixels the checkpoint only decides how they are normalized."""
    if result["encoder"] == "raw pixels":
        of = [json.dumps(result.get("normalization"))]
    else:
        of = [result["checkpoint_sha256"], result.get("key", "")]
    data = json.dumps(result["dataset_sha256"], sort_keys=True)
    return KINDS.index(result["encoder"]), result["resolution_px"], data, *of


def row_title(result: dict, run: str) -> str:
    """What a result belongs to, for a person."""
    if result["encoder"] == "raw pixels":
        return f"raw pixels ({result['dataset']})"
    what = "untrained encoder" if result["encoder"] == "untrained" else f"encoder of {run}"
    return f"{what} ({result['arch']}, {result['dataset']})"


def facts_of(result: dict) -> list[str]:
    """What can tell a row's title from an equal one, the most telling first; together they hold all of its key."""
    facts = [
        f"{result['resolution_px']} px",
        f"network {result.get('key', '')}",
        f"data {result['dataset_sha256'].get('train', '')[:8]}/{result['dataset_sha256'].get('val', '')[:8]}",
    ]
    if result["encoder"] == "raw pixels":
        return [*facts, f"normalized by {result.get('normalization')}"]
    return [f"step {result['step']}", Path(result["checkpoint"]).name, *facts, result["checkpoint_sha256"][:8]]


def told_apart(titles: list[str], facts: list[list[str]]) -> list[str]:
    """The titles, those that are equal with as many facts in their parentheses as make them differ."""
    told: list[str] = []
    for title in titles:
        group = [own for other, own in zip(titles, facts, strict=True) if other == title]
        apart = 1
        chosen: list[int] = []
        for i in range(len(group[0])):
            now = len({tuple(own[c] for c in (*chosen, i)) for own in group})
            if now > apart:
                chosen, apart = [*chosen, i], now
        own = facts[len(told)]
        told.append(f"{title[:-1]}; {', '.join(own[c] for c in chosen)})" if chosen else title)
    return told


def newest_cells(results: list[tuple[str, dict]]) -> Rows:
    """(run's name, result) pairs, oldest first → rows: raw pixels first, then untrained, then trained encoders."""
    cells: dict[tuple, dict[str, dict]] = {}
    newest: dict[tuple, tuple[str, dict]] = {}
    for run, result in results:
        for column, (protocol, fraction) in COLUMNS.items():
            if result["protocol"].startswith(protocol) and result["fraction"] == fraction:
                cells.setdefault(row_key(result), {})[column] = result
                newest[row_key(result)] = row_title(result, run), result
    keys = sorted(cells, key=lambda key: key[0])  # stable: in the order of their first results
    titles = told_apart([newest[key][0] for key in keys], [facts_of(newest[key][1]) for key in keys])
    return {title: cells[key] for title, key in zip(titles, keys, strict=True)}


def table_columns(rows: Rows) -> list[str]:
    """The columns that have a result."""
    return [column for column in COLUMNS if any(column in cells for cells in rows.values())]


def table_cells(rows: Rows) -> tuple[list[str], list[list[str]]]:
    """Column titles and rows as text, the row's title first."""
    columns = table_columns(rows)
    protocols = {c: {cells[c]["protocol"] for cells in rows.values() if c in cells} for c in columns}
    body = []
    for row, cells in rows.items():
        texts = [row]
        for column in columns:
            name = f" `{cells[column]['protocol']}`" if column in cells and len(protocols[column]) > 1 else ""
            texts.append(f"{cells[column]['value']:.2f}{name}" if column in cells else "–")
        body.append(texts)
    return ["", *columns], body


def protocol_notes(rows: Rows) -> list[str]:
    """One line a protocol, column by column: its name, headline metric, seed, number of images, what was changed."""
    notes: list[str] = []
    for column in COLUMNS:
        for r in (cells[column] for cells in rows.values() if column in cells):
            changed = "".join(f", {key} {value}" for key, value in r["changed"].items())
            images = f"{r['train_images']} training and {r['val_images']} validation images of {r['dataset']}"
            notes.append(f"`{r['protocol']}` {r['metric']}, seed {r['seed']}{changed}; {r['split']}: {images}")
    return list(dict.fromkeys(notes))


def controls_ahead(rows: Rows) -> str:
    """One sentence that says where raw pixels or an untrained encoder did at least as well; "" where they did not."""
    ahead = []
    for title, cells in rows.items():
        for column, ours in cells.items():
            others = [(other, row[column]) for other, row in rows.items() if column in row and row is not cells]
            ahead += [
                f"{column} of {other} is {control['value']:.2f}, of {title} {ours['value']:.2f}"
                for other, control in others
                if ours["encoder"] == "trained" != control["encoder"]
                and alike(ours, control)
                and control["value"] >= ours["value"]
            ]
    return f"Controls do as well or better: {'; '.join(ahead)}." if ahead else ""


def alike(one: dict, other: dict) -> bool:
    """Whether two numbers may be compared: the same protocol with the same settings on the same images.

    The side of the views, and with it how maps are pooled, may differ: it is the encoder's own, and raw pixels have at
    most 32 px. They have no stages either.
    """
    own = {"resolution_px", "pooling"} | ({"stage"} if "raw pixels" in (one["encoder"], other["encoder"]) else set())

    def of(result: dict) -> tuple:
        changed = {name: value for name, value in result["changed"].items() if name not in own}
        return result["protocol"].removesuffix("-modified"), changed, result["dataset_sha256"], result["split"]

    return of(one) == of(other)


def difference(rows: Rows, first: str, last: str) -> list[str]:
    """A row of the table: what the run `last` has more than the run `first`, where the numbers may be compared."""
    texts = [f"{last} minus {first}"]
    for column in table_columns(rows):
        pairs = [(a, b) for a in of_run(rows, column, first) for b in of_run(rows, column, last) if alike(a, b)]
        a, b = max(pairs, key=lambda pair: (pair[1]["time"], pair[0]["time"]), default=(None, None))
        texts.append(f"{b['value'] - a['value']:+.2f}" if a and b else "–")
    return texts


def of_run(rows: Rows, column: str, run: str) -> list[dict]:
    """A column's numbers of a run's own encoders; a control of raw pixels is none."""
    cells = [row[column] for row in rows.values() if column in row]
    return [cell for cell in cells if cell["run"] == run and cell["encoder"] != "raw pixels"]


def summary_markdown(rows: Rows, compared: list[str]) -> str:
    """The table and the notes below it. `compared`: the row of differences, [] for none."""
    head, body = table_cells(rows)
    return TABLES.summary(head, body + [compared] * bool(compared), EXPLANATION, protocol_notes(rows)).strip()


def summary_csv(rows: Rows) -> str:
    """The table as CSV: a column for each protocol, plain numbers, nothing where nothing was measured."""
    columns = [
        (column, protocol)
        for column in table_columns(rows)
        for protocol in sorted({cells[column]["protocol"] for cells in rows.values() if column in cells})
    ]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["encoder", *(f"{column} ({protocol})" for column, protocol in columns)])
    for title, cells in rows.items():
        found = [(cells.get(column), protocol) for column, protocol in columns]
        values = [f"{cell['value']:.2f}" if cell and cell["protocol"] == protocol else "" for cell, protocol in found]
        writer.writerow([title, *values])
    return text.getvalue().rstrip("\n")


def summary_latex(rows: Rows, compared: list[str]) -> str:
    """The table as a LaTeX tabular that needs no package; what its numbers are stands below it as comments."""
    head, body = table_cells(rows)
    lines = [" & ".join(map(as_latex, row)) + r" \\" for row in (head, *body, *([compared] * bool(compared)))]
    notes = [f"% {' '.join(note.split())}" for note in (EXPLANATION, *protocol_notes(rows))]
    begin = rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}"
    return "\n".join([begin, r"\hline", lines[0], r"\hline", *lines[1:], r"\hline", r"\end{tabular}", *notes])


def as_latex(text: str) -> str:
    """Text with LaTeX's own characters escaped, `marked` parts in typewriter letters."""
    names = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--", "−": "$-$"}
    text = re.sub("^-", "−", " ".join(text.split()))  # a negative number
    escaped = re.sub(r"[\\~^–−#$%&_{}]", lambda found: names.get(found[0], "\\" + found[0]), text)
    return re.sub(r"`([^`]*)`", r"\\texttt{\1}", escaped)


def measured(rows: Rows, compared: list[str]) -> str:
    """The table of results as HTML."""
    if not rows:
        raise UserError(NO_RESULT)
    head, body = table_cells(rows)
    cells = [[row[0], *map(with_code, row[1:])] for row in body]
    return PARTS.measured(head, cells, compared, EXPLANATION, protocol_notes(rows))
