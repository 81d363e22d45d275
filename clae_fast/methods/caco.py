"""CaCo: queries find an entry of a bank that learns, their positive there named by a key."""

from dataclasses import dataclass

import torch
from torch import Tensor

from clae_fast.methods.bank import BankMethod, BankTarget
from clae_fast.methods.options import AboveZero, NotNegative
from clae_fast.nn.momentum import cosine_momentum
from clae_fast.ops.info_nce import info_nce
from clae_fast.ops.topk_similarity import topk_similarity
from clae_fast.steps.batch import Batch
from clae_fast.steps.options import StepOptions


class CaCo(BankMethod):
    r"""Cooperative-adversarial contrast (Wang et al., TPAMI 2023): positives learn as well.

    Each query has to find the entry of the bank that is nearest to the momentum key of the other
    view. The loss is the sum over both large views of

    .. math:: -\frac{1}{N} \sum_i \log \frac{e^{q_i \cdot w_{y_i} / T}}
        {\sum_{n=1}^K e^{q_i \cdot w_n / T}}, \quad y_i = \arg\max_n k'_i \cdot w_n

    with the bank's unit rows w and the other view's keys k'. There are no other columns. In the
    gradient of the bank, the sign of every entry that is no positive is flipped: negatives ascend
    on the loss and positives descend. The momentum of the key encoder grows to 1 along a cosine.

    Small crops are queries with the labels of both large views. Where there are any, the losses of
    large views and of crops are averaged separately, and then added.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options(BankMethod.Options):
        """Settings of CaCo.

        Attributes:
            key_momentum: What the key encoder keeps of its weights in a step at first.
            fill_temperature: Temperature of the momentum contrast that fills the bank.
        """

        bank_temperature: AboveZero = 0.2
        bank_decay: NotNegative = 0.0
        fill_temperature: AboveZero = 0.2

        @property
        def large_queries(self) -> int:
            """Both views."""
            return 2

    name = "caco"
    options: Options

    def before_step(self, progress: float) -> None:
        """Ends the phase that fills the bank, and sets the momentum of the key encoder."""
        super().before_step(progress)
        self.key_momentum.fill_(cosine_momentum(progress, self.options.key_momentum))

    def targets(self, batch: Batch, options: StepOptions) -> list[BankTarget]:
        """Keys of all processes' rows, and the labels that these have, for each query view."""
        k_q, k_p = self.bank_keys(batch, options)
        y_q, y_p = (topk_similarity(k, self.bank, 1)[1][:, 0] for k in (k_q, k_p))
        small = len(batch.views) - 2
        weight = 0.5 if small else 1.0
        targets = [BankTarget(k_q, weight, (y_q,), []), BankTarget(k_p, weight, (y_p,), [])]
        return targets + [BankTarget(k_q, 1 / small, (y_q, y_p), []) for _ in range(small)]

    def loss(self, z: Tensor, target: BankTarget) -> Tensor:
        """`clae_fast.info_nce` over the bank, weighted."""
        if not self._full:
            contrast = self.contrast(z, target, self.options.fill_temperature)
            return target.weight * contrast.mean()
        z = z.to(self.bank.dtype)
        losses = [
            info_nce(z, self.bank, temperature=self.temperature, positive=y, reduction="none")
            for y in target.labels
        ]
        self.keep(target, losses)
        return target.weight * torch.stack(losses).mean()
