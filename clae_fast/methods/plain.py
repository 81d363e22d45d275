"""Plain: each row of view 1 finds its partner among the rows of view 2."""

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from clae_fast.methods.base import PairMethod
from clae_fast.ops.info_nce import info_nce


class Plain(PairMethod):
    """One-directional InfoNCE, the trunk that CLAE's code calls Plain.

    Args:
        encoder: f, from views to raw projections.
        temperature: Temperature of the softmax.
        adversarial: Whether to build the adversarial twin that attacks need.
    """

    name: ClassVar[str] = "plain"
    units: ClassVar[Mapping[str, int]] = {**PairMethod.units, "released": 18}
    reforward_anchor: ClassVar[bool] = True

    def __init__(
        self, encoder: nn.Module, *, temperature: float = 0.1, adversarial: bool = False
    ) -> None:
        super().__init__(encoder, temperature=temperature, adversarial=adversarial)

    def loss(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        """`clae_fast.info_nce` with `z_a` as anchors."""
        return info_nce(z_a, z_b, temperature=self.temperature)
