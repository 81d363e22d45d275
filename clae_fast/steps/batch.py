"""The batch that one training step gets."""

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """The views of a batch of images, and their classes where a method needs them.

    Attributes:
        views: Two large views [N, 3, H, W], then small crops [N, 3, h, h] if there are any.
        labels: Class numbers [N], int64.
    """

    views: tuple[Tensor, ...]
    labels: Tensor | None = None
