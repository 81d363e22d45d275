"""H-SCL: supervised contrastive learning with weights for hard negatives."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from clae_fast import _check
from clae_fast.methods.supervised import SupervisedMethod
from clae_fast.ops.h_scl import h_scl


class HSCL(SupervisedMethod):
    """Supervised contrastive learning with hard negatives on two views (Jiang et al., 2022).

    With beta = 0, all rows of other classes count alike.

    Args:
        encoder: f, from views to raw projections.
        temperature: Temperature of the softmax.
        adversarial: Whether to build the adversarial twin that attacks need.
        beta: How far the weights of negatives are concentrated on the nearest, from 0 on.
        detach_weights: Whether the weights are constants in the gradient.
    """

    name: ClassVar[str] = "h_scl"

    def __init__(
        self,
        encoder: nn.Module,
        *,
        temperature: float = 0.5,
        adversarial: bool = False,
        beta: float = 1.0,
        detach_weights: bool = False,
    ) -> None:
        super().__init__(encoder, temperature=temperature, adversarial=adversarial)
        _check.in_range("beta", beta, 0)
        self.beta = beta
        self.detach_weights = detach_weights

    def loss(self, z_a: Tensor, z_b: Tensor, labels: Tensor) -> Tensor:
        """`clae_fast.h_scl` of the rows of both views."""
        return h_scl(
            torch.cat([z_a, z_b]),
            labels.repeat(2),
            temperature=self.temperature,
            beta=self.beta,
            detach_weights=self.detach_weights,
        )
