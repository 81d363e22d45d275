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
    positive: Tensor | None = None,  # [N]
    reduction: str = "mean",
    symmetric: bool = False,
) -> Tensor:
    """The loss of row i is -log(exp(s_ip) / sum over all keys j of exp(s_ij)), p = positive_i or i.

    With `symmetric` it is the mean of this and of the same with anchors and keys exchanged. Returns
    the mean over the rows, or [N] where `reduction` is "none".
    """
    if symmetric:
        there, back = (
            info_nce(*operands, temperature=temperature, reduction=reduction)
            for operands in ((anchor, keys), (keys, anchor))
        )
        return (there + back) / 2
    with torch.autocast(anchor.device.type, enabled=False):
        u, v = unit_rows(anchor), unit_rows(keys)
        if positive is None:
            positive = torch.arange(len(u), device=u.device)
        s_positive = (u * v[positive]).sum(1) / temperature  # [N]
        if len(v) == 1:  # no negatives
            loss = 0 * s_positive
        else:
            is_positive = positive[:, None] == torch.arange(len(v), device=u.device)
            lse_neg = (u @ v.T / temperature).masked_fill(is_positive, -torch.inf).logsumexp(1)
            loss = -F.logsigmoid(s_positive - lse_neg)
        return loss.mean() if reduction == "mean" else loss
