"""What the benchmarks of training steps train on what."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Setting:
    """A network and its batches.

    Attributes:
        arch: The network's name.
        batch_size: How many images a batch has.
        image_size: The side of a view.
        device: Where it trains.
    """

    arch: str
    batch_size: int
    image_size: int
    device: torch.device

    def __str__(self) -> str:
        return f"{self.arch}, {self.batch_size} of {self.image_size}x{self.image_size}"

    def facts(self) -> dict[str, str | int]:
        """What a result file says of it."""
        return {**asdict(self), "device": str(self.device)}

    def views(self, dtype: torch.dtype, layout: torch.memory_format) -> list[Tensor]:
        """Two views of a batch in [0, 1]."""
        shape = (self.batch_size, 3, self.image_size, self.image_size)
        return [
            torch.rand(shape, device=self.device).to(dtype, memory_format=layout) for _ in range(2)
        ]
