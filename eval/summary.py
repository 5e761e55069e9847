"""What some runs measured, as one table: a row an encoder, a column a kind of evaluation.

A row is what was measured (raw pixels, an untrained encoder, a run's encoder), a column a kind of evaluation; a cell
is the newest result of that kind. Every protocol that a column's numbers come from is named below the table, and in
the cell itself where one column holds several.
"""

from pathlib import Path

# Column title → (beginning of the protocol's name, fraction of the labels).
COLUMNS = {
    "kNN top-1": ("knn", 1.0),
    "linear top-1": ("linear", 1.0),
    "1 % semi-supervised top-1": ("semisup", 0.01),
    "10 % semi-supervised top-1": ("semisup", 0.1),
}
KINDS = ("raw pixels", "untrained", "trained")  # the order of rows
EXPLANATION = "Percent of the validation images; the last epoch's, not the best."

Rows = dict[str, dict[str, dict]]  # {row title: {column title: newest result}}


def newest_of_encoder(results: list[dict]) -> dict | None:
    """The newest result of a trained encoder, else of an untrained one, else None."""
    of_kind = {r["encoder"]: r for r in results}
    return of_kind.get("trained", of_kind.get("untrained"))


def row_title(result: dict, run: Path) -> str:
    """What a result belongs to, for a person."""
    if result["encoder"] == "raw pixels":
        return f"raw pixels ({result['dataset']})"
    what = "untrained encoder" if result["encoder"] == "untrained" else f"encoder of {run.name}"
    return f"{what} ({result['arch']}, {result['dataset']})"


def newest_cells(results: list[tuple[Path, dict]]) -> Rows:
    """(run, result) pairs, oldest first → rows: raw pixels first, then untrained, then trained encoders."""
    found = []
    for run, result in results:
        for column, (protocol, fraction) in COLUMNS.items():
            if result["protocol"].startswith(protocol) and result["fraction"] == fraction:
                found.append((KINDS.index(result["encoder"]), row_title(result, run), column, result))
    rows: Rows = {}
    for _, row, column, result in sorted(found, key=lambda item: item[0]):  # stable: later lines replace earlier
        rows.setdefault(row, {})[column] = result
    return rows


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
    notes = {}
    for column in COLUMNS:
        for r in (cells[column] for cells in rows.values() if column in cells):
            changed = "".join(f", {key} {value}" for key, value in r["changed"].items())
            images = f"{r['train_images']} training and {r['val_images']} validation images of {r['dataset']}"
            notes[f"`{r['protocol']}` {r['metric']}, seed {r['seed']}{changed}; {r['split']}: {images}"] = None
    return list(notes)


def summary_markdown(rows: Rows) -> str:
    """The table and the notes below it."""
    head, body = table_cells(rows)
    lines = [f"|{head[0]} | {' | '.join(head[1:])} |", "|---|" + "---|" * (len(head) - 1)]
    lines += [f"| {' | '.join(texts)} |" for texts in body]
    return "\n".join([*lines, "", EXPLANATION, "", *(f"- {note}" for note in protocol_notes(rows))])
