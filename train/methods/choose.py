"""The methods by the name that --method gives them. A new one is a file beside this one and a line here."""

from torch import nn

from train.methods.barlow_twins import BarlowTwins
from train.methods.byol import BYOL
from train.methods.simclr import SimCLR
from train.methods.simsiam import SimSiam
from train.methods.vicreg import VICReg

METHODS: dict[str, type[nn.Module]] = {
    "barlow_twins": BarlowTwins,
    "simclr": SimCLR,
    "byol": BYOL,
    "simsiam": SimSiam,
    "vicreg": VICReg,
}
