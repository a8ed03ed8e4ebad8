"""The named optimizers: a signature, an equation and a recipe each."""

from .arguments import list_arguments
from .hasd import hasd
from .kfac import KFAC
from .kronecker import KLSOAP, SOAP, KLShampoo, OneSidedShampoo, Shampoo, SPlus
from .momo import Momo
from .muadam import MuAdam, MuAdamSANIA
from .muon import Muon
from .prodigy import ProdigyMuon
from .product import MuonAdam, MuonMax, ProductNormDescent
from .schattor import Schattor
from .scion import Scion, scion_groups
from .trust_region import NIGT, Fromage, OrthogonalSGDM, TrustRegion
from .vector import MADGRAD, AdaGrad, Adam, AdamSANIA, NormalizedSGD, SignSGD

__all__ = [
    "KFAC",
    "KLSOAP",
    "MADGRAD",
    "NIGT",
    "SOAP",
    "AdaGrad",
    "Adam",
    "AdamSANIA",
    "Fromage",
    "KLShampoo",
    "Momo",
    "MuAdam",
    "MuAdamSANIA",
    "Muon",
    "MuonAdam",
    "MuonMax",
    "NormalizedSGD",
    "OneSidedShampoo",
    "OrthogonalSGDM",
    "ProdigyMuon",
    "ProductNormDescent",
    "SPlus",
    "Schattor",
    "Scion",
    "Shampoo",
    "SignSGD",
    "TrustRegion",
    "hasd",
    "scion_groups",
]

list_arguments(globals()[name] for name in __all__)
