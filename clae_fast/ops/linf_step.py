"""One signed-gradient step, projected to a ball in the maximum norm and to a range."""

from __future__ import annotations

import ctypes
import math
import struct

import torch
from torch import Tensor

from clae_fast import _check, _impl, _native
from clae_fast.reference.linf_step import linf_step as reference

PerChannel = float | list[float] | tuple[float, ...] | Tensor

# per_channel is [4, C]: alpha, eps, lo, hi; where it is given, the four scalars are not read
torch.library.define(
    "clae_fast::linf_step",
    "(Tensor x, Tensor grad, Tensor? x0, Tensor? per_channel,"
    " float alpha, float eps, float lo, float hi, str impl) -> Tensor",
)


@torch.library.impl("clae_fast::linf_step", ("cpu", "cuda"))
def _linf_step_impl(
    x: Tensor,  # [N, C, ...]
    grad: Tensor,  # as x
    x0: Tensor | None,  # as x
    per_channel: Tensor | None,  # [4, C]
    alpha: float,
    eps: float,
    lo: float,
    hi: float,
    impl: str,
) -> Tensor:
    bounds = (alpha, _fp32_towards_zero(eps), lo, hi) if per_channel is None else per_channel
    if impl != "triton":
        return _native.linf_step(x, grad, x0, bounds)
    from clae_fast.kernels.linf_step import linf_step

    return linf_step(x, grad, x0, *bounds)


@torch.library.register_fake("clae_fast::linf_step")
def _linf_step_fake(
    x: Tensor,
    grad: Tensor,
    x0: Tensor | None,
    per_channel: Tensor | None,
    alpha: float,
    eps: float,
    lo: float,
    hi: float,
    impl: str,
) -> Tensor:
    return torch.empty_like(x)


_linf_step = torch.ops.clae_fast.linf_step.default


def linf_step(
    x: Tensor,  # [N, C, ...], or any shape where the bounds are scalars
    grad: Tensor,  # as x
    *,
    alpha: PerChannel,
    x0: Tensor | None = None,  # as x
    eps: PerChannel | None = None,
    lo: PerChannel | None = None,
    hi: PerChannel | None = None,
    impl: str = "auto",
) -> Tensor:
    r"""One step of a signed-gradient attack, projected, in one pass over memory.

    .. math:: \mathrm{clip}(\mathrm{clip}(x + \alpha\, \mathrm{sign}(g), x_0 - \epsilon,
        x_0 + \epsilon), lo, hi)

    The sign of NaN is 0 and that of ±inf is ±1; NaN in `x` or `x0` stays NaN. The arithmetic is
    fp32 (fp64 for fp64), with eps rounded towards 0, and the ball's bounds and the result are
    rounded towards `x0`: |result - x0| <= eps holds exactly wherever `x0` lies in [lo, hi].

    Args:
        x: The images to step from, [N, C, ...], fp32, fp16, bf16 or fp64, in any memory layout.
        grad: The gradient by `x`, of its shape and of any of these dtypes.
        alpha: Step size, in the units of `x`. As each of the following, a number, or C of them for
            the channels in dimension 1, as a sequence or a tensor.
        x0: The centre of the ball, of the shape and dtype of `x`; None is `x` itself.
        eps: Radius of the ball; None is no ball.
        lo: Lower end of the range; None is none.
        hi: Upper end of the range; None is none.
        impl: "auto", "reference", "native", "triton" or "cuda".

    Returns:
        The images after the step, in the dtype and layout of `x`; a constant for autograd.

    Raises:
        TypeError: An argument of the wrong type, or an `x0` of another dtype than `x`.
        ValueError: Shapes or devices that differ, bounds of another length than C, a bound that is
            NaN, a negative eps, or lo above hi. Values inside a tensor are not looked at: on a GPU
            that would wait for them.
        RuntimeError: `impl` names an implementation that cannot run here.

    Example:
        >>> x, grad = torch.rand(8, 3, 32, 32), torch.randn(8, 3, 32, 32)
        >>> x_adv = clae_fast.linf_step(x, grad, alpha=8 / 255, eps=8 / 255, lo=0.0, hi=1.0)

    Source: Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks, ICLR 2018.
    """
    _check.tensor("x", x)
    _check.like("grad", grad, "x", x, dtype=False)
    if x0 is not None:
        _check.like("x0", x0, "x", x)
    _check.per_channel("alpha", alpha, x)
    for name, value, minimum in (("eps", eps, 0.0), ("lo", lo, -math.inf), ("hi", hi, -math.inf)):
        if value is not None:
            _check.per_channel(name, value, x, minimum=minimum)
    if isinstance(lo, (int, float)) and isinstance(hi, (int, float)) and lo > hi:
        raise ValueError(f"lo must be at most hi, got {lo} and {hi}")
    x, grad, x0 = x.detach(), grad.detach(), None if x0 is None else x0.detach()
    impl = _impl.resolve("linf_step", impl, x, grad)
    if impl == "reference":
        return reference(x, grad, alpha=alpha, x0=x0, eps=eps, lo=lo, hi=hi)
    eps = math.inf if eps is None else eps
    lo = -math.inf if lo is None else lo
    hi = math.inf if hi is None else hi
    if any(isinstance(value, (list, tuple, Tensor)) for value in (alpha, eps, lo, hi)):
        table = _table(x, alpha, eps, lo, hi)
        return _linf_step(x, grad, x0, table, 0.0, 0.0, 0.0, 0.0, impl)
    return _linf_step(x, grad, x0, None, alpha, eps, lo, hi, impl)


def _table(
    x: Tensor, alpha: PerChannel, eps: PerChannel, lo: PerChannel, hi: PerChannel
) -> Tensor:  # [4, C]
    """The bounds of every channel in fp32 beside `x`, eps rounded towards 0."""
    bounds = (alpha, eps, lo, hi)
    # on the CPU where that leaves a single copy to the GPU
    device = x.device if any(isinstance(value, Tensor) for value in bounds) else "cpu"
    alpha, eps, lo, hi = (
        value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
        for value in bounds
    )
    rounded = eps.float()
    if eps.dtype == torch.float64:
        rounded = torch.where(rounded > eps, rounded.nextafter(torch.zeros_like(rounded)), rounded)
    rows = [row.to(device, torch.float32).expand(x.shape[1]) for row in (alpha, rounded, lo, hi)]
    return torch.stack(rows).to(x.device)


def _fp32_towards_zero(value: float) -> float:
    """The largest fp32 number that is not above `value` >= 0."""
    rounded = ctypes.c_float(value).value
    if rounded > value:
        (bits,) = struct.unpack("i", struct.pack("f", rounded))
        (rounded,) = struct.unpack("f", struct.pack("i", bits - 1))
    return rounded
