"""BatchNorm by parts of a batch on one device, as a batch spread over several has it.

Where a query and its key are normalised by statistics of one batch, these give away which key is
whose, and the loss falls without anything being learnt. MoCo spreads a batch over GPUs, each with
statistics of its own, and shuffles keys between them. One device does the same with parts of its
batch. Several processes that synchronise BatchNorm, see `clae_fast.nn.sync_norm`, need neither: all
queries have the same statistics then, which tell none of them apart.

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
    """Encodes a batch whose BatchNorm statistics are those of rows dealt out to `parts` parts.

    Row i goes to the part that the queries' rows in `grouped_norm(encoder, parts, split=True)` do
    not share: of the rows that are neighbours there, each part here gets its share, where a random
    order would give it now more, now less. Projections come back in the order of the rows.

    Args:
        encoder: The encoder of keys.
        x: Views, as many as a multiple of `parts`; batches are in random order.
        parts: PassRunner of the batch; 1 leaves it whole.

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
