"""AdCo: queries find their key among those of the batch and a bank of learned negatives."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from clae_fast.methods.bank import BankMethod, BankTarget
from clae_fast.ops.bank_step import bank_step
from clae_fast.steps.batch import Batch
from clae_fast.steps.options import StepOptions


class AdCo(BankMethod):
    r"""Adversarial contrast (Hu et al., CVPR 2021): negatives that learn to be hard.

    .. math:: -\frac{1}{N} \sum_i \log \frac{e^{q_i \cdot k_i / T}}
        {\sum_{j=1}^N e^{q_i \cdot k_j / T} + \sum_{n=1}^K e^{q_i \cdot w_n / T}}

    with the keys of the momentum encoder, all of a step, and the bank's unit rows w. The bank
    ascends on the same loss at its own temperature. Small crops are further queries of the key of
    view q, whose losses are added.

    Args:
        encoder: f, from views to raw projections.
        temperature: T, above 0.
        adversarial: Whether to build the adversarial twin that attacks need.
        bank_size: Entries of the bank, K.
        bank_lr: Its learning rate.
        bank_momentum: Of its velocity.
        bank_temperature: Temperature of its own softmax.
        bank_decay: Its weight decay.
        key_momentum: Of the key encoder, from 0 to 1.
        symmetric: Whether both views are queries and keys, and loss and bank's gradient the mean
            of both: 8 units, 11 with the pair attack.
    """

    name: ClassVar[str] = "adco"

    def __init__(
        self,
        encoder: nn.Module,
        *,
        temperature: float = 0.12,
        adversarial: bool = False,
        bank_size: int = 512,
        bank_lr: float = 0.3,
        bank_momentum: float = 0.9,
        bank_temperature: float = 0.1,
        bank_decay: float = 1e-4,
        key_momentum: float = 0.99,
        symmetric: bool = False,
    ) -> None:
        super().__init__(
            encoder,
            temperature=temperature,
            adversarial=adversarial,
            bank_size=bank_size,
            bank_lr=bank_lr,
            bank_momentum=bank_momentum,
            bank_temperature=bank_temperature,
            bank_decay=bank_decay,
            key_momentum=key_momentum,
        )
        self.symmetric = symmetric

    def queries(self, batch: Batch) -> tuple[Tensor, ...]:
        """View p, view q where symmetric, then small crops."""
        return batch.views[: 1 + self.symmetric] + batch.views[2:]

    def targets(self, batch: Batch, options: StepOptions) -> list[BankTarget]:
        """Keys of all processes' rows, for each query view."""
        large = self.large(batch, options, self.symmetric)
        targets = [BankTarget(keys, 1 / len(large), (), []) for keys in large]
        return targets + [BankTarget(large[0], 1.0, (), []) for _ in batch.views[2:]]

    def loss(self, z: Tensor, target: BankTarget) -> Tensor:
        """`clae_fast.info_nce` over keys and bank, weighted."""
        losses = self.contrast(z, target, self.temperature)
        self.keep(target, [losses])
        return target.weight * losses.mean()

    def update(self, z: Sequence[Tensor], targets: Sequence[BankTarget]) -> None:
        """Fills the bank with keys, or makes it harder by `clae_fast.bank_step`."""
        if not self._full:
            self.fill(torch.cat([target.keys for target in targets[: 1 + self.symmetric]]))
            return
        weights = [rows.new_full((len(rows),), 1.0) for rows in z]
        for weight, target in zip(weights, targets, strict=True):
            weight.mul_(target.weight / len(weight))
        bank_step(
            self.bank,
            self.velocity,
            torch.cat(list(z)).to(self.bank.dtype),
            keys=torch.cat([target.keys for target in targets]),
            weight=torch.cat(weights).to(self.bank.dtype),
            losses=self.known(targets),
            views=len(z),
            lr=self.bank_lr,
            temperature=self.bank_temperature,
            momentum=self.bank_momentum,
            weight_decay=self.bank_decay,
        )
