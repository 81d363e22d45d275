"""SimCLR: both views anchor, all other rows of the batch are negatives."""

from typing import ClassVar

from torch import Tensor, nn

from clae_fast.methods.base import PairMethod
from clae_fast.ops.nt_xent import nt_xent
from clae_fast.ops.tied_nt_xent import tied_nt_xent


class SimCLR(PairMethod):
    """NT-Xent on two views (Chen et al., ICML 2020), CLAE's main trunk.

    Args:
        encoder: f, from views to raw projections.
        temperature: Temperature of the softmax.
        adversarial: Whether to build the adversarial twin that attacks need.
    """

    name: ClassVar[str] = "simclr"

    def __init__(
        self, encoder: nn.Module, *, temperature: float = 0.5, adversarial: bool = False
    ) -> None:
        super().__init__(encoder, temperature=temperature, adversarial=adversarial)

    def loss(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        """`clae_fast.nt_xent` of the two views."""
        return nt_xent(z_a, z_b, temperature=self.temperature)

    def attack_grad(self, z: Tensor) -> Tensor:
        """`clae_fast.tied_nt_xent`: the closed form, on N rows instead of 2N."""
        return tied_nt_xent(z, temperature=self.temperature)
