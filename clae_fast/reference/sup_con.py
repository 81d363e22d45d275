"""Supervised contrastive loss: every row of a class is a positive of the others."""

import torch
from torch import Tensor
from torch.nn import functional as F

from clae_fast.reference._rows import unit_rows


def sup_con(
    z: Tensor,  # [n, D]
    labels: Tensor,  # [n]
    *,
    temperature: float = 0.5,
    detach_columns: bool = False,
) -> Tensor:
    """Mean over the rows with a positive of lse over all others - mean of s over the positives.

    The lse is computed as the positives' lse plus the softplus of the margin of the negatives' lse
    over it. So a single positive cancels exactly, and a small loss keeps its digits.
    """
    with torch.autocast(z.device.type, enabled=False):
        u = unit_rows(z)
        s = u @ (u.detach() if detach_columns else u).T / temperature
        same = labels[:, None] == labels[None, :]
        itself = torch.eye(len(u), dtype=torch.bool, device=u.device)
        positives = (same & ~itself).sum(1)
        row = positives > 0
        if not row.any():
            return 0 * s.sum()
        s, same, itself = s[row], same[row], itself[row]
        lse_pos = s.masked_fill(~same | itself, -torch.inf).logsumexp(1)
        mean_pos = s.masked_fill(~same | itself, 0).sum(1) / positives[row]
        spread = torch.where(positives[row] > 1, lse_pos - mean_pos, 0 * lse_pos)
        has_negative = ~same.all(1)
        lse_neg = s.masked_fill(same, -torch.inf)[has_negative].logsumexp(1)
        apart = -F.logsigmoid(lse_pos[has_negative] - lse_neg)
        return (spread.sum() + apart.sum()) / row.sum()
