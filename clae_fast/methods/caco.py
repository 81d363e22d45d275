"""CaCo: queries find an entry of a bank that learns, their positive there named by a key."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from clae_fast.methods.bank import BankMethod, BankTarget
from clae_fast.nn.momentum import cosine_momentum
from clae_fast.ops.bank_step import bank_step
from clae_fast.ops.info_nce import info_nce
from clae_fast.ops.topk_similarity import topk_similarity
from clae_fast.steps.batch import Batch
from clae_fast.steps.options import StepCost, StepOptions


class CaCo(BankMethod):
    r"""Cooperative-adversarial contrast (Wang et al., TPAMI 2023): positives learn as well.

    .. math:: -\frac{1}{N} \sum_i \log \frac{e^{q_i \cdot w_{y_i} / T}}
        {\sum_{n=1}^K e^{q_i \cdot w_n / T}}, \quad y_i = \arg\max_n k'_i \cdot w_n

    summed over both large views, with w the bank's unit rows and k' the momentum key of the other
    view. There are no other columns. In the bank's gradient the sign of every entry that is no
    positive is flipped. The key encoder's momentum grows to 1 along a cosine.

    Small crops are queries of both labels. With them the losses of large and of small ones are
    averaged, each, and added.

    Args:
        encoder: f, from views to raw projections.
        temperature: T, above 0.
        adversarial: Whether to build the adversarial twin that attacks need.
        bank_size: Entries of the bank, K.
        bank_lr: Its learning rate.
        bank_momentum: Of its velocity.
        bank_temperature: Temperature of its own softmax.
        bank_decay: Its weight decay.
        key_momentum: Of the key encoder at first, from 0 to 1.
        fill_temperature: Temperature of the momentum contrast that fills the bank.
    """

    name: ClassVar[str] = "caco"
    units: ClassVar[Mapping[str, int]] = {"none": 8, "pair": 11}

    def __init__(
        self,
        encoder: nn.Module,
        *,
        temperature: float = 0.2,
        adversarial: bool = False,
        bank_size: int = 512,
        bank_lr: float = 0.3,
        bank_momentum: float = 0.9,
        bank_temperature: float = 0.2,
        bank_decay: float = 0.0,
        key_momentum: float = 0.99,
        fill_temperature: float = 0.2,
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
        if not fill_temperature > 0:
            raise ValueError(f"fill_temperature must be above 0, got {fill_temperature}")
        self.fill_temperature = fill_temperature
        self._first_momentum = key_momentum

    @classmethod
    def cost(cls, options: StepOptions, *, small_crops: float = 0.0, **own: Any) -> StepCost:
        """Of two queries and two keys, and small crops."""
        return super().cost(options, small_crops=small_crops, symmetric=True)

    def before_step(self, progress: float) -> None:
        """Ends the phase that fills the bank, and sets the key encoder's momentum."""
        super().before_step(progress)
        self.key_momentum.fill_(cosine_momentum(progress, self._first_momentum))

    def queries(self, batch: Batch) -> tuple[Tensor, ...]:
        """Both large views, then small crops."""
        return batch.views

    def targets(self, batch: Batch, options: StepOptions) -> list[BankTarget]:
        """Keys of all processes' rows and the labels that these have, for each query view."""
        k_q, k_p = self.large(batch, options, both=True)
        y_q, y_p = (topk_similarity(k, self.bank, 1)[1][:, 0] for k in (k_q, k_p))
        small = len(batch.views) - 2
        weight = 0.5 if small else 1.0
        targets = [BankTarget(k_q, weight, (y_q,), []), BankTarget(k_p, weight, (y_p,), [])]
        return targets + [BankTarget(k_q, 1 / small, (y_q, y_p), []) for _ in range(small)]

    def loss(self, z: Tensor, target: BankTarget) -> Tensor:
        """`clae_fast.info_nce` over the bank, weighted."""
        if not self._full:
            return target.weight * self.contrast(z, target, self.fill_temperature).mean()
        z = z.to(self.bank.dtype)
        losses = [
            info_nce(z, self.bank, temperature=self.temperature, positive=y, reduction="none")
            for y in target.labels
        ]
        self.keep(target, losses)
        return target.weight * torch.stack(losses).mean()

    def update(self, z: Sequence[Tensor], targets: Sequence[BankTarget]) -> None:
        """Fills the bank with keys, or takes it on by `clae_fast.bank_step`."""
        if not self._full:
            self.fill(torch.cat([target.keys for target in targets[:2]]))
            return
        pairs = [
            (rows, labels, target.weight / (len(target.labels) * len(rows)))
            for rows, target in zip(z, targets, strict=True)
            for labels in target.labels
        ]
        bank_step(
            self.bank,
            self.velocity,
            torch.cat([rows for rows, _, _ in pairs]).to(self.bank.dtype),
            positive=torch.cat([labels for _, labels, _ in pairs]),
            weight=torch.cat([self.bank.new_full((len(rows),), share) for rows, _, share in pairs]),
            losses=self.known(targets),
            lr=self.bank_lr,
            temperature=self.bank_temperature,
            momentum=self.bank_momentum,
            weight_decay=self.bank_decay,
        )
