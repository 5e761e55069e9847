"""The records of scripts/gpu_report.sh as short Markdown: the bars first, then every stage's record, a line a part."""

from collections.abc import Callable, Iterator

from measure import as_text

MISSING = "not yet measured"
MOST_CHARACTERS = 8000
MOST_IN_A_LINE = 300
ABOUT = ("rounds", "complete", "error", "device", "torch", "dry_run")  # of a record, said elsewhere in the report

Found = dict[str, dict]


def cell(found: Found, stage: str, read: Callable[[dict], str]) -> str:
    """What `read` makes of a stage's record; MISSING where there is none, or not that part of it."""
    try:
        text = read(found[stage])
    except (KeyError, TypeError):
        return MISSING
    return text if found[stage]["complete"] else f"{text} (after {found[stage]['rounds']} rounds, not complete)"


def by_cores(cores: int) -> Callable[[dict], str]:
    return lambda stage: as_text(stage["by_cores"][str(cores)]["real_over_synthetic"])


def differences(stage: dict) -> str:
    return ", ".join(f"{stage['differ'][name]} of {count} differ ({name})" for name, count in stage["values"].items())


def accuracy(stage: dict) -> str:
    return f"{stage['knn']:.2f} % in {stage['seconds'] / 60:.1f} min ({stage['way']})"


# what, bar, goal, stage, how to read it
BARS = [
    ("GPU views = numba views", "all values", "all values", "gate", differences),
    ("two views of 1024 images, bf16, ms", "≤ 5", "≤ 2", "kernels", lambda stage: as_text(stage["bf16"]["ms"], 2)),
    (
        "ours ÷ the published way, ResNet-50 step, batch 512 each",
        "≥ 1.6",
        "≥ 2.2",
        "step",
        lambda stage: as_text(stage["ours_over_published"], 2),
    ),
    ("real ÷ synthetic, fast loader, 4 cores", "≥ 0.97", "", "step", by_cores(4)),
    ("the same, 2 cores", "", "≥ 0.99", "step", by_cores(2)),
    ("real ÷ synthetic, DALI, 4 cores", "", "", "loader-dali", by_cores(4)),
    ("CIFAR-10, 200 epochs, kNN ≥ 84.2 %", "≤ 8 min", "≤ 5 min", "cifar", accuracy),
    ("its encoder, linear on kept features", "", "", "linear", lambda stage: f"{stage['linear_cached']:.2f} %"),
]


def parts(name: str, of: dict) -> Iterator[str]:
    """A line of a record's own values, then those of the records in it, each under its name."""
    inner = {key: value for key, value in of.items() if isinstance(value, dict) and "ci95" not in value}
    own = {key: as_text(value) if isinstance(value, dict) else value for key, value in of.items() if key not in inner}
    if own:
        yield f"- {name}: " + ", ".join(f"{key} {value}".strip() for key, value in own.items())[:MOST_IN_A_LINE]
    for key, value in inner.items():
        yield from parts(f"{name}, {key}", value)


def stage_lines(stage: str, of: dict) -> Iterator[str]:
    """Why a stage is not complete, and what it has measured; lists a line an entry."""
    if not of.get("complete"):
        yield f"{stage}: {of.get('error', MISSING)}"[:MOST_IN_A_LINE] + (
            f" (after {of['rounds']} rounds)" if of else ""
        )
    rows = {key: value for key, value in of.items() if isinstance(value, list)}
    yield from parts(stage, {key: value for key, value in of.items() if key not in rows and key not in ABOUT})
    for name, entries in rows.items():
        for entry in entries:
            yield from parts(f"{stage}, {name}", entry if isinstance(entry, dict) else {"": entry})


def markdown(found: Found, stages: list[str], command: str) -> str:
    """The report; `found` has the records there are, `stages` are those that were asked for."""
    devices = sorted({f"{of['device']}, torch {of['torch']}" for of in found.values() if "device" in of})
    lines = ["# Measured on a GPU", "", "; ".join(devices) or MISSING, "", f"Command: `{command}`", ""]
    if any(of.get("dry_run") for of in found.values()):
        lines += ["**A dry run: toy sizes on a CPU. These numbers mean nothing.**", ""]
    lines += ["| what | bar | goal | measured |", "| --- | --- | --- | --- |"]
    lines += [f"| {what} | {bar} | {goal} | {cell(found, stage, read)} |" for what, bar, goal, stage, read in BARS]
    for stage in dict.fromkeys([*stages, *found]):
        lines += ["", *(line.replace("\n", " ") for line in stage_lines(stage, found.get(stage, {})))]
    text = "\n".join(lines) + "\n"
    if len(text) <= MOST_CHARACTERS:
        return text
    return text[: MOST_CHARACTERS - 60].rsplit("\n", 1)[0] + "\n\nThe rest is in report.json.\n"
