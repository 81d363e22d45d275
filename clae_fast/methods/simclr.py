"""SimCLR: both views anchor, and all other rows of the batch are negatives."""

from torch import Tensor

from clae_fast.methods.pair import PairMethod
from clae_fast.ops.nt_xent import nt_xent
from clae_fast.ops.tied_nt_xent import tied_nt_xent
from clae_fast.steps.options import ALONE, StepContext


class SimCLR(PairMethod):
    r"""SimCLR (Chen et al., ICML 2020): each row has to find the other view of its image.

    It looks among all other rows of both views, 2N in all. The loss is `clae_fast.nt_xent`,

    .. math:: \frac{1}{2N} \sum_i \log \sum_{j \ne i} e^{s_{ij}} - s_{i,\pi(i)},
        \quad s_{ij} = \frac{z_i \cdot z_j}{\|z_i\| \|z_j\| T}

    with the other view :math:`\pi(i)` of row i. This is the main trunk of CLAE, whose code trains
    it with T = 0.5.
    """

    name = "simclr"

    def loss(self, z_a: Tensor, z_b: Tensor, context: StepContext = ALONE) -> Tensor:
        """`clae_fast.nt_xent` of the two views."""
        return nt_xent(z_a, z_b, temperature=self.temperature)

    def attack_grad(self, z: Tensor, context: StepContext = ALONE) -> Tensor:
        """`clae_fast.tied_nt_xent`, the closed form on N rows instead of 2N."""
        return tied_nt_xent(z, temperature=self.temperature)
