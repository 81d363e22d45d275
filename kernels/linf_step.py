"""The signed-gradient step and its projections in Triton: one pass over memory, one launch."""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Compilations, cdiv, on_device_of

BLOCK = 1024


@triton.jit
def _two_sum(a, b):
    """The rounded sum of a and b and its exact error."""
    total = a + b
    b_part = total - a
    return total, (a - (total - b_part)) + (b - b_part)


@triton.jit
def _neighbor(value, up, down, INT: tl.constexpr):
    """The next number above the value where `up`, the next below where `down`, else the value."""
    bits = value.to(INT, bitcast=True)
    # in the sign-magnitude format of floats, one more is one step away from 0
    step = tl.where(up ^ (bits < 0), 1, -1).to(INT)
    return tl.where(up | down, bits + step, bits).to(value.dtype, bitcast=True)


@triton.jit
def _bound(bound, channel, C: tl.constexpr, TABLE: tl.constexpr):
    """A bound's value at every channel, out of a table in memory or of C numbers."""
    if TABLE:
        value = tl.load(bound + channel)
    else:
        value = bound[0]
        for c in tl.static_range(1, C):
            value = tl.where(channel == c, bound[c], value)
    return value


@triton.jit
def _locate(index, sizes, strides):
    """Where the elements numbered `index` lie in memory, by the digits of these numbers."""
    offset = index % sizes[3] * strides[3]
    index = index // sizes[3]
    offset += index % sizes[2] * strides[2]
    index = index // sizes[2]
    offset += index % sizes[1] * strides[1]
    return offset + index // sizes[1] * strides[0]


@triton.jit
def _linf_step_kernel(
    x_ptr,  # laid out as `layout` says
    grad_ptr,  # likewise
    x0_ptr,  # likewise, or None
    out_ptr,  # [size]
    bounds,  # alpha, eps, lo and hi, each of them C numbers or [C]
    size,
    stride_c,
    layout,  # [4, 4] base and strides of x, grad and x0; None where all lie as out does
    C: tl.constexpr,
    TABLE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Steps and projects the elements of one block of `out`."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offs = start + tl.arange(0, BLOCK)
    mask = offs < size
    if C > 1:
        # 64-bit division once a block, not once an element
        first = (start % (C * stride_c)).to(tl.int32)
        channel = (first + tl.arange(0, BLOCK)) // stride_c % C
    else:
        channel = tl.zeros([BLOCK], tl.int32)
    alpha = _bound(bounds[0], channel, C, TABLE)
    eps = _bound(bounds[1], channel, C, TABLE)
    lo = _bound(bounds[2], channel, C, TABLE)
    hi = _bound(bounds[3], channel, C, TABLE)

    if layout is None:
        offs_x = offs
        offs_grad = offs
        offs_x0 = offs
    else:
        index = offs if WIDE else offs.to(tl.int32)
        offs_x = _locate(index, layout[0], layout[1])
        offs_grad = _locate(index, layout[0], layout[2])
        offs_x0 = _locate(index, layout[0], layout[3])
    x = tl.load(x_ptr + offs_x, mask=mask).to(tl.float32)
    grad = tl.load(grad_ptr + offs_grad, mask=mask).to(tl.float32)
    # two comparisons, so that the sign of NaN is 0
    y = x + tl.where(grad > 0, alpha, tl.where(grad < 0, -alpha, 0.0))
    if x0_ptr is None:
        center = x
    else:
        center = tl.load(x0_ptr + offs_x0, mask=mask).to(tl.float32)
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


def linf_step(
    x: Tensor,  # [N, C, ...]
    grad: Tensor,  # [N, C, ...]
    x0: Tensor | None,  # [N, C, ...]
    out: Tensor,  # [N, C, ...]
    bounds: tuple[tuple[float, ...], ...] | Tensor,  # [4, 1] or [4, C]
    layout: tuple[tuple[int, ...], ...],  # [4, 4]
) -> None:
    """Writes clip(clip(x + alpha sign(grad), x0 - eps, x0 + eps), lo, hi), rounded towards x0.

    There is one launch for all layouts; its loads are wide where all tensors lie as `out` does.

    Args:
        x: Where the step starts, fp32, fp16 or bf16.
        grad: The gradient, of x's shape, in any of these dtypes.
        x0: Center of the ball, of x's shape, in any of these dtypes; None stands for x.
        out: Where the result goes, of x's shape and dtype, dense in some order of its dimensions.
        bounds: alpha, eps, lo and hi in fp32, each one number, or one for every channel along
            dimension 1: as numbers, or as an fp32 tensor on x's device. eps and hi may be inf and
            lo -inf.
        layout: For element i of `out` in memory, written in a mixed base with the last digit
            fastest: the base, and what each digit is multiplied by in x, grad and x0.
    """
    C = len(bounds[0])
    sizes, *strides = layout
    packed = sizes[-1] == out.numel() and all(stride[-1] == 1 for stride in strides)
    reach = max(_reach(sizes, stride) for stride in strides)
    with on_device_of(x):
        _linf_step_kernel[(cdiv(x.numel(), BLOCK),)](
            x,
            grad,
            x0,
            out,
            tuple(bounds),
            x.numel(),
            out.stride(1) if C > 1 else 1,
            None if packed else layout,
            C=C,
            TABLE=isinstance(bounds, Tensor),
            WIDE=reach >= 2**31 - BLOCK,
            BLOCK=BLOCK,
        )


def _reach(sizes: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """The largest offset, that of the last element."""
    return sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))


def compilations() -> Compilations:
    """Calls that compile the kernel for every form of its arguments."""
    packed = ((1, 1, 1, 64 * 3 * 1024), *(3 * [(0, 0, 0, 1)]))
    # out and x are contiguous, and the others are channels_last
    apart = ((1, 64, 3, 1024), (0, 3072, 1024, 1), *(2 * [(0, 3072, 1, 3)]))
    one, three = ((0.1,),) * 4, ((0.1, 0.2, 0.3),) * 4
    table = torch.empty(4, 3, device="meta")
    for dtype in (torch.float16, torch.float32):
        x = torch.empty(64, 3, 32, 32, dtype=dtype, device="meta")
        for case, x0, bounds, layout in (
            ("", None, one, packed),
            (" per channel, x0", x, three, packed),
            (" table", None, table, packed),
            (" channels_last", x, three, apart),
        ):
            name = str(dtype).removeprefix("torch.")
            yield f"{name}{case}", partial(linf_step, x, x, x0, x, bounds, layout)
