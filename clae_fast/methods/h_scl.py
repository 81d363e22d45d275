"""H-SCL: supervised contrastive learning with weights for hard negatives."""

from dataclasses import dataclass

from torch import Tensor

from clae_fast.methods.options import NotNegative
from clae_fast.methods.supervised import SupervisedMethod
from clae_fast.ops.h_scl import h_scl


class HSCL(SupervisedMethod):
    r"""Supervised contrastive learning with hard negatives (Jiang et al., 2022).

    Each row has to find every row of its class among the rows of other classes, which count the
    more, the nearer they are. The loss is `clae_fast.h_scl`,

    .. math:: \frac{1}{|P|} \sum_{(i, j) \in P} \log (e^{s_{ij}} + (2N - 2) \mu_i) - s_{ij}, \quad
        \mu_i = \frac{\sum_k e^{(1 + \beta) s_{ik}}}{\sum_k e^{\beta s_{ik}}}

    over the pairs P of different rows of one class, with the cosine over T, s, and sums over the
    rows k of other classes. With beta = 0 these rows count alike. As in the released code,
    positives are in no denominator.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options(SupervisedMethod.Options):
        """Settings of H-SCL.

        Attributes:
            beta: How far the weights of negatives are concentrated on the nearest ones.
            detach_weights: Whether the weights are constants in the gradient.
        """

        beta: NotNegative = 1.0
        detach_weights: bool = False

    name = "h_scl"

    def class_loss(self, z: Tensor, labels: Tensor) -> Tensor:
        """`clae_fast.h_scl` of the rows."""
        return h_scl(z, labels, **vars(self.options))
