"""Where a run's weights begin: at random, or in a checkpoint of ours or somebody else's (--init-from).

Such a run is a new one: its own schedule from step 0, no momentum, its own recipe. A run that was stopped continues
by itself and needs no flag.
"""

import torch
from torch import nn

from pipeline.errors import UserError
from train.checkpoint import read_network
from train.config import PretrainConfig
from train.model import make_backbone


def initial_network(config: PretrainConfig) -> tuple[nn.Module, int, dict[str, torch.Tensor]]:
    """The configured backbone, its number of features, and what `start_heads_` takes.

    With --init-from the weights are the file's, all from one read of it. Raises UserError.
    """
    backbone, features = make_backbone(config.arch, config.stem)
    if not config.init_from:
        return backbone, features, {}
    theirs = read_network(config.init_from, config.key)
    info = theirs.info
    if (info.arch, info.stem) != (config.arch, config.stem):
        raise UserError(
            f"--init-from {config.init_from} is {info.arch} with the {info.stem} stem, this run is {config.arch} "
            f"with the {config.stem} stem; pass --arch {info.arch} --stem {info.stem}, or another file"
        )
    backbone.load_state_dict(theirs.backbone.state_dict())
    return backbone, features, theirs.heads


def start_heads_(method: nn.Module, theirs: dict[str, torch.Tensor]) -> bool:
    """Takes the weights of everything behind the backbone from `theirs`, and says whether it did.

    All of it, or nothing where a part is missing or has another shape: a run's checkpoint has them all, the
    published Barlow Twins checkpoint.pth the projector, a backbone file none.
    """
    own = {name: weight for name, weight in method.state_dict().items() if not name.startswith("backbone.")}
    if any(name not in theirs or theirs[name].shape != weight.shape for name, weight in own.items()):
        return False
    method.load_state_dict({name: theirs[name] for name in own}, strict=False)
    return True
