"""The experiment cards, and how one of them and a command line become a checked configuration.

Command line > preset > default. A preset is a card: a whole configuration with its cost, hardware, expected
result and source beside it. `chosen_preset` looks only for `--preset` and `--method`, and tyro lays the remaining
flags over that preset, so `--preset cifar10 --help` shows CIFAR-10's values.
"""

import hashlib
import json
import os
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from pipeline.command import DATA, RUNS
from pipeline.disk import followed_once
from pipeline.errors import UserError
from train.config import PretrainConfig, as_plain, projector_widths, recipe, resolution_rows

# Global batch → learning rate of the weights, 300 epochs of ResNet-50. Source: Barlow Twins, issue 7
# (linear top-1 in this order: 69.7, 70.7, 71.4, 71.7, 71.4, 70.7).
LR_WEIGHTS_BY_BATCH = {128: 0.7, 256: 0.4, 512: 0.3, 1024: 0.25, 2048: 0.2, 4096: 0.2}

PRESETS = {
    # ImageNet-1k as published, 300 epochs.
    #   cost      300 × 1.28 M images × 2 views of 224 px; 30 GB for the data, 1.9 GB a checkpoint
    #   hardware  8 GPUs of 32 GB (or 1–2 of 80 GB); ResNet-50, bf16
    #   expect    linear top-1 / top-5 71.4 / 90.2 published for 300 epochs, 71.7 top-1 at this batch and rate
    #   source    Zbontar 2021, section 2.2; batch and learning rate: Barlow Twins, issue 7
    "imagenet": PretrainConfig(),
    # CIFAR-10 as solo-learn trains Barlow Twins on it.
    #   cost      1000 × 50,000 images × 2 views of 32 px
    #   hardware  one GPU of 12 GB
    #   expect    linear top-1 92.10 published after 1000 epochs
    #   source    da Costa 2022 (solo-learn), CIFAR-10 table and its Barlow Twins settings
    "cifar10": PretrainConfig(
        preset="cifar10",
        data=DATA / "cifar10",
        epochs=1000,
        global_batch=256,
        arch="resnet18",
        stem="small",
        projector="2048-2048-2048",
        resolution=32,
        views="cifar10",
        loss_scale=0.1,
        lr_weights=0.3,
        lr_biases=0.3,
        paper_world_size=1,
        weight_decay=1e-4,
        lars_eta=0.02,
        lars_clip=True,
        knn_every=10,
    ),
    # CIFAR-10 in minutes on two CPU cores: shows that everything works and that it learns, no more.
    #   cost      2 × 50,000 images × 2 views of 32 px
    #   hardware  2 CPU cores, about 3 minutes
    #   expect    kNN top-1 at least 8 points above the untrained network's (seen: 15 after 3 epochs)
    #   source    none; chosen for the time it takes
    "cifar10-demo": PretrainConfig(
        preset="cifar10-demo",
        data=DATA / "cifar10",
        epochs=2,
        global_batch=256,
        arch="resnet10_narrow",
        projector="256-256",
        resolution=32,
        views="cifar10",
        lambd=0.0102,
        lr_weights=0.4,
        lr_biases=0.01,
        paper_world_size=1,
        weight_decay=1e-4,
        lars_eta=0.02,
        warmup_epochs=0,
        amp="off",
    ),
}


# The rivals on the same cards: what differs from Barlow Twins there. Published ImageNet recipes: Chen 2020, Grill 2020
# (300 epochs), Chen & He 2021, Bardes 2022. CIFAR-10 as solo-learn trains them: after 1000 epochs it reads a linear
# top-1 of 90.74 (SimCLR), 92.58 (BYOL), 90.51 (SimSiam), 92.07 (VICReg), beside Barlow Twins' 92.10.
_RIVALS = {"lr_biases": None, "paper_world_size": 1}
RIVALS = {
    "imagenet": {
        "simclr": {"projector": "2048-128", "lr_weights": 0.3},
        "byol": {"projector": "4096-256", "predictor": "4096-256", "lr_weights": 0.3},
        "simsiam": {
            "projector": "2048-2048-2048",
            "predictor": "512-2048",
            "stop_gradient": True,
            "lr_weights": 0.05,
            "weight_decay": 1e-4,
            "warmup_epochs": 0,
        },
        "vicreg": {"lr_weights": 0.2},
    },
    "cifar10": {
        "simclr": {"projector": "2048-256", "temperature": 0.2, "lr_weights": 0.4},
        "byol": {"projector": "4096-256", "predictor": "4096-256", "lr_weights": 1.0, "weight_decay": 1e-5},
        "simsiam": {
            "projector": "2048-2048",
            "predictor": "512-2048",
            "stop_gradient": True,
            "lr_weights": 0.5,
            "weight_decay": 1e-5,
        },
        "vicreg": {"projector": "2048-2048", "lr_weights": 0.3},
    },
    "cifar10-demo": {
        "simclr": {"projector": "256-128", "temperature": 0.2, "lr_weights": 0.4},
        "byol": {"projector": "512-128", "predictor": "512-128", "lr_weights": 0.4},
        "simsiam": {"projector": "256-256", "predictor": "64-256", "stop_gradient": True, "lr_weights": 0.05},
        "vicreg": {"projector": "256-256", "lr_weights": 0.4},
    },
}
for _base, _methods in RIVALS.items():
    for _method, _values in _methods.items():
        _name = f"{_base}-{_method}"
        PRESETS[_name] = replace(PRESETS[_base], preset=_name, method=_method, **_RIVALS | _values)


