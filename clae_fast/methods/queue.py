"""Methods with a queue: the keys of past steps."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from clae_fast.methods.momentum import MomentumMethod, require_room, write
from clae_fast.methods.options import Count
from clae_fast.steps.batch import Batch
from clae_fast.steps.options import StepOptions


class Keys(NamedTuple):
    """What a query view is compared with.

    Attributes:
        rows: The positive of each query, a unit row, [N, D].
        weight: The weight of the view's loss in the loss of the step.
    """

    rows: Tensor
    weight: float


class QueueMethod(MomentumMethod):
    """A method that compares queries with their keys and with the keys of past steps, in a queue.

    The queue is a ring in one buffer. After the losses of a step are taken, its keys, those of all
    processes, overwrite the oldest ones, where a pointer on the device says. The loss of a step is
    the mean over the large queries, and the mean over small crops, which look for the key of
    view q, is added.

    Attributes:
        queue: Unit rows, [K, D].
        pointer: The row of the queue that is written next, [].
    """

    @dataclass(frozen=True, kw_only=True)
    class Options(MomentumMethod.Options):
        """Settings of a method with a queue.

        Attributes:
            queue_size: How many keys the queue holds, K.
        """

        queue_size: Count = 512

        def require_as_many(self, hard: int) -> None:
            """Raises ValueError where there is a queue, but of fewer keys than `hard`."""
            if 0 < self.queue_size < hard:
                raise ValueError(f"hard must be at most queue_size ({self.queue_size}), got {hard}")

    options: Options
    queue: Tensor
    pointer: Tensor

    def __init__(self, encoder: nn.Module, *, adversarial: bool = False, **options: Any) -> None:
        super().__init__(encoder, adversarial=adversarial, **options)
        self.add_rows("queue", self.options.queue_size)
        self.add_counter("pointer")

    def targets(self, batch: Batch, options: StepOptions) -> list[Keys]:
        """Keys of all processes' rows, for each query view."""
        large, small = self.large_keys(batch, options.world), len(batch.views) - 2
        if len(self.queue):
            require_room("queue_size", len(self.queue), large)
        targets = [Keys(rows, 1 / len(large)) for rows in large]
        return targets + [Keys(large[0], 1 / small) for _ in range(small)]

    def update(self, z: Sequence[Tensor], targets: Sequence[Keys]) -> None:
        """Writes the keys of the large queries into the queue."""
        if not len(self.queue):
            return
        keys = torch.cat([target.rows for target in targets[: self.options.large_queries]])
        write(self.queue, self.pointer, keys)
        self.pointer.add_(len(keys)).remainder_(len(self.queue))
