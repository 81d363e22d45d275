"""One signed-gradient step, projected to a ball in the maximum norm and to a range."""

import torch
from torch import Tensor

PerChannel = float | list[float] | tuple[float, ...] | Tensor


def linf_step(
    x: Tensor,  # [N, C, ...] or any shape for scalar bounds
    grad: Tensor,  # as x
    *,
    alpha: PerChannel,
    x0: Tensor | None = None,  # as x
    eps: PerChannel | None = None,
    lo: PerChannel | None = None,
    hi: PerChannel | None = None,
) -> Tensor:
    """clip(clip(x + alpha sign(grad), x0 - eps, x0 + eps), lo, hi), rounded towards x0.

    The arithmetic is fp32, fp64 for fp64, with eps rounded towards 0, and so are the ball's bounds
    and the result: |result - x0| <= eps holds exactly wherever x0 lies in [lo, hi].
    """
    x, grad, x0 = x.detach(), grad.detach(), (x if x0 is None else x0).detach()
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    y, center = x.to(dtype), x0.to(dtype)
    alpha = _per_channel(alpha, x).to(dtype)
    zero = torch.zeros((), dtype=dtype, device=x.device)
    y = y + torch.where(grad > 0, alpha, torch.where(grad < 0, -alpha, zero))  # sign(NaN) is 0
    y = torch.where(center.isnan(), center, y)
    if eps is not None:
        exact_eps = _per_channel(eps, x)
        eps = exact_eps.to(dtype)
        eps = torch.where(eps > exact_eps, eps.nextafter(zero), eps)
        low, error = _two_sum(center, -eps)
        low = torch.where(error > 0, low.nextafter(center), low)
        high, error = _two_sum(center, eps)
        high = torch.where(error < 0, high.nextafter(center), high)
        y = torch.where(y < low, low, y)
        y = torch.where(y > high, high, y)
    if lo is not None:
        lo = _per_channel(lo, x).to(dtype)
        y = torch.where(y < lo, lo, y)
    if hi is not None:
        hi = _per_channel(hi, x).to(dtype)
        y = torch.where(y > hi, hi, y)
    return _round_towards(y, center, x.dtype)


def _per_channel(value: PerChannel, x: Tensor) -> Tensor:
    """`value` as a scalar, or shaped to go along dimension 1 of `x`."""
    if not isinstance(value, Tensor):
        value = torch.tensor(value, dtype=torch.float64)
    value = value.detach().to(x.device)
    return value.reshape(-1, *[1] * (x.ndim - 2)) if value.ndim else value


def _two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The rounded sum of `a` and `b` and its exact error, a + b = sum + error."""
    total = a + b
    b_part = total - a
    return total, (a - (total - b_part)) + (b - b_part)


def _round_towards(y: Tensor, center: Tensor, dtype: torch.dtype) -> Tensor:
    """`y` in `dtype`, rounded towards `center`, which `dtype` can represent."""
    rounded = y.to(dtype)
    if rounded.dtype == y.dtype:
        return rounded
    up = (y < center) & (rounded < y)
    down = (y > center) & (rounded > y)
    bits = rounded.view(torch.int16)
    # floats are sign and magnitude, so that adding one to the bits steps away from 0
    step = torch.where(up ^ (bits < 0), 1, -1).to(torch.int16)
    return torch.where(up | down, bits + step, bits).view(dtype)
