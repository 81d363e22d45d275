"""Methods whose negatives, or targets, are a bank of learnable keys."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clae_fast import _check
from clae_fast.methods.query import QueryMethod
from clae_fast.nn.momentum import follow, momentum_twin
from clae_fast.ops.info_nce import info_nce
from clae_fast.steps.batch import Batch
from clae_fast.steps.options import StepOptions


class BankTarget(NamedTuple):
    """What a query view is compared with.

    Attributes:
        keys: Unit rows, the key of each query, [N, D].
        weight: Of the view's loss in the step's.
        labels: The bank entries that are the queries' positives, [N] each; the loss is their mean.
        losses: Of the clean rows, for each of the labels, or one; `loss` leaves them here.
    """

    keys: Tensor
    weight: float
    labels: tuple[Tensor, ...]
    losses: list[Tensor]


class BankMethod(QueryMethod):
    """Queries and keys of two encoders, one of which follows the other, and a bank that learns.

    A run begins with a phase that fills the bank with keys, in which the method is momentum
    contrast: keys of a step are positives and negatives, beside the bank, and then entries of it.
    Once it is full the key encoder is set to the encoder, and the bank learns: one step of SGD by
    `clae_fast.bank_step` after the losses of a step are taken, of its clean queries.

    Args:
        encoder: f, from views to raw projections, of `dim` numbers; the key encoder starts as its
            copy.
        temperature: Temperature of the queries' softmax.
        adversarial: Whether to build the adversarial twin that attacks need.
        bank_size: Entries of the bank, K; at least as many as keys in a step.
        bank_lr: Its learning rate, constant.
        bank_momentum: Of its velocity, from 0 to below 1.
        bank_temperature: Temperature of its own softmax. Where it is `temperature`, the queries'
            losses spare the bank's step a third of its work.
        bank_decay: Its weight decay.
        key_momentum: Of the key encoder, from 0 to 1.

    Attributes:
        key_encoder: The encoder's momentum twin.
        bank: W, not normalised, [K, D].
        velocity: V, [K, D].
        filled: Keys that have been written into the bank, [].
    """

    small_crops: ClassVar[bool] = True

    bank: Tensor
    velocity: Tensor
    filled: Tensor
    key_momentum: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        *,
        temperature: float,
        adversarial: bool,
        bank_size: int,
        bank_lr: float,
        bank_momentum: float,
        bank_temperature: float,
        bank_decay: float,
        key_momentum: float,
    ) -> None:
        super().__init__(encoder, temperature=temperature, adversarial=adversarial)
        if bank_size < 1:
            raise ValueError(f"bank_size must be at least 1, got {bank_size}")
        if not bank_temperature > 0:
            raise ValueError(f"bank_temperature must be above 0, got {bank_temperature}")
        _check.in_range("bank_lr", bank_lr, 0)
        _check.in_range("bank_momentum", bank_momentum, 0, 1)
        _check.in_range("bank_decay", bank_decay, 0)
        if not 0 <= key_momentum <= 1:
            raise ValueError(f"key_momentum must be in [0, 1], got {key_momentum}")
        dim = getattr(encoder, "dim", None)
        if not isinstance(dim, int):
            raise TypeError("encoder must have dim, the length of its projections")
        self.bank_lr = bank_lr
        self.bank_momentum = bank_momentum
        self.bank_temperature = bank_temperature
        self.bank_decay = bank_decay
        self.key_encoder = momentum_twin(encoder)
        like = next(encoder.parameters())
        # the same numbers on every kind of device
        bank = F.normalize(torch.randn(bank_size, dim).to(like.device, like.dtype))
        self.register_buffer("bank", bank)
        self.register_buffer("velocity", torch.zeros_like(bank))
        filled = torch.zeros((), dtype=torch.int64, device=like.device)
        self.register_buffer("filled", filled)
        # a setting of the run, not its state
        self.register_buffer("key_momentum", like.new_tensor(key_momentum), persistent=False)
        self._full = False

    @property
    def phase(self) -> str:
        """Whether the bank is being filled."""
        return "" if self._full else "fill"

    def before_step(self, progress: float) -> None:
        """Ends the phase that fills the bank, with the key encoder as the encoder is."""
        # waits for the device as long as that phase lasts
        if not self._full and int(self.filled) >= len(self.bank):
            self._full = True
            # a run that goes on later has parted them since
            if not self.velocity.any():
                follow(self.key_encoder, self.encoder, torch.zeros_like(self.key_momentum))

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], *arguments: Any) -> None:
        super()._load_from_state_dict(state_dict, *arguments)
        self._full = False

    def keys(self, x: Tensor, options: StepOptions) -> Tensor:
        """Unit keys of a view of all processes' rows."""
        return F.normalize(options.world.all_gather(self.key_encoder(x)).to(self.bank.dtype))

    def require_room(self, rows: int) -> None:
        """Raises where a step has more keys than the bank has entries."""
        if len(self.bank) < rows:
            raise ValueError(
                f"bank_size must be at least {rows}, the keys of a step, got {len(self.bank)}"
            )

    def contrast(self, z: Tensor, target: BankTarget, temperature: float) -> Tensor:
        """Losses of queries that find their key among the step's and the bank, [N]."""
        columns = torch.cat([target.keys, self.bank])
        z = z.to(self.bank.dtype)
        return info_nce(z, columns, temperature=temperature, reduction="none")

    def keep(self, target: BankTarget, losses: Sequence[Tensor]) -> None:
        """Leaves the losses of clean queries, which are the first, to the bank's step."""
        if not target.losses:
            target.losses.extend(each.detach() for each in losses)

    def fill(self, keys: Tensor) -> None:
        """Writes keys into the bank."""
        places = torch.arange(len(keys), device=keys.device)
        self.bank.index_copy_(0, (self.filled + places) % len(self.bank), keys)
        self.filled.add_(len(keys))

    def known(self, targets: Sequence[BankTarget]) -> Tensor | None:
        """The losses of all targets' rows where they serve the bank's step."""
        if self.bank_temperature != self.temperature:
            return None
        return torch.cat([losses for target in targets for losses in target.losses])

    def after_step(self) -> None:
        """Moves the key encoder."""
        follow(self.key_encoder, self.encoder, self.key_momentum)

    def large(self, batch: Batch, options: StepOptions, both: bool) -> list[Tensor]:
        """Keys of view q and, where `both`, of view p."""
        x_p, x_q = batch.views[:2]
        keys = [self.keys(x, options) for x in ((x_q, x_p) if both else (x_q,))]
        self.require_room(sum(map(len, keys)))
        return keys
