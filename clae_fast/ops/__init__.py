"""The ops: importing this registers their schemas."""

from clae_fast.ops.augment import augment
from clae_fast.ops.bank_step import bank_step
from clae_fast.ops.h_scl import h_scl
from clae_fast.ops.hard_nt_xent import hard_nt_xent
from clae_fast.ops.info_nce import info_nce
from clae_fast.ops.linf_step import linf_step
from clae_fast.ops.nt_xent import nt_xent
from clae_fast.ops.stem_step import stem_step
from clae_fast.ops.sup_con import sup_con
from clae_fast.ops.tied_nt_xent import tied_nt_xent
from clae_fast.ops.topk_similarity import topk_similarity
from clae_fast.ops.uel import uel

__all__ = [
    "augment",
    "bank_step",
    "h_scl",
    "hard_nt_xent",
    "info_nce",
    "linf_step",
    "nt_xent",
    "stem_step",
    "sup_con",
    "tied_nt_xent",
    "topk_similarity",
    "uel",
]
