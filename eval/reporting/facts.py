"""What was measured, in words: a run's dataset, network, batch, rates, device, hours and command.

All of it is read from the run's own record: config.json, env.json, metrics.jsonl, backbone.safetensors. Of somebody
else's file only its results tell.
"""

import json
import math
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from safetensors import SafetensorError, safe_open

from eval.protocols import published_file
from eval.reporting.comparison import duration
from pipeline.disk import read_lines
from pipeline.errors import UserError
from pipeline.storage.shards import open_stored
from train.checkpoint import BACKBONE
from train.config import AMP, PretrainConfig, as_plain, projector_widths, recipe
from train.curves import is_number
from train.methods.barlow_ablations import is_ablated
from train.run_data import dataset_sha256, train_beton
from train.runlog import METRICS

RESTORE = "restore the file, or move it away to see the page without it"
# Settings that the facts say in words.
IN_FACTS = set(
    "method fraction arch stem projector predictor resolution resolution_schedule views without epochs global_batch "
    "lr_weights lr_biases warmup_epochs paper_world_size weight_decay init_from seed amp".split()
)


@dataclass(frozen=True)
class Run:
    """A run folder with what it says of itself: `config` and `environment` are empty where it was not trained here.

    name      tells it from the other runs of the page
    results   the lines of its results.jsonl, oldest first
    """

    name: str
    folder: Path
    config: PretrainConfig | None
    environment: dict
    results: list[dict]


def config_from(plain: dict, path: Path) -> PretrainConfig:
    """The configuration that checkpoints and config.json hold; values that this program does not know are dropped.

    Raises UserError for a value that its flag cannot have; `path` is the file it stands in.
    """
    known = get_type_hints(PretrainConfig)
    if "loss" not in plain:  # from before the ablations, when every method's configuration had SimSiam's flag set
        del known["stop_gradient"]
    plain = {name: value for name, value in plain.items() if name in known}
    for name in {"data": None} | plain:
        if not _is_of(known[name], value := plain.get(name)):
            raise UserError(f"{path} holds a value that no run writes ({name}: {value!r:.80}); {RESTORE}")
    paths = {"data": Path(plain["data"]), "init_from": Path(plain["init_from"]) if plain.get("init_from") else None}
    return PretrainConfig(**plain | paths | {"without": tuple(plain.get("without", ()))})


def _is_of(kind: Any, value: object) -> bool:
    """Whether a flag of this type can have a value, in the form of JSON: paths and choices are text there."""
    if isinstance(kind, types.UnionType):
        return any(_is_of(one, value) for one in get_args(kind))
    if kind is Path or get_origin(kind) is Literal:
        return isinstance(value, str) and "\0" not in value
    if get_origin(kind) is tuple:
        return isinstance(value, list | tuple) and all(isinstance(one, str) for one in value)
    if kind is float:
        return is_number(value) or value == math.inf  # --checkpoint-every-minutes may be
    if kind is int:
        return is_number(value) and isinstance(value, int)
    return isinstance(value, kind)


def read_json(path: Path) -> dict:
    """The object in a JSON file; {} where there is no file. Raises UserError for one that holds none."""
    try:
        found = json.loads(path.read_bytes()) if path.is_file() else {}
        if not isinstance(found, dict):
            raise ValueError(f"a {type(found).__name__} in place of an object")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); {RESTORE}") from None
    return found


def read_config(folder: Path) -> PretrainConfig | None:
    """What config.json says; None where there is none, or it is not of a run. Raises UserError as `config_from`."""
    plain = read_json(folder / "config.json")
    return config_from(plain, folder / "config.json") if plain.keys() & {"arch", "data"} else None


def method_of(folder: Path, otherwise: str) -> str:
    """The pretraining method that a run folder tells; an ablation of one is another method."""
    config = read_config(folder)
    if config is None:
        return otherwise
    changed = (config.method == "barlow_twins" and is_ablated(config)) or config.without
    return config.method + (", ablated" if changed else "")


def trained(config: PretrainConfig, folder: Path) -> tuple[int, float, float]:
    """Steps, epochs and seconds of training that metrics.jsonl tells; each line has the speed since the one before."""
    steps, epoch, seconds = 0, 0.0, 0.0
    for line in read_lines(folder / METRICS) if (folder / METRICS).is_file() else []:
        if is_number(line.get("images_per_s")) and is_number(line.get("step")) and is_number(line.get("epoch")):
            seconds += (line["step"] - steps) * config.global_batch / max(line["images_per_s"], 1e-9)
            steps, epoch = int(line["step"]), line["epoch"]
    return steps, epoch, seconds


def with_epochs_done(results: list[dict], folder: Path) -> list[dict]:
    """A run's results with the epochs behind each checkpoint; theirs is the whole run's.

    With --init-from they are unknown, 0: nothing says how long those weights were trained before.
    """
    config = read_config(folder)
    if config and config.init_from:
        return [r | {"epochs": 0} for r in results]
    steps, epoch, _ = trained(config, folder) if config else (0, 0.0, 0.0)
    if not steps:
        return results
    return [r | {"epochs": min(r["epochs"], round(epoch * r["step"] / steps, 2))} for r in results]


def exported(folder: Path) -> dict:
    """What backbone.safetensors says of itself; {} where there is none yet."""
    try:
        with safe_open(folder / BACKBONE, "np") as file:
            about = json.loads(file.metadata()["backbone"])
        return about if isinstance(about, dict) else {}
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError):
        return {}


