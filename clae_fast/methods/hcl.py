"""HCL: SimCLR with weights for hard negatives, corrected for the positives among them."""

from dataclasses import dataclass

from torch import Tensor

from clae_fast.methods.dcl import DCL
from clae_fast.methods.options import NotNegative
from clae_fast.ops.hard_nt_xent import hard_nt_xent
from clae_fast.steps.options import ALONE, StepContext


class HCL(DCL):
    r"""Contrastive learning with hard negative samples (Robinson et al., ICLR 2021).

    The negatives of DCL count the more, the nearer they are to the row. The loss is
    `clae_fast.hard_nt_xent`, that of DCL with the weighted mean

    .. math:: M_i = \frac{\sum_j e^{(1 + \beta) s_{ij}}}{\sum_j e^{\beta s_{ij}}}

    over the negatives j of row i. With beta = 0 it is DCL, and with tau_plus = 0 as well SimCLR.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options(DCL.Options):
        """Settings of HCL.

        Attributes:
            beta: How far the weights of negatives are concentrated on the nearest ones.
            detach_weights: Whether the weights are constants in the gradient. In the released code
                they are not.
        """

        beta: NotNegative = 1.0
        detach_weights: bool = False

    name = "hcl"
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
