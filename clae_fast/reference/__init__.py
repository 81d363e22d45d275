"""The specification: every op in eager PyTorch, any dtype and device, differentiated by autograd.

Nothing here is fast. Where an implementation differs from it by more than rounding, the
implementation is wrong.
"""

from clae_fast.reference.augment import augment as augment
from clae_fast.reference.bank_step import bank_step as bank_step
from clae_fast.reference.h_scl import h_scl as h_scl
from clae_fast.reference.hard_nt_xent import hard_nt_xent as hard_nt_xent
from clae_fast.reference.info_nce import info_nce as info_nce
from clae_fast.reference.linf_step import linf_step as linf_step
from clae_fast.reference.nt_xent import nt_xent as nt_xent
from clae_fast.reference.stem_step import stem_step as stem_step
from clae_fast.reference.sup_con import sup_con as sup_con
from clae_fast.reference.tied_nt_xent import tied_nt_xent as tied_nt_xent
from clae_fast.reference.topk_similarity import topk_similarity as topk_similarity
from clae_fast.reference.uel import uel as uel
