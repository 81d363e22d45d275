"""Contrastive methods, one file each, behind the small protocol `Method`."""

from clae_fast.methods.base import Method, PairMethod
from clae_fast.methods.plain import Plain
from clae_fast.methods.query import QueryMethod
from clae_fast.methods.simclr import SimCLR
from clae_fast.methods.supervised import SupervisedMethod
from clae_fast.methods.uel import UEL

METHODS: dict[str, type[Method]] = {cls.name: cls for cls in (SimCLR, Plain, UEL)}

__all__ = [
    "METHODS",
    "UEL",
    "Method",
    "PairMethod",
    "Plain",
    "QueryMethod",
    "SimCLR",
    "SupervisedMethod",
]
