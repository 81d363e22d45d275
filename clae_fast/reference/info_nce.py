"""InfoNCE of anchors against keys: the loss of CLAE's "Plain" variant."""

import torch
from torch import Tensor
from torch.nn import functional as F

from clae_fast.reference._rows import unit_rows


def info_nce(
    anchor: Tensor,  # [N, D]
    keys: Tensor,  # [M, D]
    *,
    temperature: float = 0.1,
    symmetric: bool = False,
) -> Tensor:
    """Mean over the rows i of -log(exp(s_ii) / sum over all keys j of exp(s_ij)).

    With `symmetric` the mean of this and of the same with anchors and keys exchanged.
    """
    if symmetric:
        there = info_nce(anchor, keys, temperature=temperature)
        return (there + info_nce(keys, anchor, temperature=temperature)) / 2
    with torch.autocast(anchor.device.type, enabled=False):
        u, v = unit_rows(anchor), unit_rows(keys)
        positive = (u * v[: len(u)]).sum(1) / temperature  # [N]
        if len(v) == 1:  # no negatives
            return 0 * positive.sum()
        is_positive = torch.eye(len(u), len(v), dtype=torch.bool, device=u.device)
        lse_neg = (u @ v.T / temperature).masked_fill(is_positive, -torch.inf).logsumexp(1)
        return -F.logsigmoid(positive - lse_neg).mean()
