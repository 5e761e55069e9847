"""A result for a person, on stderr: what was measured on what, and a small table. Programs read results.jsonl."""

import re
from pathlib import Path

from pipeline.command import shown

PERCENTAGES = re.compile("top[15]|map|AP")  # in the name of a value; others are losses, rates, numbers of epochs


def rounded(values: dict) -> dict:
    """The values with two decimals where they are percentages: an image of 10,000 is one in the second."""
    return {name: round(value, 2) if PERCENTAGES.search(name) else value for name, value in values.items()}


def spoken(result: dict, path: Path) -> str:
    """The sentence and the table of a result that stands in `path`."""
    metric, values = result["metric"], result["values"]
    network = f"the {result['encoder']} {result['arch']}" if result["encoder"] != "raw pixels" else "raw pixels"
    step = f", step {result['step']}" if result["step"] else ""
    share = f"{result['train_images']} labelled training images"
    lines = [
        f"{metric} {values[metric]:.2f} %: {network} of {shown(Path(result['checkpoint']))}{step}, measured on "
        f"{result['val_images']} images of {result['dataset']} ({result['classes']} classes, {share}), "
        f"protocol {result['protocol']}; written to {shown(path)}"
    ]
    if result["changed"]:
        changed = ", ".join(f"{name} {_short(value)}" for name, value in result["changed"].items())
        lines.append(f"modified: not as published are {changed}")
    width = max(len(name) for name in values)
    for name, value in values.items():
        text = f"{value:8.2f} %" if PERCENTAGES.search(name) else f"{value:8.4g}"
        lines.append(f"    {name:{width}} {text}{'  <' if name == metric else ''}")
    return "\n".join(lines)


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
