"""Contrastive methods, one file each, behind the small protocol `Method`."""

from clae_fast.methods.acl import ACL
from clae_fast.methods.adco import AdCo
from clae_fast.methods.base import Method, PairMethod
from clae_fast.methods.caco import CaCo
from clae_fast.methods.dcl import DCL
from clae_fast.methods.deacl import DeACL
from clae_fast.methods.h_scl import HSCL
from clae_fast.methods.hcl import HCL
from clae_fast.methods.plain import Plain
from clae_fast.methods.query import QueryMethod
from clae_fast.methods.rocl import RoCL
from clae_fast.methods.simclr import SimCLR
from clae_fast.methods.sscl import SSCL
from clae_fast.methods.supcon import SupCon
from clae_fast.methods.supervised import SupervisedMethod
from clae_fast.methods.uel import UEL

METHODS: dict[str, type[Method]] = {
    cls.name: cls
    for cls in (SimCLR, Plain, UEL, RoCL, ACL, DeACL, DCL, HCL, SSCL, SupCon, HSCL, AdCo, CaCo)
}

__all__ = [
    "ACL",
    "DCL",
    "HCL",
    "HSCL",
    "METHODS",
    "SSCL",
    "UEL",
    "AdCo",
    "CaCo",
    "DeACL",
    "Method",
    "PairMethod",
    "Plain",
    "QueryMethod",
    "RoCL",
    "SimCLR",
    "SupCon",
    "SupervisedMethod",
]
