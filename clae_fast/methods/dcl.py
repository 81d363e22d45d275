"""DCL: SimCLR with its negatives corrected for the positives among them."""

from dataclasses import dataclass

from torch import Tensor

from clae_fast.methods.options import BelowOne
from clae_fast.methods.pair import PairMethod
from clae_fast.ops.hard_nt_xent import hard_nt_xent
from clae_fast.steps.options import ALONE, StepContext


class DCL(PairMethod):
    r"""Debiased contrastive learning (Chuang et al., NeurIPS 2020).

    Some of the rows that SimCLR takes for negatives are of the image's own class. DCL takes their
    expected share out of the denominator. The loss is `clae_fast.hard_nt_xent` with beta = 0,

    .. math:: \frac{1}{2N} \sum_i \log (e^{s_{i,\pi(i)}} + N_i) - s_{i,\pi(i)}, \quad
        N_i = n \max \Bigl( \frac{M_i - \tau^+ e^{s_{i,\pi(i)}}}{1 - \tau^+}, e^{-1/T} \Bigr)

    over the 2N rows of both views, with the cosine over T, s, and the mean :math:`M_i` of
    :math:`e^{s_{ij}}` over the n = 2N - 2 negatives of row i.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options(PairMethod.Options):
        """Settings of DCL.

        Attributes:
            tau_plus: Share of the negatives that is taken to be of the image's own class.
        """

        tau_plus: BelowOne = 0.1

    name = "dcl"

    def loss(self, z_a: Tensor, z_b: Tensor, context: StepContext = ALONE) -> Tensor:
        """`clae_fast.hard_nt_xent` of the two views, with equal weights."""
        return hard_nt_xent(z_a, z_b, beta=0.0, **vars(self.options))
