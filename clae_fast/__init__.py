"""Adversarial contrastive training at close to the cost of plain contrastive training."""

from pkgutil import extend_path

# Run from a checkout, the compiled _C and clae_fast.kernels are those of the installed package.
__path__ = extend_path(__path__, __name__)

__version__ = "0.1.0"

from clae_fast import attack, nn
from clae_fast._ragged import RaggedImages
from clae_fast.ops import (
    augment,
    bank_step,
    h_scl,
    hard_nt_xent,
    info_nce,
    linf_step,
    nt_xent,
    stem_step,
    sup_con,
    tied_nt_xent,
    topk_similarity,
    uel,
)
from clae_fast.ops.augment_params import augment_params
from clae_fast.step import pair_step

__all__ = [
    "RaggedImages",
    "__version__",
    "attack",
    "augment",
    "augment_params",
    "bank_step",
    "h_scl",
    "hard_nt_xent",
    "info_nce",
    "linf_step",
    "nn",
    "nt_xent",
    "pair_step",
    "stem_step",
    "sup_con",
    "tied_nt_xent",
    "topk_similarity",
    "uel",
]
