"""The named optimizers: a signature, an equation and a recipe each."""

from .kfac import KFAC
from .kronecker import KLSOAP, SOAP, KLShampoo, OneSidedShampoo, Shampoo, SPlus
from .muadam import MuAdam, MuAdamSANIA
from .muon import Muon

__all__ = [
    "KFAC",
    "KLSOAP",
    "SOAP",
    "KLShampoo",
    "MuAdam",
    "MuAdamSANIA",
    "Muon",
    "OneSidedShampoo",
    "SPlus",
    "Shampoo",
]
