"""The records of scripts/gpu_report.sh as short Markdown: the bars first, then what they are made of."""

from collections.abc import Callable, Iterator

MISSING = "not yet measured"
MOST_CHARACTERS = 8000
MOST_TESTS = 8  # failed ones that are named

Found = dict[str, dict]


def mean(value: dict[str, float | None], digits: int = 3) -> str:
    half = value["ci95"]
    return f"{value['mean']:.{digits}f}" + ("" if half is None else f" ± {half:.{digits}f}")


def share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def cell(found: Found, stage: str, read: Callable[[dict], str]) -> str:
    """What `read` makes of a stage's record; MISSING where there is none, or not that part of it."""
    try:
        text = read(found[stage])
    except (KeyError, TypeError):
        return MISSING
    return text if found[stage]["complete"] else f"{text} (after {found[stage]['rounds']} rounds, not complete)"


def by_cores(cores: int) -> Callable[[dict], str]:
    return lambda stage: mean(stage["by_cores"][str(cores)]["real_over_synthetic"])


def differences(stage: dict) -> str:
    return ", ".join(f"{stage['differ'][name]} of {count} differ ({name})" for name, count in stage["values"].items())


def accuracy(stage: dict) -> str:
    return f"{stage['knn']:.2f} % in {stage['seconds'] / 60:.1f} min ({stage['way']})"


# what, bar, goal, stage, how to read it
BARS = [
    ("GPU views = numba views", "all values", "all values", "gate", differences),
    ("two views of 1024 images, bf16, ms", "≤ 5", "≤ 2", "kernels", lambda stage: mean(stage["bf16"]["ms"], 2)),
    (
        "ours ÷ the published way, ResNet-50 step, batch 512 each",
        "≥ 1.6",
        "≥ 2.2",
        "step",
        lambda stage: mean(stage["ours_over_published"], 2),
    ),
    ("real ÷ synthetic, fast loader, 4 cores", "≥ 0.97", "", "step", by_cores(4)),
    ("the same, 2 cores", "", "≥ 0.99", "step", by_cores(2)),
    ("real ÷ synthetic, DALI, 4 cores", "", "", "loader-dali", by_cores(4)),
    ("CIFAR-10, 200 epochs, kNN ≥ 84.2 %", "≤ 8 min", "≤ 5 min", "cifar", accuracy),
    ("its encoder, linear on kept features", "", "", "linear", lambda stage: f"{stage['linear_cached']:.2f} %"),
]


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    return ["", *(f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows))] if rows else []


def kernel_rows(stage: dict) -> Iterator[tuple[str, ...]]:
    for name in ("bf16", "float32"):
        of = stage.get(name)
        if of:
            least = f"floor {of['floor_ms']:.2f} ms; queued in {mean(of['host_ms'], 2)} ms"
            yield f"all, {name}", mean(of["ms"], 3), least
            for kernel, one in of["kernels"].items():
                yield f"{kernel}, {name}", mean(one["ms"], 3), share(one["share_of_copy_bandwidth"])


def step_row(name: str, of: dict) -> tuple[str, ...]:
    if "error" in of:
        return name, of["error"][:120].replace("|", "/").replace("\n", " "), "", "", "", ""
    memory = "–" if of["memory_gb"] is None else f"{of['memory_gb']:.1f}"
    speed = mean(of["images_per_s"], 0), mean(of["step_ms"], 2)
    return name, *speed, share(of["mfu"]), share(of["data_wait_share"]["mean"]), memory


def step_rows(found: Found) -> Iterator[tuple[str, ...]]:
    names = {"ours": "synthetic, ours", "published": "synthetic, published way", "ours_full": "synthetic, ours"}
    for part, name in names.items():
        if of := found.get("step", {}).get(part):
            yield step_row(f"{name}, batch {of['batch']}", of)
    for stage in ("step", "loader-dali"):
        for cores, of in found.get(stage, {}).get("by_cores", {}).items():
            name = "DALI" if stage == "loader-dali" else "fast loader"
            yield step_row(f"real, {name}, {cores} cores, batch {of['real']['batch']}", of["real"])
            yield step_row(f"synthetic beside it, {cores} cores", of["synthetic"])


