"""NT-Xent, the loss of SimCLR."""

import torch
from torch import Tensor
from torch.nn import functional as F

from clae_fast.reference._rows import unit_rows


def nt_xent(
    z0: Tensor,  # [N, D]
    z1: Tensor,  # [N, D]
    *,
    temperature: float = 0.5,
) -> Tensor:
    """Mean over the 2N rows i of -log(exp(s_i,pos) / sum over j != i of exp(s_ij)).

    Written as softplus(lse_neg - s_pos) with lse_neg over the negatives alone, neither value nor
    gradient cancels, however small the loss.
    """
    with torch.autocast(z0.device.type, enabled=False):
        u0, u1 = unit_rows(z0), unit_rows(z1)
        positive = (u0 * u1).sum(1).repeat(2) / temperature  # [2N]
        if len(u0) == 1:  # no negatives
            return 0 * positive.sum()
        u = torch.cat([u0, u1])
        not_negative = torch.eye(len(u0), dtype=torch.bool, device=u.device).repeat(2, 2)
        lse_neg = (u @ u.T / temperature).masked_fill(not_negative, -torch.inf).logsumexp(1)
        return -F.logsigmoid(positive - lse_neg).mean()
