"""UEL: instance softmax with a term that spreads the negatives."""

from typing import ClassVar

from torch import Tensor, nn

from clae_fast.methods.base import PairMethod
from clae_fast.ops.uel import uel


class UEL(PairMethod):
    """Unsupervised embedding learning (Ye et al., CVPR 2019), gradient through anchors only.

    Args:
        encoder: f, from views to raw projections.
        temperature: Temperature of the softmax.
        adversarial: Whether to build the adversarial twin that attacks need.
    """

    name: ClassVar[str] = "uel"

    def __init__(
        self, encoder: nn.Module, *, temperature: float = 0.1, adversarial: bool = False
    ) -> None:
        super().__init__(encoder, temperature=temperature, adversarial=adversarial)

    def loss(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        """`clae_fast.uel` of the two views."""
        return uel(z_a, z_b, temperature=self.temperature)
