"""Methods with a bank: learnable keys that are negatives, or targets as well."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from clae_fast.methods.momentum import MomentumMethod, require_room, write
from clae_fast.methods.options import AboveZero, BelowOne, NotNegative, Size
from clae_fast.nn.momentum import follow
from clae_fast.ops.bank_step import bank_step
from clae_fast.ops.info_nce import info_nce
from clae_fast.steps.batch import Batch
from clae_fast.steps.options import StepOptions


class BankTarget(NamedTuple):
    """What a query view is compared with.

    Attributes:
        keys: The key of each query, a unit row, [N, D].
        weight: The weight of the view's loss in the loss of the step.
        labels: The bank entries that are the queries' positives, [N] each; the loss is the mean
            over them. There are none where the key is the positive.
        losses: Losses of the clean queries, one for each of the labels, or one; `loss` leaves them
            here for the step of the bank.
    """

    keys: Tensor
    weight: float
    labels: tuple[Tensor, ...]
    losses: list[Tensor]


class BankMethod(MomentumMethod):
    """A method that compares queries with a bank of keys which learns as they do.

    A run begins with a phase that fills the bank with keys. In it the method is momentum contrast:
    the keys of a step are positives and negatives beside the bank, and then become entries of it.
    Once the bank is full, the key encoder is set to the encoder, and the bank learns by
    `clae_fast.bank_step`, one step of SGD after the losses of each step, from its clean queries.

    Attributes:
        bank: The bank W, not normalized, [K, D].
        velocity: Its velocity V, [K, D].
        filled: How many keys have been written into the bank, [].
    """

    @dataclass(frozen=True, kw_only=True)
    class Options(MomentumMethod.Options):
        """Settings of a method with a bank.

        Attributes:
            bank_size: How many entries the bank has, K; at least as many as a step has keys.
            bank_lr: Its learning rate, which is constant.
            bank_momentum: The momentum of its velocity.
            bank_temperature: The temperature of its own softmax. Where it equals `temperature`, the
                losses of the queries spare the bank's step a third of its work.
            bank_decay: Its weight decay.
        """

        bank_size: Size = 512
        bank_lr: NotNegative = 0.3
        bank_momentum: BelowOne = 0.9
        bank_temperature: AboveZero = 0.1
        bank_decay: NotNegative = 1e-4

    options: Options
    bank: Tensor
    velocity: Tensor
    filled: Tensor

    def __init__(self, encoder: nn.Module, *, adversarial: bool = False, **options: Any) -> None:
        super().__init__(encoder, adversarial=adversarial, **options)
        bank = self.add_rows("bank", self.options.bank_size)
        self.register_buffer("velocity", torch.zeros_like(bank))
        self.add_counter("filled")
        self._full = False

    @property
    def phase(self) -> str:
        """Whether the bank is being filled."""
        return "" if self._full else "fill"

    def before_step(self, progress: float) -> None:
        """Ends the phase that fills the bank, and sets the key encoder to the encoder then."""
        # waits for the device as long as that phase lasts
        if not self._full and int(self.filled) >= len(self.bank):
            self._full = True
            # in a run that goes on later, the two have parted since
            if not self.velocity.any():
                follow(self.key_encoder, self.encoder, torch.zeros_like(self.key_momentum))

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], *arguments: Any) -> None:
        super()._load_from_state_dict(state_dict, *arguments)
        self._full = False

    def bank_keys(self, batch: Batch, options: StepOptions) -> list[Tensor]:
        """The keys of the large queries, for which the bank must have room."""
        keys = self.large_keys(batch, options.world)
        require_room("bank_size", len(self.bank), keys)
        return keys

    def contrast(self, z: Tensor, target: BankTarget, temperature: float) -> Tensor:
        """Losses of queries that look for their key among the step's and the bank, [N]."""
        columns = torch.cat([target.keys, self.bank])
        z = z.to(self.bank.dtype)
        return info_nce(z, columns, temperature=temperature, reduction="none")

    def keep(self, target: BankTarget, losses: Sequence[Tensor]) -> None:
        """Leaves the losses of clean queries, which come first, to the step of the bank."""
        if not target.losses:
            target.losses.extend(each.detach() for each in losses)

    def update(self, z: Sequence[Tensor], targets: Sequence[BankTarget]) -> None:
        """Writes keys into the bank, or moves it by `clae_fast.bank_step` once it is full."""
        own = self.options
        if not self._full:
            keys = torch.cat([target.keys for target in targets[: own.large_queries]])
            write(self.bank, self.filled, keys)
            self.filled.add_(len(keys))
            return
        # the bank counts the queries of a view once for each of their labels
        anchors, weights = [], []
        for rows, target in zip(z, targets, strict=True):
            times = max(1, len(target.labels))
            anchors += [rows] * times
            share = target.weight / (times * len(rows))
            weights.append(self.bank.new_full((times * len(rows),), share))
        labels = [each for target in targets for each in target.labels]
        keys = torch.cat([target.keys for target in targets])
        known = [each for target in targets for each in target.losses]
        bank_step(
            self.bank,
            self.velocity,
            torch.cat(anchors).to(self.bank.dtype),
            **({"positive": torch.cat(labels)} if labels else {"keys": keys, "views": len(z)}),
            weight=torch.cat(weights),
            losses=torch.cat(known) if own.bank_temperature == self.temperature else None,
            lr=own.bank_lr,
            temperature=own.bank_temperature,
            momentum=own.bank_momentum,
            weight_decay=own.bank_decay,
        )
