"""NT-Xent with hard and debiased negatives, the losses of DCL and HCL."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from clae_fast.reference._rows import unit_rows


def hard_nt_xent(
    z0: Tensor,  # [N, D]
    z1: Tensor,  # [N, D]
    *,
    temperature: float = 0.5,
    beta: float = 1.0,
    tau_plus: float = 0.1,
    detach_weights: bool = False,
    extra: Tensor | None = None,  # [2N, k]
) -> Tensor:
    """Mean over the 2N rows of softplus(log Ng - s_pos), with Ng of the n negatives' logits s_j.

    With weights w_j = exp(beta s_j), their mean M = sum of w_j exp(s_j) / sum of w_j, P = tau_plus
    and T the temperature,

        Ng = n max((M - P exp(s_pos)) / (1 - P), exp(-1 / T)).

    Everything is kept in logarithms relative to the positive: neither value nor gradient cancels
    for beta = P = 0, however small the loss, and there M is never below exp(-1 / T).
    """
    with torch.autocast(z0.device.type, enabled=False):
        u0, u1 = unit_rows(z0), unit_rows(z1)
        positive = (u0 * u1).sum(1).repeat(2) / temperature  # [2N]
        n = 2 * len(u0) - 2 + (0 if extra is None else extra.shape[1])
        if n == 0:
            return 0 * positive.sum()
        u = torch.cat([u0, u1])
        not_negative = torch.eye(len(u0), dtype=torch.bool, device=u.device).repeat(2, 2)
        s = (u @ u.T / temperature).masked_fill(not_negative, -torch.inf)
        if extra is not None:
            s = torch.cat([s, extra.to(s.dtype)], 1)
        if beta == 0:
            log_sum = s.logsumexp(1)  # of the negatives' n times the mean
        else:
            log_weights = (beta * s).detach() if detach_weights else beta * s
            log_sum = (log_weights + s).logsumexp(1) - log_weights.logsumexp(1) + math.log(n)
        margin = log_sum - positive
        if tau_plus > 0:
            false_share = math.log(tau_plus * n) - margin
            exhausted = false_share >= 0
            kept = torch.log1p(-false_share.masked_fill(exhausted, -1.0).exp())
            debiased = margin + kept - math.log1p(-tau_plus)
            floor = math.log(n) - 1 / temperature - positive
            margin = torch.where(exhausted | (debiased <= floor), floor, debiased)
        return -F.logsigmoid(-margin).mean()
