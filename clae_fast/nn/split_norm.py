"""BatchNorm by parts of a batch, which does on one device what MoCo's shuffling does on several.

Where a query and its key are normalized by the statistics of the same rows, these statistics give
away which key belongs to which query, and the loss falls although nothing is learned. MoCo spreads
a batch over GPUs, each with statistics of its own, and shuffles keys between the GPUs. One device
can do the same with parts of its batch. Several processes with synchronized BatchNorm
(`clae_fast.nn.sync_norm`) need neither: all queries share the same statistics, which then cannot
tell them apart.

Source: He et al., Momentum Contrast for Unsupervised Visual Representation Learning, CVPR 2020,
section 3.3.
"""

import torch
from torch import Tensor, nn

from clae_fast.nn.grouped_norm import grouped_norm


def dealt(
    encoder: nn.Module,
    x: Tensor,  # [N, C, ...]
    parts: int,
) -> Tensor:
    """Encodes keys, with BatchNorm by parts that rows are dealt out to in turn, like cards.

    Queries under `grouped_norm(encoder, parts, split=True)` are normalized with their neighbors.
    Dealing out puts neighbors into different parts, as evenly as can be, where a random order would
    do so only on average. Projections come back in the order of the rows.

    Args:
        encoder: The encoder of keys.
        x: Views in random order; their number is a multiple of `parts`.
        parts: How many parts the batch has; with 1 it is encoded as a whole.

    Returns:
        Projections, [N, D].
    """
    if parts == 1:
        z: Tensor = encoder(x)
        return z
    order = torch.arange(len(x), device=x.device).view(parts, -1).T.flatten()
    with grouped_norm(encoder, parts, split=True):
        z = encoder(x[order])
    return torch.empty_like(z).index_copy_(0, order, z)
