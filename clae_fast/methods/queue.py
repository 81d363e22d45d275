"""Methods whose targets come from a momentum encoder, with a queue of those of past steps."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clae_fast.methods.query import QueryMethod
from clae_fast.nn.grouped_norm import grouped_norm
from clae_fast.nn.momentum import follow, momentum_twin
from clae_fast.nn.negatives import log_sum_exp
from clae_fast.nn.split_norm import dealt
from clae_fast.steps.batch import Batch
from clae_fast.steps.options import StepOptions, StepResult


class Keys(NamedTuple):
    """What a query view is compared with.

    Attributes:
        rows: Unit rows, the positive of each query, [N, D].
        weight: Of the view's loss in the step's.
    """

    rows: Tensor
    weight: float


class QueueMethod(QueryMethod):
    """Queries and keys of two encoders, one of which follows the other, and past keys in a queue.

    View p is the query, view q the key; where `symmetric`, the other way round too, and the loss is
    the mean of both. Small crops are further queries of the key of view q: the mean of their losses
    is added.

    The queue is a ring in one buffer: the keys of all processes of a step overwrite the oldest
    ones, where a pointer on the device says, after the losses are taken.

    On one device, `norm_splits` has BatchNorm see the queries as so many batches and deals the keys
    out to others, see `clae_fast.nn.split_norm`; with several processes leave it at 1, where
    BatchNorm is synchronised.

    Args:
        encoder: f, from views to raw projections, of `dim` numbers; the key encoder starts as its
            copy.
        temperature: Temperature of the softmax.
        adversarial: Whether to build the adversarial twin that attacks need.
        queue_size: Keys in the queue, K.
        key_momentum: Of the key encoder, from 0 to 1.
        symmetric: Whether both views are queries and keys: 8 units, 11 with the pair attack.
        norm_splits: Batches that BatchNorm sees a batch as.

    Attributes:
        key_encoder: The encoder's momentum twin.
        queue: Unit rows, [K, D].
        pointer: The row of the queue that is written next, [].
    """

    small_crops: ClassVar[bool] = True

    key_momentum: Tensor
    queue: Tensor
    pointer: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        *,
        temperature: float,
        adversarial: bool,
        queue_size: int,
        key_momentum: float,
        symmetric: bool = False,
        norm_splits: int = 1,
    ) -> None:
        super().__init__(encoder, temperature=temperature, adversarial=adversarial)
        require_at_least(0, queue_size=queue_size)
        require_at_least(1, norm_splits=norm_splits)
        if not 0 <= key_momentum <= 1:
            raise ValueError(f"key_momentum must be in [0, 1], got {key_momentum}")
        dim = getattr(encoder, "dim", None)
        if not isinstance(dim, int):
            raise TypeError("encoder must have dim, the length of its projections")
        self.symmetric = symmetric
        self.norm_splits = norm_splits
        self.key_encoder = momentum_twin(encoder)
        like = next(encoder.parameters())
        # the same numbers on every kind of device
        queue = F.normalize(torch.randn(queue_size, dim).to(like.device, like.dtype))
        pointer = torch.zeros((), dtype=torch.int64, device=like.device)
        self.register_buffer("queue", queue)
        self.register_buffer("pointer", pointer)
        # a setting of the run, not its state
        self.register_buffer("key_momentum", like.new_tensor(key_momentum), persistent=False)

    def queries(self, batch: Batch) -> tuple[Tensor, ...]:
        """View p, view q where symmetric, then small crops."""
        return batch.views[: 1 + self.symmetric] + batch.views[2:]

    def targets(self, batch: Batch, options: StepOptions) -> list[Keys]:
        """Keys of all processes' rows, for each query view."""

        def keys(x: Tensor) -> Tensor:
            z = options.world.all_gather(dealt(self.key_encoder, x, self.norm_splits))
            return F.normalize(z.to(self.queue.dtype))

        x_p, x_q, *small = batch.views
        k_q = keys(x_q)
        large = [k_q, keys(x_p)] if self.symmetric else [k_q]
        rows = len(large) * len(k_q)
        if 0 < len(self.queue) < rows:
            raise ValueError(
                f"queue_size must be at least {rows}, the keys of a step, got {len(self.queue)}"
            )
        return [Keys(k, 1 / len(large)) for k in large] + [Keys(k_q, 1 / len(small)) for _ in small]

    def negatives(
        self,
        u: Tensor,  # [N, D]
    ) -> Tensor:
        """Logarithm of what all negatives of each unit query add to its denominator, [N]."""
        return log_sum_exp(u, self.queue, temperature=self.temperature)

    def loss(self, z: Tensor, target: Keys) -> Tensor:
        r"""Mean of :math:`\log (e^{s_i} + \sum_j e^{s_{ij}}) - s_i`, positive and negatives."""
        u = F.normalize(z.to(self.queue.dtype))
        positive = (u * target.rows).sum(1) / self.temperature
        return target.weight * F.softplus(self.negatives(u) - positive).mean()

    def update(self, z: Sequence[Tensor], targets: Sequence[Keys]) -> None:
        """Writes the keys into the queue."""
        if not len(self.queue):
            return
        keys = torch.cat([target.rows for target in targets[: 1 + self.symmetric]])
        places = torch.arange(len(keys), device=keys.device)
        self.queue.index_copy_(0, (self.pointer + places) % len(self.queue), keys)
        self.pointer.add_(len(keys)).remainder_(len(self.queue))

    def after_step(self) -> None:
        """Moves the key encoder."""
        follow(self.key_encoder, self.encoder, self.key_momentum)

    def _step(self, batch: Batch, options: StepOptions) -> StepResult:
        splits = self.norm_splits
        if splits == 1:
            return super()._step(batch, options)
        rows = options.micro_batch or len(batch.views[0])
        if rows % splits:
            raise ValueError(
                f"norm_splits must divide the {rows} rows encoded at once, got {splits}"
            )
        with ExitStack() as stack:
            for encoder in (self.encoder, self.adv_encoder):
                if encoder is not None:
                    stack.enter_context(grouped_norm(encoder, splits, split=True))
            return super()._step(batch, options)


def require_at_least(least: int, **options: int) -> None:
    """Raises ValueError, naming the first of the options that is below `least`."""
    for name, value in options.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
