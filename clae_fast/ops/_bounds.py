"""The bounds of a sign step: its length alpha, its radius eps, and the range from lo to hi."""

from __future__ import annotations

import ctypes
import math
import struct

import torch
from torch import Tensor

from clae_fast import _check

PerChannel = float | list[float] | tuple[float, ...] | Tensor


def check(
    x: Tensor,  # [N, C, ...]
    alpha: PerChannel,
    eps: PerChannel | None,
    lo: PerChannel | None,
    hi: PerChannel | None,
) -> None:
    """Raises unless each is a number or one for each channel, eps not negative, lo not above hi."""
    _check.per_channel("alpha", alpha, x)
    for name, value, minimum in (("eps", eps, 0.0), ("lo", lo, -math.inf), ("hi", hi, -math.inf)):
        if value is not None:
            _check.per_channel(name, value, x, minimum=minimum)
    if isinstance(lo, (int, float)) and isinstance(hi, (int, float)) and lo > hi:
        raise ValueError(f"lo must be at most hi, got {lo} and {hi}")


def pack(
    x: Tensor,  # [N, C, ...]
    alpha: PerChannel,
    eps: PerChannel | None,
    lo: PerChannel | None,
    hi: PerChannel | None,
) -> tuple[list[float], Tensor | None]:
    """The bounds as a list of numbers or, where one of them is a tensor, as a table [4, C].

    The list has alpha, eps, lo and hi one after the other, each as one number or as C of them. It
    is empty where there is a table. The eps of a table is rounded already, that of a list is not.
    """
    bounds = (
        alpha,
        math.inf if eps is None else eps,
        -math.inf if lo is None else lo,
        math.inf if hi is None else hi,
    )
    if any(isinstance(value, Tensor) for value in bounds):
        return [], _table(x, *bounds)
    C = x.shape[1] if any(isinstance(value, (list, tuple)) for value in bounds) else 1
    numbers: list[float] = []
    for value in bounds:
        assert not isinstance(value, Tensor)
        numbers += value if isinstance(value, (list, tuple)) else [value] * C
    return numbers, None


def rounded(bounds: list[float]) -> list[float]:
    """The list of `pack` with eps rounded to fp32 towards 0: its ball is inside the wanted one."""
    C = len(bounds) // 4
    return [*bounds[:C], *map(_fp32_towards_zero, bounds[C : 2 * C]), *bounds[2 * C :]]


def _table(
    x: Tensor, alpha: PerChannel, eps: PerChannel, lo: PerChannel, hi: PerChannel
) -> Tensor:  # [4, C]
    """The bounds of every channel in fp32 beside `x`, eps rounded towards 0."""
    alpha, eps, lo, hi = (_row(value, x) for value in (alpha, eps, lo, hi))
    rounded = eps.float()
    rounded = torch.where(rounded > eps, rounded.nextafter(torch.zeros_like(rounded)), rounded)
    return torch.stack((alpha.float(), rounded, lo.float(), hi.float()))


def _row(value: PerChannel, x: Tensor) -> Tensor:  # [C]
    """One bound for every channel, beside `x`; a plain number is not copied from the CPU."""
    if isinstance(value, Tensor):
        return value.to(x.device)
    if isinstance(value, (list, tuple)):
        return torch.tensor(value, dtype=torch.float64).to(x.device)
    return x.new_full((x.shape[1],), value, dtype=torch.float64)


def _fp32_towards_zero(value: float) -> float:
    """The largest fp32 number that is not above `value` >= 0."""
    nearest = ctypes.c_float(value).value
    if nearest > value:
        (bits,) = struct.unpack("i", struct.pack("f", nearest))
        (nearest,) = struct.unpack("f", struct.pack("i", bits - 1))
    return nearest
