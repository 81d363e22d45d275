"""AdCo: queries find their key among those of the batch and a bank of learned negatives."""

from dataclasses import dataclass

from torch import Tensor

from clae_fast.methods.bank import BankMethod, BankTarget
from clae_fast.methods.options import Temperature
from clae_fast.steps.batch import Batch
from clae_fast.steps.options import StepOptions


class AdCo(BankMethod):
    r"""Adversarial contrast (Hu et al., CVPR 2021): negatives that learn to be hard.

    Each query has to find its key among all keys of the step and the bank. The loss is

    .. math:: -\frac{1}{N} \sum_i \log \frac{e^{q_i \cdot k_i / T}}
        {\sum_{j=1}^N e^{q_i \cdot k_j / T} + \sum_{n=1}^K e^{q_i \cdot w_n / T}}

    with the keys k of the momentum encoder and the bank's unit rows w. The bank ascends on the same
    loss, at a temperature of its own. Small crops are further queries of the key of view q, and
    their losses are added, as released.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options(BankMethod.Options):
        """Settings of AdCo.

        Attributes:
            symmetric: Whether both views are queries and keys, so that loss and gradient of the
                bank are the mean of both directions: 8 units, 11 with the pair attack.
        """

        temperature: Temperature = 0.12
        symmetric: bool = False

        @property
        def large_queries(self) -> int:
            """Both views where `symmetric`."""
            return 1 + self.symmetric

    name = "adco"
    options: Options

    def targets(self, batch: Batch, options: StepOptions) -> list[BankTarget]:
        """Keys of all processes' rows, for each query view."""
        large = self.bank_keys(batch, options)
        targets = [BankTarget(keys, 1 / len(large), (), []) for keys in large]
        return targets + [BankTarget(large[0], 1.0, (), []) for _ in batch.views[2:]]

    def loss(self, z: Tensor, target: BankTarget) -> Tensor:
        """`clae_fast.info_nce` over keys and bank, weighted."""
        losses = self.contrast(z, target, self.temperature)
        self.keep(target, [losses])
        return target.weight * losses.mean()
