"""UEL: an instance softmax with a term that spreads the negatives."""

from dataclasses import dataclass

from torch import Tensor

from clae_fast.methods.options import Temperature
from clae_fast.methods.pair import PairMethod
from clae_fast.ops.uel import uel
from clae_fast.steps.options import ALONE, StepContext


class UEL(PairMethod):
    r"""Unsupervised embedding learning (Ye et al., CVPR 2019), a trunk of CLAE.

    Each row has to find the other view of its image, and every other row has to tell that it is
    not that image. The loss is `clae_fast.uel`,

    .. math:: -\frac{1}{2N} \sum_i \Bigl[ \log p_{i,\pi(i)}
        + \sum_{j \ne i, \pi(i)} \log (1 - p_{ij}) \Bigr],
        \quad p_{ij} = \frac{e^{s_{ij}}}{\sum_{k \ne i} e^{s_{ik}}}

    over the 2N rows of both views, with the cosine over T, s, and the other view :math:`\pi(i)` of
    row i. As in the released code, the gradient of a row comes from its own term alone: the other
    rows are constants in it.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options(PairMethod.Options):
        """Settings of UEL, at the released temperature."""

        temperature: Temperature = 0.1

    name = "uel"

    def loss(self, z_a: Tensor, z_b: Tensor, context: StepContext = ALONE) -> Tensor:
        """`clae_fast.uel` of the two views."""
        return uel(z_a, z_b, temperature=self.temperature)
