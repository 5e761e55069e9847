"""What rival.py's records say: each side's accuracy and time, and how many times faster one is; a table, a picture.

A record has, for "ours" and "theirs", `start_s`, the `seconds` of each epoch, and `knn`, [epoch, top-1 in percent] from
epoch 0 on.
"""

from pathlib import Path
from typing import Any

import numpy as np
from measure import as_text, interval

from pipeline.disk import whole_file

SIDES = {"ours": "this project", "theirs": "lightly"}  # in records and in words


def done_s(record: dict[str, Any], name: str) -> np.ndarray:
    """Seconds that a side has trained after each epoch, its start as epoch 0: (epochs + 1,)."""
    return np.cumsum([record["start_s"][name], *record["seconds"][name]])


def seconds_to(record: dict[str, Any], name: str, accuracy: float) -> float:
    """After how many seconds a side first had this accuracy, linearly between its measurements. It has to get there."""
    epochs, top1 = zip(*record["knn"][name], strict=True)
    at = next(i for i, value in enumerate(top1) if value >= accuracy)
    seconds = done_s(record, name)[list(epochs)]
    return float(np.interp(accuracy, top1[max(at - 1, 0) : at + 1], seconds[max(at - 1, 0) : at + 1]))


def summary(record: dict[str, Any]) -> dict[str, Any]:
    """What a table says of one run. `faster`: lightly's seconds ÷ ours, of each pair of epochs and to one accuracy."""
    final = {name: record["knn"][name][-1][1] for name in SIDES}
    both = min(final.values())
    to = {name: seconds_to(record, name, both) for name in SIDES}
    pairs = [theirs / ours for ours, theirs in zip(*(record["seconds"][name] for name in SIDES), strict=True)]
    return {
        "knn_top1": final,
        "epoch_s": {name: interval(record["seconds"][name]) for name in SIDES},
        "epoch_faster": interval(pairs),
        "both_reach": both,
        "seconds_to_it": to,
        "to_it_faster": to["theirs"] / to["ours"],
    }


def table(records: dict[int, dict[str, Any]]) -> str:
    """Markdown of the runs by seed."""
    columns = ["seed", "kNN top-1, %: ours", "lightly", "s an epoch: ours", "lightly", "lightly ÷ ours"]
    columns += ["both reach, %", "s to it: ours", "lightly", "lightly ÷ ours"]
    rows = [columns, ["---"] * len(columns)]
    for seed, record in records.items():
        found = summary(record)
        row = [str(seed), *(f"{found['knn_top1'][name]:.2f}" for name in SIDES)]
        row += [*(as_text(found["epoch_s"][name], 2) for name in SIDES), as_text(found["epoch_faster"], 2)]
        row += [f"{found['both_reach']:.2f}", *(f"{found['seconds_to_it'][name]:.0f}" for name in SIDES)]
        rows.append([*row, f"{found['to_it_faster']:.2f}"])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def draw(records: dict[int, dict[str, Any]], path: Path) -> None:
    """The accuracy of both sides and all seeds over epochs and over minutes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    by_epoch, by_time = figure.subplots(1, 2, sharey=True)
    for colour, name in enumerate(SIDES):
        for number, record in enumerate(records.values()):
            epochs, top1 = zip(*record["knn"][name], strict=True)
            by_epoch.plot(epochs, top1, f"C{colour}", label=None if number else SIDES[name])
            by_time.plot(done_s(record, name)[list(epochs)] / 60, top1, f"C{colour}")
    by_epoch.set(xlabel="epoch", ylabel="kNN top-1, %")
    by_epoch.legend()
    by_time.set(xlabel="minutes of training")
    with whole_file(path) as file:
        figure.savefig(file, format="png", dpi=110)
