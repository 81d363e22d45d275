"""Hard-negative supervised contrastive loss."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from clae_fast.reference._rows import unit_rows


def h_scl(
    z: Tensor,  # [n, D]
    labels: Tensor,  # [n]
    *,
    temperature: float = 0.5,
    beta: float = 1.0,
    detach_weights: bool = False,
) -> Tensor:
    """Mean over the pairs i, j of one class of softplus(log((n - 2) mu_i) - s_ij).

    mu_i is the mean of exp(s_ik) over the rows k of other classes, weighted by exp(beta s_ik).
    """
    with torch.autocast(z.device.type, enabled=False):
        u = unit_rows(z)
        s = u @ u.T / temperature
        same = labels[:, None] == labels[None, :]
        pair = same & ~torch.eye(len(u), dtype=torch.bool, device=u.device)
        row = pair.any(1) & ~same.all(1)
        if not row.any() or len(u) < 3:
            return 0 * s.sum()
        negatives = s[row].masked_fill(same[row], -torch.inf)
        weights = beta * negatives if beta else negatives.masked_fill(~same[row], 0)
        if detach_weights:
            weights = weights.detach()
        log_mean = (weights + negatives).logsumexp(1) - weights.logsumexp(1)
        margin = (log_mean + math.log(len(u) - 2))[:, None] - s[row]
        return -F.logsigmoid(-margin)[pair[row]].sum() / pair.sum()
