"""What a line of results.jsonl has to hold for this program to read it: every field that it uses, of which kind.

A line may be damaged, from an older version or from another program. It is checked here once, so that whatever shows
or compares results can rely on it.
"""

from collections.abc import Callable
from typing import Any

from eval.features import KINDS
from pipeline.spec import is_whole
from train.curves import is_number

LARGEST_WHOLE = 1 << 64


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return is_whole(value, 0) and value < LARGEST_WHOLE


def _is_seed_number(value: Any) -> bool:
    return is_whole(value, -LARGEST_WHOLE) and value < LARGEST_WHOLE


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict)


TEXTS = ("protocol", "metric", "arch", "checkpoint", "checkpoint_sha256", "time", "dataset", "split")
COUNTS = ("step", "resolution_px", "train_images", "val_images", "classes")
NEEDED: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(TEXTS, _is_text),
    **dict.fromkeys(COUNTS, _is_count),
    **dict.fromkeys(("value", "seconds", "epochs"), is_number),
    **dict.fromkeys(("details", "settings", "changed"), _is_dict),
    "encoder": KINDS.__contains__,
    "seed": _is_seed_number,
    "fraction": lambda value: value is None or is_number(value),
    "values": lambda values: _is_dict(values) and all(map(is_number, values.values())),
    "dataset_sha256": lambda digests: _is_dict(digests) and all(map(_is_text, digests.values())),
}
LATER: dict[str, Callable[[Any], bool]] = {  # what older lines do not have
    "key": _is_text,
    "data": lambda path: _is_text(path) and "\0" not in path,
}


def wrong_fields(line: dict) -> list[str]:
    """The names of the fields that a line lacks or has as another kind of value; [] for a result."""
    wrong = [name for name, holds in NEEDED.items() if name not in line or not holds(line[name])]
    wrong += [name for name, holds in LATER.items() if name in line and not holds(line[name])]
    if wrong:
        return wrong
    # Of several seeds each has the values that the line has means of.
    means = [name for name in line["values"] if not name.endswith("_std")]
    seeds = line["details"].get("seeds") or []
    if not isinstance(seeds, list) or not all(_is_seed(seed, means) for seed in seeds):
        wrong = ["details"]
    return wrong


def _is_seed(seed: Any, names: list[str]) -> bool:
    return _is_dict(seed) and _is_seed_number(seed.get("seed")) and all(is_number(seed.get(name)) for name in names)
