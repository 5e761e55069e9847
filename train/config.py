"""What one pretraining run is: a frozen dataclass, the presets, and how the two become a command line.

Command line > preset > default. A preset is an experiment card: a whole configuration with its cost,
hardware, expected result and source beside it. `chosen_preset` looks only for `--preset`, and tyro lays
the remaining flags over that preset, so `--preset cifar10 --help` shows CIFAR-10's values.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

from pipeline.command import DATA, RUNS, UserError
from pipeline.constants import CIFAR10_MEAN, CIFAR10_STD
from pipeline.spec import Normalization

NORMALIZATIONS = {"imagenet": Normalization(), "cifar10": Normalization(CIFAR10_MEAN, CIFAR10_STD)}

# Global batch → learning rate of the weights, 300 epochs of ResNet-50. Source: Barlow Twins, issue 7
# (linear top-1 in this order: 69.7, 70.7, 71.4, 71.7, 71.4, 70.7).
LR_WEIGHTS_BY_BATCH = {128: 0.7, 256: 0.4, 512: 0.3, 1024: 0.25, 2048: 0.2, 4096: 0.2}

METHOD_NAMES = ("barlow_twins", "simclr", "byol", "simsiam", "vicreg")
CARDS = tuple(
    base if method == "barlow_twins" else f"{base}-{method}"
    for base in ("imagenet", "cifar10", "cifar10-demo")
    for method in METHOD_NAMES
)

# Flags that change where a run lives or how fast it goes, not which weights come out of it.
NOT_RECIPE = ("preset", "data", "run", "loader", "workers", "views_on", "resume", "compile", "log_every")
NOT_RECIPE += ("checkpoint_every_steps", "checkpoint_every_minutes", "keep", "checkpoint_activations")
NOT_RECIPE += ("on_nan", "timeout_minutes")


@dataclass(frozen=True)
class PretrainConfig:
    """Pretrain an encoder without labels. Every default below is the chosen preset's value."""

    preset: Literal[CARDS] = "imagenet"
    """The experiment card to start from; every other flag changes one value of it. imagenet, cifar10 and
    cifar10-demo are Barlow Twins; with -simclr, -byol, -simsiam or -vicreg behind it, that method."""
    method: Literal[METHOD_NAMES] = "barlow_twins"
    """What is optimized. Named here, the card is that method's; everything else stays shared."""
    data: Path = DATA / "imagenet"
    """A folder that holds train.beton, or a .beton file, or, for --loader dali, the shards.json of shards."""
    run: Annotated[str, tyro.conf.arg(aliases=["--name"])] = ""
    """Name of the run, a folder under runs/, or a path. Empty: preset, architecture, epochs and a short hash
    of the recipe, so that the same command finds its own run again and another recipe never meets it.
    (--name is for a torchrun that takes --run for an option of its own; the one in .venv does not.)"""
    epochs: int = 300
    """Passes over the data. 0 writes the untrained network and ends: a control for the evaluations."""
    global_batch: int = 1024
    """Images of one step over all ranks. Full batches only: the last, short one of an epoch is dropped."""
    arch: str = "resnet50"
    """A ResNet of torchvision by name (resnet18 … wide_resnet101_2), resnet10_narrow, else any model of timm."""
    stem: Literal["imagenet", "small"] = "imagenet"
    """How the network begins: 7×7 stride 2 and a max-pool, or, for small images, 3×3 stride 1 and none."""
    projector: str = "8192-8192-8192"
    """Widths of the projector's linear layers; the last is the embedding's."""
    predictor: str = ""
    """Widths of the predictor behind the projector (BYOL, SimSiam); the last is the embedding's."""
    resolution: int = 224
    """Side of the square views, px."""
    views: Literal["imagenet", "cifar10"] = "imagenet"
    """The method's view table and the normalization: as published, or for CIFAR-10 (no blur)."""
    lambd: float = 0.0051
    """Weight of the redundancy (off-diagonal) term."""
    loss_scale: float = 1.0
    """Factor on the whole loss of Barlow Twins."""
    temperature: float = 0.1
    """Of SimCLR's softmax over cosines."""
    ema: float = 0.99
    """How much of its target network BYOL keeps in a step, at the start; it rises to 1 along a cosine."""
    stop_gradient: bool = True
    """SimSiam's; without it the network collapses, which embedding_spread shows."""
    lr_weights: float | None = None
    """Learning rate of the weights, × global batch / 256. None: by global batch, as measured for 300 epochs
    (128 → .7, 256 → .4, 512 → .3, 1024 → .25, 2048 and more → .2; Barlow Twins, issue 7)."""
    lr_biases: float | None = 0.0048
    """Learning rate of biases and batch norm (1-d parameters), × global batch / 256. None: as the weights'."""
    paper_world_size: int = 16
    """Divides the gradient of 1-d parameters. The published code's gradient is the true one divided by its
    world size; LARS hides that for weights, but the published --lr-biases was chosen at 16. Gradients here
    are the true ones on any number of ranks; 16 reproduces the published bias steps, 1 leaves them as they are."""
    weight_decay: float = 1e-6
    """Of the weights; 1-d parameters have none."""
    lars_eta: float = 0.001
    """LARS trust coefficient: a weight's step is this share of its norm."""
    lars_clip: bool = False
    """Caps LARS's adapted learning rate at the learning rate itself (as LARC does)."""
    warmup_epochs: int = 10
    """Linear warm-up from 0; then a cosine to a thousandth."""
    loader: Literal["ffcv", "torch", "dali"] = "ffcv"
    """Which data path: the fast one, the PIL/torchvision reference, or DALI as decoder. Same views, same order."""
    workers: int = 0
    """Threads (ffcv, dali) or processes (torch) of each rank's loader; 0: one a core that this process may use."""
    views_on: Literal["auto", "cpu", "gpu"] = "auto"
    """Who makes the views: the GPU's kernels where there is one, or the CPU's. The pixels are the same."""
    seed: int = 0
    """Decides the initial weights, the order of images and every view."""
    resume: Literal["auto", "never"] = "auto"
    """auto: go on from the run's checkpoint where there is one. never: start over, replacing it."""
    amp: Literal["bf16", "fp16", "off"] = "bf16"
    """Autocast of backbone and projector; the loss is float32 always. fp16 scales the loss, at one sync a step."""
    checkpoint_activations: bool = False
    """Keep each block's input alone and compute the rest again in the backward pass: the same bits, much less memory,
    about a third more work. (There is no gradient accumulation: with batch norm it is another method.)"""
    compile: bool = False
    """torch.compile backbone and projector: minutes at the start, faster steps on a GPU."""
    log_every: int = 20
    """Steps between two lines of metrics.jsonl."""
    checkpoint_every_steps: int = 0
    """Steps between two checkpoints, besides those at the end of every epoch and on signals; 0: none by steps."""
    checkpoint_every_minutes: float = 15.0
    """Minutes after which one more is written; 0: none by the clock. Training waits for the copy, not for the disk."""
    keep: int = 2
    """Checkpoints that stay: checkpoint.pt and those before it, by step. A damaged one is passed over at the start."""
    on_nan: Literal["stop", "skip"] = "stop"
    """A loss that is no number ends the run, with its step and images named; skip: such a step makes no update, nor
    does one with such a gradient, at one host sync a step. Ten in a row end the run all the same."""
    timeout_minutes: float = 15.0
    """A rank that waits so long within a step ends the run and names the rank it waited for; 0: it waits on."""


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
            "lr_weights": 0.05,
            "weight_decay": 1e-4,
            "warmup_epochs": 0,
        },
        "vicreg": {"lr_weights": 0.2},
    },
    "cifar10": {
        "simclr": {"projector": "2048-256", "temperature": 0.2, "lr_weights": 0.4},
        "byol": {"projector": "4096-256", "predictor": "4096-256", "lr_weights": 1.0, "weight_decay": 1e-5},
        "simsiam": {"projector": "2048-2048", "predictor": "512-2048", "lr_weights": 0.5, "weight_decay": 1e-5},
        "vicreg": {"projector": "2048-2048", "lr_weights": 0.3},
    },
    "cifar10-demo": {
        "simclr": {"projector": "256-128", "temperature": 0.2, "lr_weights": 0.4},
        "byol": {"projector": "512-128", "predictor": "512-128", "lr_weights": 0.4},
        "simsiam": {"projector": "256-256", "predictor": "64-256", "lr_weights": 0.05},
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


def projector_widths(projector: str) -> list[int]:
    """ "8192-8192-8192" → [8192, 8192, 8192]."""
    try:
        widths = [int(width) for width in projector.split("-")]
    except ValueError:
        widths = [0]
    if min(widths) < 1:
        raise UserError(f"--projector {projector!r} is not a list of widths; write them like 8192-8192-8192")
    return widths


def train_beton(data: Path) -> Path:
    """The training file that --data means."""
    path = data if data.name.endswith((".beton", ".shards.json")) else data / "train.beton"
    if not path.is_file():
        raise UserError(
            f"no {path.name} in {path.parent}; make it with pipeline/convert.py "
            "(scripts/convert_imagenet.sh for ImageNet), or point --data at a folder that holds it"
        )
    return path


def resolved(config: PretrainConfig) -> PretrainConfig:
    """The configuration with nothing left open: checked values, absolute paths, the learning rate, the run's folder."""
    projector_widths(config.projector)
    bounds = {"epochs": 0, "global_batch": 2, "resolution": 1, "warmup_epochs": 0, "paper_world_size": 1, "seed": 0}
    bounds |= {"workers": 0, "log_every": 1, "checkpoint_every_steps": 0, "checkpoint_every_minutes": 0, "keep": 1}
    bounds |= {"timeout_minutes": 0}
    for name, least in bounds.items():
        if getattr(config, name) < least:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)} is too small; give at least {least}")
    card = PRESETS.get(f"{config.preset}-{config.method}", PRESETS[config.preset])
    config = replace(config, preset=card.preset)
    if config.method != card.method:
        raise UserError(
            f"--preset {config.preset} is a card of {card.method}, --method says {config.method}; leave one of them out"
        )
    if (config.method in ("byol", "simsiam")) != bool(config.predictor):
        raise UserError(f"--predictor {config.predictor!r}: BYOL and SimSiam need one, the other methods have none")
    if config.predictor and projector_widths(config.predictor)[-1] != projector_widths(config.projector)[-1]:
        raise UserError(
            f"--predictor {config.predictor} and --projector {config.projector} end in different widths; the predictor"
            " predicts what the projector gives, so make them equal"
        )
    if config.checkpoint_activations and config.compile:
        raise UserError("--checkpoint-activations and --compile do not go together; leave one of them out")
    if config.lr_weights is None:
        config = replace(config, lr_weights=lr_weights_for(config.global_batch))
    if config.lr_biases is None:
        config = replace(config, lr_biases=config.lr_weights)
    config = replace(config, data=config.data.expanduser().resolve())
    return replace(config, run=str(run_folder(config)))


def run_folder(config: PretrainConfig) -> Path:
    """Where a run lives: --run as a name under runs/, as a path where it looks like one, or made from the recipe."""
    if config.run:
        is_path = os.sep in config.run or config.run.startswith((".", "~"))
        return (Path(config.run).expanduser() if is_path else RUNS / config.run).resolve()
    identity = json.dumps([recipe(as_plain(config)), str(config.data)], sort_keys=True)
    short = hashlib.sha256(identity.encode()).hexdigest()[:6]
    return RUNS / f"{config.preset}-{config.arch.replace('/', '_')}-{config.epochs}ep-{short}"


def as_plain(config: PretrainConfig) -> dict:
    """The configuration as JSON would hold it: the form in config.json and in checkpoints."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(config).items()}


def recipe(plain: dict) -> dict:
    """The part of a configuration that decides the weights: what a checkpoint must share with the run resuming it."""
    return {name: value for name, value in plain.items() if name not in NOT_RECIPE}
