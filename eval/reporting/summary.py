"""What some runs measured, as one table: a row an encoder, a column a kind of evaluation.

A row is what was measured: raw pixels, an untrained encoder, a run's encoder. Results stand in one row only where they
are of the same network of the same checkpoint, the same dataset (by digests) and the same side of the views; titles
that would be equal then say what differs. A cell is the newest result of its kind. Every protocol that a column's
numbers come from is named below the table, and in the cell itself where one column holds several.
"""

import json
from pathlib import Path

from eval.features import KINDS
from eval.reporting.page import PARTS, TABLES, with_code
from pipeline.errors import UserError

# Column title → (beginning of the protocol's name, fraction of the labels).
COLUMNS = {
    "kNN top-1": ("knn", 1.0),
    "linear top-1": ("linear", 1.0),
    "1 % semi-supervised top-1": ("semisup", 0.01),
    "10 % semi-supervised top-1": ("semisup", 0.1),
}
EXPLANATION = "Percent of the validation images; the last epoch's, not the best."

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


def row_title(result: dict, run: Path) -> str:
    """What a result belongs to, for a person."""
    if result["encoder"] == "raw pixels":
        return f"raw pixels ({result['dataset']})"
    what = "untrained encoder" if result["encoder"] == "untrained" else f"encoder of {run.name}"
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


def newest_cells(results: list[tuple[Path, dict]]) -> Rows:
    """(run, result) pairs, oldest first → rows: raw pixels first, then untrained, then trained encoders."""
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


def table_cells(rows: Rows) -> tuple[list[str], list[list[str]]]:
    """Column titles and rows as text, the row's title first. Columns without any result are left out."""
    columns = [column for column in COLUMNS if any(column in cells for cells in rows.values())]
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


def summary_markdown(rows: Rows) -> str:
    """The table and the notes below it."""
    return TABLES.summary(*table_cells(rows), EXPLANATION, protocol_notes(rows)).strip()


def measured(rows: Rows) -> str:
    """The table of results as HTML."""
    if not rows:
        raise UserError("no kNN, linear or semi-supervised result; `python eval/knn.py` measures the first")
    head, body = table_cells(rows)
    return PARTS.measured(head, [[row[0], *map(with_code, row[1:])] for row in body], EXPLANATION, protocol_notes(rows))