def way_rows(stage: dict) -> Iterator[tuple[str, ...]]:
    for way, of in stage.get("by_way", {}).items():
        yield *step_row(way, of), f"{of['epoch_s']:.2f}" if "epoch_s" in of else "–"


def tuned_rows(stage: dict) -> Iterator[tuple[str, ...]]:
    for row in stage.get("rows", []):
        setting = dict(row["settings"])
        kernel = setting.pop("kernel")
        if "error" in row:
            yield kernel, str(setting or "usual"), row["error"][:60].replace("|", "/").replace("\n", " "), ""
        else:
            yield kernel, str(setting or "usual"), mean(row["ms"], 3), "yes" if row["equal"] else "NO"


def other_lines(found: Found) -> Iterator[str]:
    if "tests" in found:
        of = found["tests"]
        counts = ", ".join(f"{of[name]} {name}" for name in ("passed", "failed", "errors", "skipped"))
        yield f"`pytest -m gpu`: {counts}."
        yield from (f"- failed: {line[:160]}" for line in of["failed_tests"][:MOST_TESTS])
    if of := found.get("cifar", {}).get("knn_by_epoch"):
        seconds = found["cifar"]["epoch_s"]
        curve = ", ".join(f"{float(epoch):g}: {value}" for epoch, value in of.items())
        yield f"CIFAR-10: {seconds} s an epoch, way: {found['cifar']['way']}; kNN top-1 by epoch: {curve}."
    for pair in found.get("decoders", {}).get("pairs", []):
        of, by = pair["values_that_differ"] / pair["values"], " – ".join(pair["decoders"])
        yield f"- decoders {by}: {of:.2e} of the values differ, by at most {pair['largest_difference_255']} of 255"


def machine(found: Found) -> str:
    devices = sorted({f"{of['device']}, torch {of['torch']}" for of in found.values() if "device" in of})
    card = found.get("card", {})
    versions = ", ".join(f"{name} {value}" for name, value in card.get("versions", {}).items() if value)
    kernels = found.get("kernels", {})
    copy = f" A copy moves {kernels['copy_gb_per_s']:.0f} GB/s." if "copy_gb_per_s" in kernels else ""
    return f"{'; '.join(devices) or MISSING}. {versions}.{copy}"


def markdown(found: Found, stages: list[str], command: str) -> str:
    """The report; `found` has the records there are, `stages` are those that were asked for."""
    lines = ["# Measured on a GPU", "", machine(found), "", f"Command: `{command}`"]
    if any(of.get("dry_run") for of in found.values()):
        lines += ["", "**A dry run: toy sizes on a CPU. These numbers mean nothing.**"]
    bars = [(what, bar, goal, cell(found, stage, read)) for what, bar, goal, stage, read in BARS]
    lines += table(("what", "bar", "goal", "measured"), bars)
    for stage in dict.fromkeys([*stages, *found]):
        of = found.get(stage, {})
        if not of.get("complete"):
            why = of.get("error", MISSING).replace("\n", " ")[:240]
            lines += ["", f"{stage}: {why}" + (f" (after {of['rounds']} rounds)" if of else "")]
    if others := list(other_lines(found)):
        lines += ["", *others]
    head = "images/s", "ms a step", "MFU", "data wait", "GB of GPU memory"
    lines += table(("ResNet-50, 2 × 224 px", *head), list(step_rows(found)))
    lines += table(("CIFAR-10, ResNet-18, batch 256", *head, "s an epoch"), list(way_rows(found.get("ways", {}))))
    kernels = list(kernel_rows(found.get("kernels", {})))
    lines += table(("view kernels", "ms", "share of the copy's bandwidth"), kernels)
    lines += table(("kernel", "launch settings", "ms", "same views"), list(tuned_rows(found.get("tune", {}))))
    text = "\n".join(lines) + "\n"
    if len(text) <= MOST_CHARACTERS:
        return text
    return text[: MOST_CHARACTERS - 60].rsplit("\n", 1)[0] + "\n\nThe rest is in report.json.\n"
