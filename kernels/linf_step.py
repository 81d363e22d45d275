"""The signed-gradient step and its projections in Triton: one pass over memory, one launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import on_device_of

BLOCK = 1024


@triton.jit
def _two_sum(a, b):
    """The rounded sum of a and b and its exact error."""
    total = a + b
    b_part = total - a
    return total, (a - (total - b_part)) + (b - b_part)


@triton.jit
def _neighbor(value, up, down, INT: tl.constexpr):
    """The next number above where `up`, the one below where `down`, else the value."""
    bits = value.to(INT, bitcast=True)
    # in the sign-magnitude format of floats, one more is one step away from 0
    step = tl.where(up ^ (bits < 0), 1, -1).to(INT)
    return tl.where(up | down, bits + step, bits).to(value.dtype, bitcast=True)


@triton.jit
def _linf_step_kernel(
    x_ptr,  # [size]
    grad_ptr,  # [size]
    x0_ptr,  # [size] or None
    out_ptr,  # [size]
    alpha,  # a number or [C], and so the next three
    eps,
    lo,
    hi,
    size,
    stride_c,
    C,
    PER_CHANNEL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offs = start + tl.arange(0, BLOCK)
    mask = offs < size
    if PER_CHANNEL:
        # 64-bit division once a block, not once an element
        first = (start % (C * stride_c)).to(tl.int32)
        channel = (first + tl.arange(0, BLOCK)) // stride_c % C
        alpha = tl.load(alpha + channel)
        eps = tl.load(eps + channel)
        lo = tl.load(lo + channel)
        hi = tl.load(hi + channel)

    x = tl.load(x_ptr + offs, mask=mask).to(tl.float32)
    grad = tl.load(grad_ptr + offs, mask=mask).to(tl.float32)
    # two comparisons, so that the sign of NaN is 0
    y = x + tl.where(grad > 0, alpha, tl.where(grad < 0, -alpha, 0.0))
    if x0_ptr is None:
        center = x
    else:
        center = tl.load(x0_ptr + offs, mask=mask).to(tl.float32)
        y = tl.where(center != center, center, y)
    # an infinite eps has an error of NaN, which is neither above nor below 0
    low, error = _two_sum(center, -eps)
    low = _neighbor(low, error > 0, False, tl.int32)
    high, error = _two_sum(center, eps)
    high = _neighbor(high, False, error < 0, tl.int32)
    y = tl.where(y < low, low, y)
    y = tl.where(y > high, high, y)
    y = tl.where(y < lo, lo, y)
    y = tl.where(y > hi, hi, y)

    out = y.to(out_ptr.dtype.element_ty)
    if out.dtype != tl.float32:
        rounded = out.to(tl.float32)
        up = (y < center) & (rounded < y)
        down = (y > center) & (rounded > y)
        out = _neighbor(out, up, down, tl.int16)
    tl.store(out_ptr + offs, out, mask=mask)


def _laid_out_as(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor` in the memory order of `like`, itself if it has it."""
    pairs = zip(tensor.shape, tensor.stride(), like.stride(), strict=True)
    if all(size == 1 or stride == wanted for size, stride, wanted in pairs):
        return tensor
    return torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)


def linf_step(
    x: Tensor,  # [N, C, ...]
    grad: Tensor,  # [N, C, ...]
    x0: Tensor | None,  # [N, C, ...]
    alpha: float | Tensor,  # [C]
    eps: float | Tensor,  # [C]
    lo: float | Tensor,  # [C]
    hi: float | Tensor,  # [C]
) -> Tensor:
    """clip(clip(x + alpha sign(grad), x0 - eps, x0 + eps), lo, hi), rounded towards x0.

    One launch where x is dense, in whatever order of its dimensions, and grad and x0 lie in memory
    as x does; one copy more for each tensor that does not.

    Args:
        x: Where the step starts, fp32, fp16 or bf16.
        grad: The gradient, of x's shape, in any of these dtypes.
        x0: Center of the ball, of x's shape, in any of these dtypes; None stands for x.
        alpha: Step size, finite. The four are all numbers, or all fp32 tensors [C] that go along
            dimension 1.
        eps: Radius of the ball, representable in fp32; inf for no ball.
        lo: Lower bound of the result; -inf for none.
        hi: Upper bound of the result; inf for none.

    Returns:
        The stepped x, in x's shape, dtype and memory order.
    """
    out = torch.empty_like(x)
    x, grad = _laid_out_as(x, out), _laid_out_as(grad, out)
    x0 = None if x0 is None else _laid_out_as(x0, out)
    C = x.shape[1] if x.ndim > 1 else 1
    stride_c = out.stride(1) if C > 1 else 1
    with on_device_of(x):
        _linf_step_kernel[(triton.cdiv(x.numel(), BLOCK),)](
            x,
            grad,
            x0,
            out,
            alpha,
            eps,
            lo,
            hi,
            x.numel(),
            stride_c,
            C,
            PER_CHANNEL=isinstance(alpha, Tensor),
            BLOCK=BLOCK,
        )
    return out
