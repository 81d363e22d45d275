"""Contrastive methods, one file each, behind the small protocol `Method`."""

from clae_fast.methods.acl import ACL
from clae_fast.methods.acssl import ACSSL
from clae_fast.methods.adco import AdCo
from clae_fast.methods.base import Method
from clae_fast.methods.caco import CaCo
from clae_fast.methods.dcl import DCL
from clae_fast.methods.deacl import DeACL
from clae_fast.methods.h_scl import HSCL
from clae_fast.methods.hcl import HCL
from clae_fast.methods.mochi import MoCHi
from clae_fast.methods.moco import MoCo
from clae_fast.methods.pair import PairMethod
from clae_fast.methods.plain import Plain
from clae_fast.methods.query import QueryMethod
from clae_fast.methods.rocl import RoCL
from clae_fast.methods.simclr import SimCLR
from clae_fast.methods.sscl import SSCL
from clae_fast.methods.supcon import SupCon
from clae_fast.methods.supervised import SupervisedMethod
from clae_fast.methods.synco import SynCo
from clae_fast.methods.uel import UEL

METHODS: dict[str, type[Method]] = {
    cls.name: cls
    for cls in (
        SimCLR, Plain, UEL, MoCo, AdCo, CaCo, ACSSL, DCL, HCL, SSCL, MoCHi, SynCo, SupCon, HSCL,
        RoCL, ACL, DeACL,
    )
}  # fmt: skip

__all__ = [
    "ACL", "ACSSL", "DCL", "HCL", "HSCL", "METHODS", "SSCL", "UEL", "AdCo", "CaCo", "DeACL",
    "Method", "MoCHi", "MoCo", "PairMethod", "Plain", "QueryMethod", "RoCL", "SimCLR", "SupCon",
    "SupervisedMethod", "SynCo",
]  # fmt: skip
