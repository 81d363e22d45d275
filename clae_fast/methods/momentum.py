"""Methods whose targets are keys: projections by a momentum encoder."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clae_fast.distributed import World
from clae_fast.methods.options import Fraction, Temperature
from clae_fast.methods.query import QueryMethod
from clae_fast.nn.momentum import follow, momentum_twin
from clae_fast.steps.batch import Batch


class MomentumMethod(QueryMethod):
    """A method of queries and keys, with an encoder each, of which the key encoder follows slowly.

    View p is the query and view q the key; where both large views are queries, each finds its key
    in the other. Small crops are further queries. The encoder has to have `dim`, the length of its
    projections.

    Attributes:
        key_encoder: The encoder of keys, which starts as a copy of the encoder.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options(QueryMethod.Options):
        """Settings of a method with a momentum encoder.

        Attributes:
            key_momentum: What the key encoder keeps of its weights in a step; the rest is the
                encoder's.
        """

        temperature: Temperature = 0.2
        key_momentum: Fraction = 0.99

    small_crops = True

    options: Options
    key_momentum: Tensor

    def __init__(self, encoder: nn.Module, *, adversarial: bool = False, **options: Any) -> None:
        super().__init__(encoder, adversarial=adversarial, **options)
        dim = getattr(encoder, "dim", None)
        if not isinstance(dim, int):
            raise TypeError("encoder must have dim, the length of its projections")
        self.dim = dim
        self.key_encoder = momentum_twin(encoder)
        momentum = next(encoder.parameters()).new_tensor(self.options.key_momentum)
        # a setting of the run, not its state
        self.register_buffer("key_momentum", momentum, persistent=False)

    def add_rows(self, name: str, count: int) -> Tensor:
        """Registers a buffer of random unit rows, [count, dim], and returns it."""
        like = self.key_momentum
        # drawn on the CPU, so that every kind of device has the same numbers
        rows = F.normalize(torch.randn(count, self.dim).to(like.device, like.dtype))
        self.register_buffer(name, rows)
        return rows

    def add_counter(self, name: str) -> None:
        """Registers a whole number on the device, 0 at first."""
        zero = torch.zeros((), dtype=torch.int64, device=self.key_momentum.device)
        self.register_buffer(name, zero)

    def keys(self, x: Tensor, world: World) -> Tensor:
        """Unit keys of a view, of all processes' rows."""
        return self.unit(world.all_gather(self.key_encoder(x)))

    def unit(self, z: Tensor) -> Tensor:
        """Rows of unit length, in the precision of the key encoder's weights."""
        return F.normalize(z.to(self.key_momentum.dtype))

    def large_keys(self, batch: Batch, world: World) -> list[Tensor]:
        """The keys of the large queries, which are those of the other view."""
        x_p, x_q = batch.views[:2]
        return [self.keys(x, world) for x in (x_q, x_p)[: self.options.large_queries]]

    def after_step(self) -> None:
        """Moves the key encoder towards the encoder."""
        follow(self.key_encoder, self.encoder, self.key_momentum)


def require_room(name: str, rows: int, keys: Sequence[Tensor]) -> None:
    """Raises ValueError where a step has more keys than the setting `name` leaves rows for."""
    count = sum(map(len, keys))
    if rows < count:
        raise ValueError(f"{name} must be at least {count}, the keys of a step, got {rows}")


def write(ring: Tensor, start: Tensor, rows: Tensor) -> None:
    """Overwrites rows of a buffer from `start` on, and goes on at its beginning after its end."""
    places = torch.arange(len(rows), device=rows.device)
    ring.index_copy_(0, (start + places) % len(ring), rows)
