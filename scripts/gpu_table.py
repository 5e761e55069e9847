"""The records of scripts/gpu_report.sh as Markdown: the bars first, then what they are made of."""

from collections.abc import Callable

MISSING = "not yet measured"

Found = dict[str, dict]


def mean(value: dict[str, float], digits: int = 3) -> str:
    return f"{value['mean']:.{digits}f} ± {value['ci95']:.{digits}f}"


def cell(found: Found, stage: str, read: Callable[[dict], str]) -> str:
    """What `read` makes of a stage's record; MISSING where there is none, or not that part of it."""
    try:
        return read(found[stage])
    except (KeyError, TypeError):
        return MISSING


def by_cores(cores: int) -> Callable[[dict], str]:
    return lambda stage: mean(stage["by_cores"][str(cores)]["real_over_synthetic"])


def minutes(protocol: str) -> Callable[[dict], str]:
    return lambda stage: f"{stage['results'][protocol]:.2f} % in {stage['seconds'] / 60:.1f} min"


# what, bar, goal, stage, how to read it
BARS = [
    ("real ÷ synthetic training speed, FFCV, 2 cores", "", "≥ 0.99", "loader-ffcv", by_cores(2)),
    ("the same, 4 cores", "≥ 0.95", "", "loader-ffcv", by_cores(4)),
    ("real ÷ synthetic, DALI, 4 cores", "≥ 0.95", "≥ 0.99", "loader-dali", by_cores(4)),
    ("real ÷ synthetic, resident, 2 cores", "", "", "loader-resident", by_cores(2)),
    ("two views of 1024 images, ms", "≤ 12", "≤ 4", "kernels", lambda stage: mean(stage["bf16"]["ms"], 2)),
    (
        "ours ÷ the published way, model step on synthetic images",
        "≥ 1.6",
        "≥ 2.2",
        "step",
        lambda stage: mean(stage["ours_over_published"], 2),
    ),
    (
        "CIFAR-10, ResNet-18, 1000 epochs, linear ≥ 92.1 %",
        "≤ 60 min",
        "≤ 25 min",
        "cifar10-1000",
        minutes("linear-cached"),
    ),
    ("CIFAR-10, 200 epochs, kNN ≥ 84.2 %", "≤ 12 min", "≤ 5 min", "cifar10-200", minutes("knn-mmselfsup")),
]


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    return ["", *(f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows))]


def kernel_rows(stage: dict) -> list[tuple[str, ...]]:
    return [
        (
            f"{stage['views']} × {stage['images']} views of {stage['side_px']} px, {name}",
            mean(of["ms"], 2),
            f"{of['moved_bytes'] / 1e9:.2f}",
            f"{of['share_of_copy_bandwidth']:.0%} of {stage['copy_gb_per_s']:.0f} GB/s",
            f"{of['least_bytes'] / 1e9:.2f}",
        )
        for name, of in stage.items()
        if isinstance(of, dict)
    ]


def step_row(name: str, of: dict) -> tuple[str, ...]:
    mfu, memory = of.get("mfu"), of.get("memory_gb")
    return (
        name,
        mean(of["images_per_s"], 0),
        mean(of["step_ms"], 1),
        f"{mfu:.1%}" if mfu else "–",
        f"{of['data_wait_share']['mean']:.1%}",
        f"{memory:.1f}" if memory else "–",
    )


def step_rows(found: Found) -> list[tuple[str, ...]]:
    rows = [step_row(f"synthetic, {name}", found["step"][name]) for name in ("ours", "published") if "step" in found]
    for stage, record in found.items():
        if stage.startswith("loader-"):
            loader = stage.removeprefix("loader-")
            way = "published way, torchvision loader" if loader == "torch" else f"ours, {loader}"
            for cores, of in record["by_cores"].items():
                rows.append(step_row(f"real, {way}, {cores} cores", of["real"]))
                rows.append(step_row(f"synthetic beside it, {cores} cores", of["synthetic"]))
    return rows


def markdown(found: Found, stages: list[str]) -> str:
    """The report; `found` has the records of the stages that are done, of all `stages`."""
    machines = sorted({f"{of['device']}, torch {of['torch']}" for of in found.values() if "device" in of})
    lines = ["# Measured on a GPU", "", f"{'; '.join(machines) or MISSING}. Command: `bash scripts/gpu_report.sh`."]
    if any(of.get("dry_run") for of in found.values()):
        lines += ["", "**A dry run: toy sizes on a CPU. These numbers mean nothing.**"]
    bars = [(what, bar, goal, cell(found, stage, read)) for what, bar, goal, stage, read in BARS]
    lines += table(("what", "bar", "goal", "measured"), bars)
    if "tests" in found:
        of = found["tests"]
        passed = of["tests"] - of["failures"] - of["errors"] - of["skipped"]
        lines += [
            "",
            f"`pytest -m gpu`: {passed} passed, {of['failures'] + of['errors']} failed, {of['skipped']} skipped.",
        ]
        lines += [f"- failed: {name}" for name in of["failed"]]
    if "kernels" in found:
        head = ("view kernels", "ms", "GB moved", "share of a copy's bandwidth", "GB that no design saves")
        lines += table(head, kernel_rows(found["kernels"]))
    if rows := step_rows(found):
        head = ("ResNet-50, 2 × 224 px, batch 1024", "images/s", "ms a step", "MFU", "data wait", "GB of GPU memory")
        lines += table(head, rows)
    if "cifar10-speed" in found:
        ways = found["cifar10-speed"]["by_way"].items()
        rows = [(*step_row(name, of), f"{of['epoch_s']:.2f}") for name, of in ways]
        head = (
            "CIFAR-10, ResNet-18, batch 256, resident",
            "images/s",
            "ms a step",
            "MFU",
            "data wait",
            "GB",
            "s an epoch",
        )
        lines += table(head, rows)
    for stage in ("cifar10-200", "cifar10-1000"):
        if stage in found:
            of = found[stage]
            curve = ", ".join(f"{float(epoch):g}: {value}" for epoch, value in of["knn_by_epoch"].items())
            lines += [
                "",
                f"{stage}: {of['epoch_s']:.2f} s an epoch, {of['starts']} starts; kNN top-1 by epoch: {curve}",
            ]
    missing = [stage for stage in stages if stage not in found]
    if missing:
        lines += ["", f"{MISSING[0].upper()}{MISSING[1:]}: {', '.join(missing)}."]
    return "\n".join(lines) + "\n"
