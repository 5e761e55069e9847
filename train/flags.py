"""How a card and a command line become a checked configuration. Command line > card > default.

`chosen_preset` looks only for --preset and --method, tyro lays the other flags over that card, and `resolved` checks
the values and fills in what was left open.
"""

import hashlib
import json
import math
import os
import re
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

import numpy as np

from pipeline.command import RUNS
from pipeline.disk import followed_once
from pipeline.errors import UserError
from train.cards import PRESETS
from train.config import PretrainConfig, as_plain, projector_widths, recipe, resolution_rows

Config = TypeVar("Config", bound=PretrainConfig)  # a benchmark's configuration has flags of its own

# Global batch → learning rate of the weights, 300 epochs of ResNet-50. Source: Barlow Twins, issue 7
# (linear top-1 in this order: 69.7, 70.7, 71.4, 71.7, 71.4, 70.7).
LR_WEIGHTS_BY_BATCH = {128: 0.7, 256: 0.4, 512: 0.3, 1024: 0.25, 2048: 0.2, 4096: 0.2}
LEAST = {
    **dict.fromkeys(("epochs", "warmup_epochs", "seed", "workers", "knn_every", "timeout_minutes"), 0),
    **dict.fromkeys(("checkpoint_every_steps", "checkpoint_every_minutes"), 0),
    **dict.fromkeys(("resolution", "paper_world_size", "log_every", "keep", "block_images", "window_blocks"), 1),
    "queue": 0,
    "global_batch": 2,
    "prototypes": 2,
    "knn_images": 100,
}
MOST = {"timeout_minutes": 1_000_000}  # two years; PyTorch's networks take no time limit of any length
# Barlow Twins: the 1-d rate as a share of the weights'. The table above was measured in March 2021 with one rate and
# --scale-loss 0.024; LARS hides that factor for weights, not for 1-d parameters. Issue 7 states it for batch 256 alone.
# The separate rate came in June 2021 (commit 046eec3) with 0.0048, which is this share of 2048's 0.2.
LR_BIASES_SHARE = 0.024
LONGEST_NAME_BYTES = 255  # of a folder, on all common file systems
# Flags that only some methods have; with the others they must keep their default.
OF_METHODS = {
    "predictor": ("barlow_twins", "byol", "simsiam"),
    "stop_gradient": ("barlow_twins", "simsiam"),
    "queue": ("moco_v2",),
    "prototypes": ("swav",),
    **dict.fromkeys(("loss", "embedding_norm"), ("barlow_twins",)),
    "projector_norm": ("barlow_twins", "simclr"),
}


def chosen_preset(arguments: list[str]) -> PretrainConfig:
    """The card that a command line names by --preset, or by it and --method.

    The ImageNet card if it names none, or an unknown one, which tyro then refuses.
    """
    named = {"preset": "imagenet", "method": ""}
    for i, argument in enumerate(arguments):
        for flag in named:
            if argument == f"--{flag}" and i + 1 < len(arguments):
                named[flag] = arguments[i + 1]
            elif argument.startswith(f"--{flag}="):
                named[flag] = argument.removeprefix(f"--{flag}=")
    preset, method = named["preset"], named["method"]
    return PRESETS.get(f"{preset}-{method}") or PRESETS.get(preset) or PRESETS["imagenet"]


def lr_weights_for(global_batch: int) -> float:
    """Published learning rate at a global batch; between two measured batches linear in their logarithm."""
    batches, rates = zip(*LR_WEIGHTS_BY_BATCH.items(), strict=True)
    return float(np.interp(np.log2(global_batch), np.log2(batches), rates))


def lr_biases_for(lr_weights: float, method: str) -> float:
    """The 1-d parameters' learning rate beside one of the weights, where none was given."""
    return round(LR_BIASES_SHARE * lr_weights, 12) if method == "barlow_twins" else lr_weights  # 0.0048 to the bit


def resolved(config: Config) -> Config:
    """The configuration with nothing left open: checked values, absolute paths, the learning rate, the run's folder.

    Raises UserError for values that are out of range or do not go together. What is left to the device stays so.
    """
    _refuse_values_out_of_range(config)
    card = PRESETS.get(f"{config.preset}-{config.method}", PRESETS[config.preset])
    config = replace(config, preset=card.preset)
    _refuse_another_methods_flags(config, card.method)
    _refuse_sizes_that_differ(config)
    _refuse_what_cannot_step(config)
    if config.wandb and not find_spec("wandb"):
        raise UserError(f"--wandb {config.wandb}: the package is not installed; pip install wandb, or leave it out")
    if config.key and not config.init_from:
        raise UserError(f"--key {config.key} chooses a network in the file of --init-from, which was not given")
    lr_weights = lr_weights_for(config.global_batch) if config.lr_weights is None else config.lr_weights
    lr_biases = lr_biases_for(lr_weights, config.method) if config.lr_biases is None else config.lr_biases
    config = replace(config, lr_weights=lr_weights, lr_biases=lr_biases, data=config.data.expanduser().resolve())
    if config.init_from:
        config = replace(config, init_from=followed_once(config.init_from))
    return replace(config, run=str(run_folder(config)))


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _refuse_values_out_of_range(config: PretrainConfig) -> None:
    for name, least in LEAST.items():
        value, most = getattr(config, name), MOST.get(name, math.inf)
        if not least <= value <= most:  # so is NaN
            wrong = f"large; give at most {most:g}" if value > most else f"small; give at least {least}"
            raise UserError(f"{_flag(name)} {value} is too {wrong}")