def chosen_preset(arguments: list[str]) -> PretrainConfig:
    """The card that a command line names by --preset, or by it and --method.

    ImageNet's where it names none or an unknown one (tyro tells).
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


def resolved(config: PretrainConfig) -> PretrainConfig:
    """The configuration with nothing left open: checked values, absolute paths, the learning rate, the run's folder."""
    projector_widths(config.projector)
    bounds = {"epochs": 0, "global_batch": 2, "resolution": 1, "warmup_epochs": 0, "paper_world_size": 1, "seed": 0}
    bounds |= {"workers": 0, "log_every": 1, "checkpoint_every_steps": 0, "checkpoint_every_minutes": 0, "keep": 1}
    bounds |= {"timeout_minutes": 0, "block_images": 1, "window_blocks": 1, "knn_every": 0, "knn_images": 100}
    for name, least in bounds.items():
        if getattr(config, name) < least:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)} is too small; give at least {least}")
    card = PRESETS.get(f"{config.preset}-{config.method}", PRESETS[config.preset])
    config = replace(config, preset=card.preset)
    if config.method != card.method:
        raise UserError(
            f"--preset {config.preset} is a card of {card.method}, --method says {config.method}; leave one of them out"
        )
    if config.method in ("byol", "simsiam") and not config.predictor:
        raise UserError("--predictor is empty; BYOL and SimSiam need one, for example that of their cards")
    only = {"predictor": ("barlow_twins", "byol", "simsiam"), "stop_gradient": ("barlow_twins", "simsiam")}
    only |= {name: ("barlow_twins",) for name in ("loss", "embedding_norm", "projector_norm")}
    for name, methods in only.items():
        value = getattr(config, name)
        if value != getattr(PretrainConfig(), name) and config.method not in methods:
            raise UserError(
                f"--{name.replace('_', '-')} {value} does not go with --method {config.method}, but with "
                f"{' or '.join(methods)}; leave one of them out"
            )
    if config.predictor and projector_widths(config.predictor)[-1] != projector_widths(config.projector)[-1]:
        raise UserError(
            f"--predictor {config.predictor} and --projector {config.projector} end in different widths; the predictor"
            " predicts what the projector gives, so make them equal"
        )
    if config.wandb and not find_spec("wandb"):
        raise UserError(f"--wandb {config.wandb}: the package is not installed; pip install wandb, or leave it out")
    rows = resolution_rows(config.resolution_schedule)
    if rows and rows[-1][1] != config.resolution:
        raise UserError(
            f"--resolution-schedule {config.resolution_schedule} ends at {rows[-1][1]} px, --resolution says"
            f" {config.resolution}, which the evaluations use; make them equal"
        )
    if config.cuda_graph and (config.amp == "fp16" or config.on_nan == "skip"):
        raise UserError("--cuda-graph cannot look at numbers within a step, as --amp fp16 and --on-nan skip do")
    for flag, given in {"--compile": config.compile, "--cuda-graph": config.cuda_graph}.items():
        if given and config.activations == "blocks":
            raise UserError(f"--activations blocks and {flag} do not go together; leave one of them out")
    if config.activations == "half" and config.compile is False:
        raise UserError("--activations half is the compiler's work; leave --compile False out")
    if config.lr_weights is None:
        config = replace(config, lr_weights=lr_weights_for(config.global_batch))
    if config.lr_biases is None:
        config = replace(config, lr_biases=config.lr_weights)
    config = replace(config, data=config.data.expanduser().resolve())
    if config.key and not config.init_from:
        raise UserError(f"--key {config.key} chooses a network in the file of --init-from, which was not given")
    if config.init_from:
        config = replace(config, init_from=followed_once(config.init_from))
    return replace(config, run=str(run_folder(config)))


def run_folder(config: PretrainConfig) -> Path:
    """Where a run lives: --run as a name under runs/, as a path where it looks like one, or made from the recipe."""
    if config.run:
        is_path = os.sep in config.run or config.run.startswith((".", "~"))
        return (Path(config.run).expanduser() if is_path else RUNS / config.run).resolve()
    identity = json.dumps([recipe(as_plain(config)), str(config.data)], sort_keys=True)
    short = hashlib.sha256(identity.encode()).hexdigest()[:6]
    return RUNS / f"{config.preset}-{config.arch.replace('/', '_')}-{config.epochs}ep-{short}"
