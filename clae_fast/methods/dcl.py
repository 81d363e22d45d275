"""DCL: SimCLR with negatives freed of the positives among them."""

from typing import ClassVar

from torch import Tensor, nn

from clae_fast import _check
from clae_fast.methods.base import PairMethod
from clae_fast.ops.hard_nt_xent import hard_nt_xent


class DCL(PairMethod):
    """Debiased contrastive learning on two views (Chuang et al., NeurIPS 2020).

    Args:
        encoder: f, from views to raw projections.
        temperature: Temperature of the softmax.
        adversarial: Whether to build the adversarial twin that attacks need.
        tau_plus: Share of the negatives taken to be of an image's own class, in [0, 1).
    """

    name: ClassVar[str] = "dcl"

    def __init__(
        self,
        encoder: nn.Module,
        *,
        temperature: float = 0.5,
        adversarial: bool = False,
        tau_plus: float = 0.1,
    ) -> None:
        super().__init__(encoder, temperature=temperature, adversarial=adversarial)
        _check.in_range("tau_plus", tau_plus, 0, 1)
        self.tau_plus = tau_plus

    def loss(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        """`clae_fast.hard_nt_xent` of the two views, with equal weights."""
        return hard_nt_xent(
            z_a, z_b, temperature=self.temperature, beta=0.0, tau_plus=self.tau_plus
        )