def _refuse_another_methods_flags(config: PretrainConfig, method: str) -> None:
    """`method` is that of the card."""
    if config.method != method:
        raise UserError(
            f"--preset {config.preset} is a card of {method}, --method says {config.method}; leave one of them out"
        )
    if config.projector_norm == "all" and config.method == "barlow_twins":
        raise UserError("--projector-norm all is SimCLR's, Barlow Twins normalizes embeddings anyway; leave it out")
    if config.method in ("byol", "simsiam") and not config.predictor:
        raise UserError("--predictor is empty; BYOL and SimSiam need one, for example that of their cards")
    defaults = {field.name: field.default for field in fields(PretrainConfig)}
    for name, methods in OF_METHODS.items():
        value = getattr(config, name)
        if value != defaults[name] and config.method not in methods:
            raise UserError(
                f"{_flag(name)} {value} does not go with --method {config.method}, but with "
                f"{' or '.join(methods)}; leave one of them out"
            )


def _refuse_sizes_that_differ(config: PretrainConfig) -> None:
    widths = projector_widths(config.projector)
    if config.predictor and projector_widths(config.predictor)[-1] != widths[-1]:
        raise UserError(
            f"--predictor {config.predictor} and --projector {config.projector} end in different widths; the predictor"
            " predicts what the projector gives, so make them equal"
        )
    rows = resolution_rows(config.resolution_schedule)
    if rows and rows[-1][1] != config.resolution:
        raise UserError(
            f"--resolution-schedule {config.resolution_schedule} ends at {rows[-1][1]} px, --resolution says"
            f" {config.resolution}, which the evaluations use; make them equal"
        )


def _refuse_what_cannot_step(config: PretrainConfig) -> None:
    if config.method == "moco_v2" and config.queue < config.global_batch:
        raise UserError(
            f"--queue {config.queue} holds fewer keys than a step of --global-batch {config.global_batch} makes; give"
            f" at least {config.global_batch}, or a smaller batch"
        )
    if config.cuda_graph and (config.amp == "fp16" or config.on_nan == "skip"):
        raise UserError("--cuda-graph cannot look at numbers within a step, as --amp fp16 and --on-nan skip do")
    for name in ("compile", "cuda_graph"):
        if getattr(config, name) and config.activations == "blocks":
            raise UserError(f"--activations blocks and {_flag(name)} do not go together; leave one of them out")
    if config.activations == "half" and config.compile is False:
        raise UserError("--activations half is the compiler's work; leave --compile False out")


def run_folder(config: PretrainConfig) -> Path:
    """Where a run lives: --name as a name under runs/, as a path if it looks like one, or made from the recipe.

    Raises UserError for a name that no folder can have.
    """
    if config.run:
        is_path = os.sep in config.run or config.run.startswith((".", "~"))
        if re.search(r"[\0-\x1f\x7f]", config.run):
            raise _no_folder(config.run, "it has characters that cannot be printed")
        try:
            folder = (Path(config.run).expanduser() if is_path else RUNS / config.run).resolve()
        except RuntimeError as error:  # an unknown user, or links in a circle
            raise _no_folder(config.run, str(error)) from error
        if any(len(os.fsencode(part)) > LONGEST_NAME_BYTES for part in folder.parts):
            raise _no_folder(config.run, f"a folder's name has at most {LONGEST_NAME_BYTES} bytes")
        return folder
    identity = json.dumps([recipe(as_plain(config)), str(config.data)], sort_keys=True)
    short = hashlib.sha256(identity.encode()).hexdigest()[:6]
    return RUNS / f"{config.preset}-{config.arch.replace('/', '_')}-{config.epochs}ep-{short}"


def _no_folder(name: str, reason: str) -> UserError:
    shown = name if len(name) <= 60 else f"{name[:60]}…"
    return UserError(f"--name {shown!r} cannot be a folder ({reason}); give another one, short and plain, or a path")
