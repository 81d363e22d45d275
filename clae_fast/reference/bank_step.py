"""A step of AdCo's or CaCo's bank of learnable keys."""

import torch
from torch import Tensor
from torch.nn import functional as F

from clae_fast.reference._rows import unit_rows


@torch.no_grad()
def bank_step(
    bank: Tensor,  # [K, D]
    velocity: Tensor,  # [K, D]
    anchor: Tensor,  # [N, D]
    *,
    lr: float | Tensor,
    keys: Tensor | None = None,  # [N, D]
    positive: Tensor | None = None,  # [N]
    weight: Tensor | None = None,  # [N]
    views: int = 1,
    temperature: float = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
) -> None:
    """V = momentum V + G + weight_decay W and W = W - lr V, in place.

    G is the gradient by W of the anchors' cross-entropy over the bank, whose unit rows are w_k =
    W_k / |W_k|, with its sign flipped at every similarity that is no positive. The gradient by s_ik
    is p_ik - 1 at a positive and p_ik elsewhere, over N and T, and -(1 - p_ik) and -p_ik after the
    flip. The gradient by w_k is the sum of these over i, times u_i. The gradient by W_k is the part
    of that which is orthogonal to w_k, over |W_k|.

    The positive of row i is bank entry positive_i. Or it is key i, and the other keys of the row's
    view are negatives beside the bank.
    """
    with torch.autocast(anchor.device.type, enabled=False):
        u, w = (unit_rows(z).to(bank.dtype) for z in (anchor, bank))
        s = u @ w.T / temperature
        is_positive = torch.zeros_like(s, dtype=torch.bool)
        negatives = s
        if keys is None:
            assert positive is not None
            is_positive = positive[:, None] == torch.arange(len(bank), device=bank.device)
            negatives = s.masked_fill(is_positive, -torch.inf)
            v = w[positive]
        else:
            v = unit_rows(keys).to(bank.dtype)
            view = torch.arange(len(u), device=u.device) // (len(u) // views)
            no_negative = (view[:, None] != view).fill_diagonal_(True)
            others = (u @ v.T / temperature).masked_fill(no_negative, -torch.inf)
            negatives = torch.cat([others, s], 1)
        # log(neg / pos), from which 1 - p of a positive follows without cancellation
        margin = negatives.logsumexp(1) - (u * v).sum(1) / temperature  # [N]
        log_denominator = (u * v).sum(1) / temperature - F.logsigmoid(-margin)
        p = (s - log_denominator[:, None]).exp()
        p = torch.where(is_positive, margin.sigmoid()[:, None], p)
        p = p / len(u) if weight is None else p * weight[:, None]
        r = p.T @ u
        norm = torch.linalg.vector_norm(bank, dim=1, keepdim=True)
        # rows below 1e-12 are scaled but not normalized, and keep their radial part
        radial = (r * w).sum(1, keepdim=True).masked_fill(norm < 1e-12, 0)
        gradient = -(r - radial * w) / (norm.clamp_min(1e-12) * temperature)
    velocity.mul_(momentum).add_(gradient).add_(bank, alpha=weight_decay)
    bank.sub_(lr * velocity)
