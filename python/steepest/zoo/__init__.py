"""The named optimizers: a signature, an equation and a recipe each."""

from .adaptive_muon import NAMO, AdaMuon, NorMuon
from .arguments import list_arguments
from .dion2 import Dion2
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
from .vector import MADGRAD, SGD, AdaGrad, Adam, AdamSANIA, Lion, NormalizedSGD, SignSGD

__all__ = [
    "KFAC",
    "KLSOAP",
    "MADGRAD",
    "NAMO",
    "NIGT",
    "SGD",
    "SOAP",
    "AdaGrad",
    "AdaMuon",
    "Adam",
    "AdamSANIA",
    "Dion2",
    "Fromage",
    "KLShampoo",
    "Lion",
    "Momo",
    "MuAdam",
    "MuAdamSANIA",
    "Muon",
    "MuonAdam",
    "MuonMax",
    "NorMuon",
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
