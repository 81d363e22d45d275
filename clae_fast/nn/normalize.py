"""Normalization as the encoder's first layer, so that views and attacks are in pixels of 0..1."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Normalize(nn.Module):
    """(x - mean) / std per channel.

    Args:
        mean: One number per channel.
        std: One positive number per channel.
    """

    mean: Tensor  # [C, 1, 1]
    std: Tensor  # [C, 1, 1]

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        # they come from the configuration and are not learned, so checkpoints do not hold them
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Normalizes a batch, [N, C, H, W]."""
        return (x - self.mean) / self.std
