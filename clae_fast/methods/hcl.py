"""HCL: SimCLR with weights for hard negatives, freed of the positives among them."""

from typing import ClassVar

from torch import Tensor, nn

from clae_fast import _check
from clae_fast.methods.base import PairMethod
from clae_fast.ops.hard_nt_xent import hard_nt_xent


class HCL(PairMethod):
    """Contrastive learning with hard negative samples on two views (Robinson et al., ICLR 2021).

    With beta = 0 it is DCL, with tau_plus = 0 besides SimCLR.

    Args:
        encoder: f, from views to raw projections.
        temperature: Temperature of the softmax.
        adversarial: Whether to build the adversarial twin that attacks need.
        beta: How far the weights of negatives are concentrated on the nearest, from 0 on.
        tau_plus: Share of the negatives taken to be of an image's own class, in [0, 1).
        detach_weights: Whether the weights are constants in the gradient; as released, they are
            not.
    """

    name: ClassVar[str] = "hcl"

    def __init__(
        self,
        encoder: nn.Module,
        *,
        temperature: float = 0.5,
        adversarial: bool = False,
        beta: float = 1.0,
        tau_plus: float = 0.1,
        detach_weights: bool = False,
    ) -> None:
        super().__init__(encoder, temperature=temperature, adversarial=adversarial)
        _check.in_range("beta", beta, 0)
        _check.in_range("tau_plus", tau_plus, 0, 1)
        self.beta = beta
        self.tau_plus = tau_plus
        self.detach_weights = detach_weights

    def loss(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        """`clae_fast.hard_nt_xent` of the two views."""
        return hard_nt_xent(
            z_a,
            z_b,
            temperature=self.temperature,
            beta=self.beta,
            tau_plus=self.tau_plus,
            detach_weights=self.detach_weights,
        )