def images(config: PretrainConfig, known_sha256: str) -> str:
    """The dataset in words. `known_sha256`: the digest of the images that were trained on, if it is known."""
    named = config.data.name.removesuffix(".shards.json").removesuffix(".beton")
    name = config.data.parent.name if named != config.data.name else named
    try:
        stored = open_stored(train_beton(config.data))
    except (UserError, OSError) as error:
        return f"{name} (not there now: {error})"
    if known_sha256 and dataset_sha256(stored) != known_sha256:
        return f"{name} (its folder holds other images now than those that were trained on)"
    count = f"{len(stored):,} training images"
    if config.fraction != 1:
        count = f"{config.fraction:.4g} of {count}, the same share of every class"
    count += f" in {len(stored.classes)} classes" if stored.labelled else " without labels"
    sides = [
        f"{low}" if low == high else f"{low} to {high}" for low, high in map(_ends, (stored.widths, stored.heights))
    ]
    return f"{name}: {count}, stored at {' × '.join(sides)} px"


def _ends(sides) -> tuple[int, int]:
    return int(sides.min()), int(sides.max())


def method_title(name: str) -> str:
    """Barlow Twins; SimCLR; a method that the published tables do not have, by its own name."""
    return published_file()["titles"].get(name, name)


def facts(run: Run) -> dict[str, str]:
    """What was measured, row by row; of somebody else's file what its newest result tells."""
    newest = run.results[-1] if run.results else {}
    try:
        found = facts_of_training(run, run.config) if run.config else facts_of_result(newest)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"config.json, env.json or metrics.jsonl of {run.folder} holds a value that no run writes "
            f"({type(error).__name__}: {error}); {RESTORE}"
        ) from None
    if newest:
        found["Evaluated on"] = (
            f"{newest['dataset']}: {newest['val_images']:,} validation images in {newest['classes']} classes, "
            f"last on {newest['time'][:10]}"
        )
    return found


def facts_of_result(newest: dict) -> dict[str, str]:
    """Of a network that was not trained here."""
    if not newest:
        return {}
    about = {
        "Network": newest["arch"],
        "File": Path(newest["checkpoint"]).name,
        "Pretrained": f"{newest['epochs']} epochs" if newest["epochs"] else "its file does not tell for how long",
        "Views": f"{newest['resolution_px']} px",
    }
    return about | {"Seed": str(newest["seed"]), "Device": str(newest.get("device", "not recorded"))}


def facts_of_training(run: Run, config: PretrainConfig) -> dict[str, str]:
    """Of a run of train/pretrain.py."""
    about, env = exported(run.folder), run.environment
    steps, epoch, seconds = trained(config, run.folder)
    whole = f"{config.epochs} ({steps:,} steps)" if epoch >= config.epochs else ""
    whole = whole if config.epochs else "0: an untrained network, a control"
    widths, world_size = projector_widths(config.projector), int(env.get("world_size", 1))
    scale = config.global_batch / 256
    weights, biases = (rate * scale for rate in (config.lr_weights or 0.0, config.lr_biases or 0.0))
    method = method_title(config.method)
    without = f", without {', '.join(config.without)}" if config.without else ""
    network = [config.arch, *([f"{config.stem} stem"] if config.stem != "imagenet" else [])]
    network += [f"{about['features']} features"] if about.get("features") else []
    device = str(env.get("device", "not recorded"))
    if env.get("cuda"):
        device = f"{world_size} × {device}"
    elif "cpu_cores" in env:
        device += f", {env['cpu_cores']} cores"
    precision = config.amp if AMP[config.amp].itemsize == 2 else "float32"
    speed = f", {steps * config.global_batch / seconds:.0f} images a second" if seconds else ""
    predictor = f"; predictor {config.predictor}" if config.predictor else ""
    start = {"Begun from": "/".join(config.init_from.parts[-2:])} if config.init_from else {}
    return {
        "Method": method + (" (an ablation)" if method_of(run.folder, "").endswith("ablated") else ""),
        "Dataset": images(config, about.get("dataset_sha256", "")),
        "Network": ", ".join(network),
        "Projector": f"{config.projector}: embeddings of {widths[-1]} dimensions{predictor}",
        "Views": f"{config.resolution_schedule or config.resolution} px, the augmentations of {config.views}{without}",
        "Epochs": whole or f"{epoch:.3g} of {config.epochs} so far ({steps:,} steps)",
        "Batch": f"{config.global_batch} images" + (f" over {world_size} processes" if world_size > 1 else ""),
        "Learning rates": (
            f"at their peak {weights:.4g} for weights, {biases / config.paper_world_size:.4g} for biases; "
            f"{config.warmup_epochs} epochs of warm-up, then a cosine; weight decay {config.weight_decay:g}"
        ),
        **start,
        "Seed": str(config.seed),
        "Device": f"{device}; {precision}; PyTorch {env.get('torch', 'not recorded')}",
        "Time": f"{duration(seconds)} of training{speed}" if seconds else "no step",
        "Command": f"`{env['command']}`" if "command" in env else "not recorded",
    }


def fact_rows(runs: list[Run]) -> list[tuple[str, list[str]]]:
    """Each fact with its value of every run."""
    found = [facts(run) for run in runs]
    labels = dict.fromkeys(label for row in found for label in row)
    return [(label, [row.get(label, "–") for row in found]) for label in labels]


def other_settings(runs: list[Run]) -> dict[str, list[str]]:
    """What else decides the weights and is not the same for all runs, by flag; a row has one value a run."""
    plain = [recipe(as_plain(run.config)) if run.config else {} for run in runs]
    names = dict.fromkeys(name for settings in plain for name in settings if name not in IN_FACTS)
    values = {name: [str(settings.get(name, "–")) for settings in plain] for name in names}
    return {f"--{name.replace('_', '-')}": row for name, row in values.items() if len(set(row)) > 1}
