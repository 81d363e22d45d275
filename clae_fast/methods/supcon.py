"""SupCon: all views of a class are positives of one another."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from clae_fast.methods.supervised import SupervisedMethod
from clae_fast.ops.sup_con import sup_con


class SupCon(SupervisedMethod):
    """Supervised contrastive learning, its L_out, on two views (Khosla et al., NeurIPS 2020).

    Args:
        encoder: f, from views to raw projections.
        temperature: Temperature of the softmax.
        adversarial: Whether to build the adversarial twin that attacks need.
    """

    name: ClassVar[str] = "supcon"

    def __init__(
        self, encoder: nn.Module, *, temperature: float = 0.1, adversarial: bool = False
    ) -> None:
        super().__init__(encoder, temperature=temperature, adversarial=adversarial)

    def loss(self, z_a: Tensor, z_b: Tensor, labels: Tensor) -> Tensor:
        """`clae_fast.sup_con` of the rows of both views."""
        return sup_con(torch.cat([z_a, z_b]), labels.repeat(2), temperature=self.temperature)
