"""HCL: SimCLR with weights for hard negatives, corrected for the positives among them."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from clae_fast.methods.options import BelowOne, NotNegative
from clae_fast.methods.pair import PairMethod
from clae_fast.ops.hard_nt_xent import hard_nt_xent
from clae_fast.steps.options import ALONE, StepContext


class HCL(PairMethod):
    r"""Contrastive learning with hard negative samples (Robinson et al., ICLR 2021).

    Negatives count the more, the nearer they are to the row. As in DCL, the share of them that is
    expected to be of the image's own class is taken out. The loss is `clae_fast.hard_nt_xent`,

    .. math:: \frac{1}{2N} \sum_i \log (e^{s_{i,\pi(i)}} + N_i) - s_{i,\pi(i)}, \quad
        N_i = n \max \Bigl( \frac{M_i - \tau^+ e^{s_{i,\pi(i)}}}{1 - \tau^+}, e^{-1/T} \Bigr), \quad
        M_i = \frac{\sum_j e^{(1 + \beta) s_{ij}}}{\sum_j e^{\beta s_{ij}}}

    over the 2N rows of both views, with the cosine over T, s, and sums over the n = 2N - 2
    negatives of row i. With beta = 0 it is DCL, and with tau_plus = 0 as well it is SimCLR.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options(PairMethod.Options):
        """Settings of HCL.

        Attributes:
            beta: How far the weights of negatives are concentrated on the nearest ones.
            tau_plus: Share of the negatives that is taken to be of the image's own class.
            detach_weights: Whether the weights are constants in the gradient. In the released code
                they are not.
        """

        beta: NotNegative = 1.0
        tau_plus: BelowOne = 0.1
        detach_weights: bool = False

    name: ClassVar[str] = "hcl"
    options: Options

    def extra(self, z_a: Tensor, z_b: Tensor, context: StepContext) -> Tensor | None:
        """Logits of further negatives of each row, [2N, k]; HCL has none."""
        return None

    def loss(self, z_a: Tensor, z_b: Tensor, context: StepContext = ALONE) -> Tensor:
        """`clae_fast.hard_nt_xent` of the two views."""
        return hard_nt_xent(
            z_a,
            z_b,
            temperature=self.temperature,
            beta=self.options.beta,
            tau_plus=self.options.tau_plus,
            detach_weights=self.options.detach_weights,
            extra=self.extra(z_a, z_b, context),
        )
