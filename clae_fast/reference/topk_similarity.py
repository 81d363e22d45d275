"""The keys nearest to each anchor: hard negatives, pseudo-labels, neighbors."""

from __future__ import annotations

import torch
from torch import Tensor

from clae_fast.reference._rows import unit_rows


def topk_similarity(
    anchor: Tensor,  # [N, D]
    keys: Tensor,  # [M, D]
    k: int,
    *,
    exclude: Tensor | None = None,  # [N, E]
) -> tuple[Tensor, Tensor]:  # [N, k], [N, k]
    """The k largest cosines of each anchor with the keys, and the indices of those keys.

    The largest come first, NaN before any number and of equal ones the lower index.
    """
    with torch.autocast(anchor.device.type, enabled=False):
        similarity = unit_rows(anchor.detach()) @ unit_rows(keys.detach()).T
        if exclude is not None:
            similarity.scatter_(1, exclude, -torch.inf)
        values, indices = similarity.sort(dim=1, descending=True, stable=True)
        return values[:, :k].contiguous(), indices[:, :k].contiguous()
