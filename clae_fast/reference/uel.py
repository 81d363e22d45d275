"""The instance softmax with a spreading term of unsupervised embedding learning."""

import torch
from torch import Tensor
from torch.nn import functional as F

from clae_fast.reference._rows import unit_rows


def uel(
    z0: Tensor,  # [N, D]
    z1: Tensor,  # [N, D]
    *,
    temperature: float = 0.1,
) -> Tensor:
    """Mean over the 2N rows i of -log p_i,pos - sum over the negatives j of log(1 - p_ij).

    p_i is the softmax over all j != i, and the columns are detached, as in the released code. The
    sum of log(1 - p) is over the negatives only. Only the most similar of them can have p near 1,
    where 1 - p cancels; its 1 - p is computed from the sum over the other columns.
    """
    with torch.autocast(z0.device.type, enabled=False):
        u0, u1 = unit_rows(z0), unit_rows(z1)
        positive = torch.cat([(u0 * u1.detach()).sum(1), (u1 * u0.detach()).sum(1)]) / temperature
        if len(u0) == 1:  # no negatives
            return 0 * positive.sum()
        u = torch.cat([u0, u1])
        not_negative = torch.eye(len(u0), dtype=torch.bool, device=u.device).repeat(2, 2)
        negatives = (u @ u.detach().T / temperature).masked_fill(not_negative, -torch.inf)
        lse_neg = negatives.logsumexp(1)
        top, index = negatives.max(1)
        others = negatives.scatter(1, index[:, None], -torch.inf)
        lse_rest = torch.logaddexp(others.logsumexp(1), positive)
        p_others = (others - torch.logaddexp(lse_rest, top)[:, None]).exp()
        spread = torch.log1p(-p_others).sum(1) + F.logsigmoid(lse_rest - top)
        return (-F.logsigmoid(positive - lse_neg) - spread).mean()
