"""SupCon: all rows of one class are positives of one another."""

from dataclasses import dataclass

from torch import Tensor

from clae_fast.methods.options import Temperature
from clae_fast.methods.supervised import SupervisedMethod
from clae_fast.ops.sup_con import sup_con


class SupCon(SupervisedMethod):
    r"""Supervised contrastive learning (Khosla et al., NeurIPS 2020).

    Each row has to find all rows of its class, among the rows of both views. The loss is
    `clae_fast.sup_con`, the paper's L_out,

    .. math:: \frac{1}{2N} \sum_i \log \sum_{j \ne i} e^{s_{ij}}
        - \frac{1}{|P_i|} \sum_{p \in P_i} s_{ip}

    with the cosine over T, s, and the other rows :math:`P_i` of the class of row i.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options(SupervisedMethod.Options):
        """Settings of SupCon, at the paper's temperature."""

        temperature: Temperature = 0.1

    name = "supcon"

    def class_loss(self, z: Tensor, labels: Tensor) -> Tensor:
        """`clae_fast.sup_con` of the rows."""
        return sup_con(z, labels, temperature=self.temperature)
