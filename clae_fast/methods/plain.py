"""Plain: each row of view p finds its partner among the rows of view q."""

from dataclasses import dataclass

from torch import Tensor

from clae_fast.methods.options import Temperature
from clae_fast.methods.pair import PairMethod
from clae_fast.ops.info_nce import info_nce
from clae_fast.steps.options import ALONE, StepContext


class Plain(PairMethod):
    r"""One-directional InfoNCE: each row of view p has to find its partner in view q.

    It looks among the N rows of view q alone. The loss is `clae_fast.info_nce`,

    .. math:: \frac{1}{N} \sum_i \log \sum_j e^{s_{ij}} - s_{ii},
        \quad s_{ij} = \frac{p_i \cdot q_j}{\|p_i\| \|q_j\| T}

    This is the trunk that the code of CLAE calls Plain. That code encodes view p once more for the
    adversarial loss, so that its own order of passes costs 18 units here instead of 15.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options(PairMethod.Options):
        """Settings of Plain, at the released temperature."""

        temperature: Temperature = 0.1

    name = "plain"
    reforward_anchor = True

    def loss(self, z_a: Tensor, z_b: Tensor, context: StepContext = ALONE) -> Tensor:
        """`clae_fast.info_nce` with `z_a` as anchors."""
        return info_nce(z_a, z_b, temperature=self.temperature)
