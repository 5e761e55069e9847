"""Where a run's weights begin: at random, or in a checkpoint of ours or somebody else's (--init-from).

Such a run is a new one: its own schedule from step 0, no momentum, its own recipe. A run that was stopped goes on
by itself and needs no flag.
"""

from pathlib import Path

import torch
from torch import nn

from pipeline.command import UserError
from train.checkpoint import CHECKPOINT, load_backbone
from train.config import PretrainConfig
from train.model import make_backbone


def initial_backbone(config: PretrainConfig) -> tuple[nn.Module, int]:
    """The configured backbone and its number of features; with --init-from the file's weights. Raises UserError."""
    backbone, features = make_backbone(config.arch, config.stem)
    if config.init_from:
        theirs, info = load_backbone(config.init_from)
        if (info.arch, info.stem) != (config.arch, config.stem):
            raise UserError(
                f"--init-from {config.init_from} is {info.arch} with the {info.stem} stem, this run is {config.arch} "
                f"with the {config.stem} stem; pass --arch {info.arch} --stem {info.stem}, or another file"
            )
        backbone.load_state_dict(theirs.state_dict())
    return backbone, features


def start_heads_(method: nn.Module, path: Path) -> bool:
    """Takes the weights of everything behind the backbone from a checkpoint, and says whether it did.

    All of it, or nothing where the file lacks a part or has another shape: a run's checkpoint has them all, the
    published Barlow Twins checkpoint.pth (whose names begin with "module.") the projector, a backbone file none.
    """
    path = Path(path).expanduser()
    path = path / CHECKPOINT if path.is_dir() else path
    if path.suffix == ".safetensors":
        return False
    theirs = torch.load(path, map_location="cpu", weights_only=True).get("model", {})
    theirs = {name.removeprefix("module."): weight for name, weight in theirs.items()}
    own = {name: weight for name, weight in method.state_dict().items() if not name.startswith("backbone.")}
    if any(name not in theirs or theirs[name].shape != weight.shape for name, weight in own.items()):
        return False
    method.load_state_dict({name: theirs[name] for name in own}, strict=False)
    return True
