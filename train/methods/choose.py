"""The methods by the name that --method gives them. A new one is a file beside this one and a line here."""

from torch import nn

from pipeline.spec import ViewSpec, views_without
from train.config import PretrainConfig
from train.methods.barlow_ablations import AblatedBarlowTwins, is_ablated
from train.methods.barlow_twins import BarlowTwins
from train.methods.byol import BYOL
from train.methods.contract import Method
from train.methods.moco_v2 import MoCoV2
from train.methods.simclr import SimCLR
from train.methods.simsiam import SimSiam
from train.methods.swav import SwAV
from train.methods.vicreg import VICReg

METHODS: dict[str, type[Method]] = {
    "barlow_twins": BarlowTwins,
    "simclr": SimCLR,
    "byol": BYOL,
    "simsiam": SimSiam,
    "vicreg": VICReg,
    "moco_v2": MoCoV2,
    "swav": SwAV,
}


def make_method(backbone: nn.Module, features: int, config: PretrainConfig) -> Method:
    """The configured method around a backbone with `features` outputs."""
    ablated = config.method == "barlow_twins" and is_ablated(config)
    return (AblatedBarlowTwins if ablated else METHODS[config.method])(backbone, features, config)


def view_table(config: PretrainConfig) -> tuple[ViewSpec, ...]:
    """The method's views for these images, less what --without names."""
    return views_without(METHODS[config.method].VIEWS[config.views], config.without)
