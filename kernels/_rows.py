"""What the kernels on rows share: scaled rows in fp16, similarities, positives, the loss's mean.

The rows of one operand, or of two, stand below one another in one matrix: x above y. A row z is
kept as 2 ** k z in fp16, with a norm in [2 ** 13, 2 ** 14), beside the fp32 factor that makes it a
unit row. That scaling is exact: fp16 and bf16 input enters the similarities without any rounding,
and fp32 input is rounded to fp16's 11 bits, once. In the exact mode the rest of an fp32 row is kept
in a second fp16 matrix, and three of the four products are summed: 22 bits, close to fp32's 24.

Logits are kept in base 2, where the exponential is one instruction: s2 = s log2(e).
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import padded

# F.normalize's: a shorter row is divided by this instead of by its norm
EPS = tl.constexpr(1e-12)
LN2 = tl.constexpr(math.log(2.0))
# norms of rows and weights are at most 2 ** 14 in fp16: no overflow, and 28 octaves of normal
# numbers below
FP16_BITS = tl.constexpr(14)
# but no row of weights is scaled by more than 2 ** 112
MAX_EXPONENT = tl.constexpr(112.0)
_MEAN_BLOCK = tl.constexpr(1024)
_NAMED_BLOCK = tl.constexpr(128)
_ZERO_BLOCK = tl.constexpr(1024)
# the bits of a number above every other
_HUGE_BITS = tl.constexpr(0x7F7FFFFF)


@triton.jit
def select_side(x_ptr, y_ptr, stride_xn, stride_xd, stride_yn, stride_yd, N, M, side):
    """Pointer, strides and number of rows of x, side 0, or of y, side 1."""
    first = side == 0
    ptr = tl.where(first, x_ptr, y_ptr)
    stride_n = tl.where(first, stride_xn, stride_yn)
    stride_d = tl.where(first, stride_xd, stride_yd)
    return ptr, stride_n, stride_d, tl.where(first, N, M)


@triton.jit
def load_raw(ptr, stride_n, stride_d, rows, mask, D, BLOCK_D: tl.constexpr):
    """Rows in fp32, zero outside of the mask, and their norms."""
    offs_d = tl.arange(0, BLOCK_D)
    offsets = rows.to(tl.int64)[:, None] * stride_n + offs_d.to(tl.int64)[None, :] * stride_d
    mask = mask[:, None] & (offs_d < D)[None, :]
    z = tl.load(ptr + offsets, mask=mask, other=0.0).to(tl.float32)  # [BLOCK, BLOCK_D]
    return z, tl.sqrt(tl.sum(z * z, axis=1))


@triton.jit
def unit(z, norm):
    """Unit rows, or rows over EPS; a comparison, since the maximum of NaN and a number is it."""
    return z / tl.where(norm < EPS, EPS, norm)[:, None]


@triton.jit
def partners_of(rows, positive_ptr, mask, M):
    """The rows of y that are positives of rows of x, and which of them there are."""
    partners, exist = rows, mask
    if positive_ptr is not None:
        partners = tl.load(positive_ptr + rows, mask=mask, other=-1)
        exist = (partners >= 0) & (partners < M)
    return partners, exist


@triton.jit
def positive_logits(
    z,
    norm,
    y_ptr,
    positive_ptr,
    stride_yn,
    stride_yd,
    rows,
    mask,
    M,
    D,
    BLOCK_D: tl.constexpr,
):
    """Cosines of rows of x and their positives, in fp32; NaN where that does not exist."""
    partners, exist = partners_of(rows, positive_ptr, mask, M)
    other, other_norm = load_raw(y_ptr, stride_yn, stride_yd, partners, exist, D, BLOCK_D)
    cosine = tl.sum(unit(z, norm) * unit(other, other_norm), axis=1)
    return tl.where(exist, cosine, float("nan"))


@triton.jit
def _normalize_kernel(
    x_ptr,  # [N, D]
    y_ptr,  # [M, D], or x
    positive_ptr,  # [N] or None
    u_ptr,  # [padded, BLOCK_D]
    u_low_ptr,  # [padded, BLOCK_D] or None
    scale_ptr,  # [padded]
    pos2_ptr,  # [N] or None
    zero_ptr,  # [zero_size]
    lowest_ptr,  # [2]
    N,
    M,
    D,
    stride_xn,
    stride_xd,
    stride_yn,
    stride_yd,
    padded,
    zero_size,
    scale2,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Fills the matrix of rows, the positive logits, and what later launches need zeroed."""
    side = tl.program_id(1)
    z_ptr, stride_n, stride_d, size = select_side(
        x_ptr, y_ptr, stride_xn, stride_xd, stride_yn, stride_yd, N, M, side
    )
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    z, norm = load_raw(z_ptr, stride_n, stride_d, rows, rows < size, D, BLOCK_D)
    floored = tl.where(norm < EPS, EPS, norm)
    # 2 ** k is the floored norm less its mantissa, and 13 - k an exponent of normal numbers
    exponent = (floored.to(tl.int32, bitcast=True) >> 23) & 0xFF
    up = ((253 - exponent + FP16_BITS) << 23).to(tl.float32, bitcast=True)
    scaled = z * up[:, None]
    u = scaled.to(tl.float16)
    # the rows behind the last are zero
    last = side == tl.num_programs(1) - 1
    stored = rows < tl.where(last, padded - side * N, size)
    below = side * N + rows
    offsets = below.to(tl.int64)[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    tl.store(u_ptr + offsets, u, mask=stored[:, None])
    if u_low_ptr is not None:
        tl.store(u_low_ptr + offsets, (scaled - u.to(tl.float32)).to(tl.float16), stored[:, None])
    tl.store(scale_ptr + below, 1.0 / (floored * up), mask=stored)

    if pos2_ptr is not None and side == 0:
        paired = rows < N
        pos2 = positive_logits(
            z, norm, y_ptr, positive_ptr, stride_yn, stride_yd, rows, paired, M, D, BLOCK_D
        )
        tl.store(pos2_ptr + rows, pos2 * scale2, mask=paired)
    program = tl.program_id(0) * tl.num_programs(1) + side
    if program == 0:
        tl.store(lowest_ptr, _HUGE_BITS)
        tl.store(lowest_ptr + 1, 0)
    start = program.to(tl.int64) * _ZERO_BLOCK
    step = tl.num_programs(0) * tl.num_programs(1) * _ZERO_BLOCK
    for first in range(start, zero_size, step):
        offs = first + tl.arange(0, _ZERO_BLOCK)
        tl.store(zero_ptr + offs, tl.zeros([_ZERO_BLOCK], tl.float32), mask=offs < zero_size)


@triton.jit
def load_rows(rows_ptr, first, BLOCK: tl.constexpr, offs_d, BLOCK_D: tl.constexpr):
    """Columns offs_d of the scaled rows from `first` on; the matrix is padded, so no mask."""
    rows = (first + tl.arange(0, BLOCK)).to(tl.int64)
    return tl.load(rows_ptr + rows[:, None] * BLOCK_D + offs_d[None, :])


@triton.jit
def load_tile(
    u,
    u_low_ptr,
    first,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """The scaled rows from `first` on, by pointer or by descriptor, and what is left of them."""
    offs_d = tl.arange(0, BLOCK_D)
    tile = u.load([first, 0]) if DESCRIPTORS else load_rows(u, first, BLOCK, offs_d, BLOCK_D)
    low = tile
    if u_low_ptr is not None:
        low = load_rows(u_low_ptr, first, BLOCK, offs_d, BLOCK_D)
    return tile, low


@triton.jit
def products(
    a,
    a_low,
    b,
    b_low,
    u_ptr,
    u_low_ptr,
    a_first,
    b_first,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Products of two tiles of scaled rows, in hand or, where rows are wide, loaded in parts."""
    dots = tl.zeros([BLOCK_A, BLOCK_B], tl.float32)
    if BLOCK_K == BLOCK_D:
        dots = tl.dot(a, tl.trans(b), dots)
        if u_low_ptr is not None:
            dots = tl.dot(a, tl.trans(b_low), dots)
            dots = tl.dot(a_low, tl.trans(b), dots)
    else:
        for start in range(0, BLOCK_D, BLOCK_K):
            offs_k = start + tl.arange(0, BLOCK_K)
            part_a = load_rows(u_ptr, a_first, BLOCK_A, offs_k, BLOCK_D)
            part_b = load_rows(u_ptr, b_first, BLOCK_B, offs_k, BLOCK_D)
            dots = tl.dot(part_a, tl.trans(part_b), dots)
            if u_low_ptr is not None:
                part_low = load_rows(u_low_ptr, b_first, BLOCK_B, offs_k, BLOCK_D)
                dots = tl.dot(part_a, tl.trans(part_low), dots)
                part_low = load_rows(u_low_ptr, a_first, BLOCK_A, offs_k, BLOCK_D)
                dots = tl.dot(part_low, tl.trans(part_b), dots)
    return dots


@triton.jit
def mask_logits(
    s2,
    a_first,
    a_end,
    b_first,
    b_end,
    N,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    positive_ptr=None,
):
    """-inf for a row against itself, against its positive, N rows away, and past either end.

    Most tiles have none of these, and skip the comparisons. Where positives are named, rows of x
    are against rows of y alone.
    """
    if positive_ptr is not None:
        a = a_first + tl.arange(0, BLOCK_A)
        b = b_first + tl.arange(0, BLOCK_B)
        # N rows below, and -1 for a row of y
        of_a = tl.load(positive_ptr + a, mask=a < N, other=-1 - N) + N
        of_b = tl.load(positive_ptr + b, mask=b < N, other=-1 - N) + N
        excluded = (of_a[:, None] == b[None, :]) | (of_b[None, :] == a[:, None])
        excluded |= (a >= a_end)[:, None] | (b >= b_end)[None, :]
        s2 = tl.where(excluded, float("-inf"), s2)
    else:
        apart = b_first - a_first
        diagonal = (apart > -BLOCK_B) & (apart < BLOCK_A)
        above = (apart > N - BLOCK_B) & (apart < N + BLOCK_A)
        below = (apart > -N - BLOCK_B) & (apart < BLOCK_A - N)
        cut = (a_first + BLOCK_A > a_end) | (b_first + BLOCK_B > b_end)
        if diagonal | above | below | cut:
            a = a_first + tl.arange(0, BLOCK_A)[:, None]
            b = b_first + tl.arange(0, BLOCK_B)[None, :]
            excluded = (a == b) | (a + N == b) | (a == b + N) | (a >= a_end) | (b >= b_end)
            s2 = tl.where(excluded, float("-inf"), s2)
    return s2


@triton.jit
def negative_logits(
    own,
    own_low,
    u,
    u_ptr,
    u_low_ptr,
    scale_ptr,
    own_scale,
    own_first,
    own_end,
    first,
    end,
    N,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    positive_ptr=None,
):
    """Base-2 logits of own rows and columns, -inf for no negatives; the columns and their scale."""
    tile, tile_low = load_tile(u, u_low_ptr, first, BLOCK_N, BLOCK_D, DESCRIPTORS)
    dots = products(
        own,
        own_low,
        tile,
        tile_low,
        u_ptr,
        u_low_ptr,
        own_first,
        first,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        BLOCK_D,
    )
    scale = tl.load(scale_ptr + first + tl.arange(0, BLOCK_N))
    s2 = dots * own_scale[:, None] * scale[None, :]
    s2 = mask_logits(s2, own_first, own_end, first, end, N, BLOCK_M, BLOCK_N, positive_ptr)
    return s2, tile, tile_low, scale


@triton.jit
def log1p(x):
    """log(1 + x) for x in [-1/2, 1], as exact for a small x as for a large one."""
    y = 1.0 + x
    return tl.where(y == 1.0, x, tl.log(y) * (x / tl.where(y == 1.0, 1.0, y - 1.0)))


@triton.jit
def mean(partial_ptr, size, count):
    """sum(partial[:size]) / count, in a fixed order."""
    total = tl.zeros([_MEAN_BLOCK], tl.float32)
    for start in range(0, size, _MEAN_BLOCK):
        offs = start + tl.arange(0, _MEAN_BLOCK)
        total += tl.load(partial_ptr + offs, mask=offs < size, other=0.0)
    return tl.sum(total) / count


@triton.jit
def _mean_kernel(
    partial_ptr,  # [size]
    loss_ptr,  # []
    size,
    count,
):
    tl.store(loss_ptr, mean(partial_ptr, size, count))


@triton.jit
def store_raw_grad(
    dz_ptr,  # [size, D]
    du,
    z,
    norm,
    rows,
    size,
    D,
    BLOCK_D: tl.constexpr,
):
    """Takes du, the gradient of unit rows, through the normalisation and stores it.

    u = z / |z| passes (du - (u . du) u) / |z| on, and u = z / EPS the whole of du / EPS.
    """
    u = unit(z, norm)
    radial = tl.where(norm < EPS, 0.0, tl.sum(u * du, axis=1))
    dz = (du - radial[:, None] * u) / tl.where(norm < EPS, EPS, norm)[:, None]
    offs_d = tl.arange(0, BLOCK_D)
    offsets = rows.to(tl.int64)[:, None] * D + offs_d[None, :]
    tl.store(dz_ptr + offsets, dz, mask=(rows < size)[:, None] & (offs_d < D)[None, :])


@triton.jit
def take_from_named(
    du,
    x_ptr,
    positive_ptr,
    q_ptr,
    weight_ptr,
    stride_xn,
    stride_xd,
    rows,
    N,
    D,
    BLOCK_D: tl.constexpr,
):
    """Takes q_i u_i of the rows of x, weighted, from the rows of y that they name as positives."""
    first_row, last_row = tl.min(rows), tl.max(rows)
    for first in range(0, N, _NAMED_BLOCK):
        x = first + tl.arange(0, _NAMED_BLOCK)
        named = tl.load(positive_ptr + x, mask=x < N, other=-1)
        here = (named >= first_row) & (named <= last_row)
        # few are, one after another and in their order
        x = tl.where(here, x, N)
        for _ in range(tl.sum(here.to(tl.int32))):
            i = tl.min(x)
            x = tl.where(x == i, N, x)
            row = i + tl.zeros([1], tl.int32)
            z, norm = load_raw(x_ptr, stride_xn, stride_xd, row, row < N, D, BLOCK_D)
            q = tl.load(q_ptr + i)
            if weight_ptr is not None:
                q *= tl.load(weight_ptr + i)
            mine = rows == tl.load(positive_ptr + i)
            du -= tl.where(mine, q, 0.0)[:, None] * unit(z, norm)
    return du


@triton.jit
def wait_for_all(arrived_ptr):
    """Returns once every program of a cooperative launch is here, with what all have written."""
    tl.debug_barrier()
    tl.atomic_add(arrived_ptr, 1, sem="release")
    while tl.atomic_add(arrived_ptr, 0, sem="acquire") < tl.num_programs(0):
        pass
    tl.debug_barrier()


class ScaledRows(NamedTuple):
    """What `_normalize_kernel` writes."""

    u: Tensor  # [padded, width]
    u_low: Tensor | None  # [padded, width]
    scale: Tensor  # [padded]
    pos2: Tensor | None  # [N]
    lowest: Tensor  # [2]


def base2_scale(temperature: float) -> float:
    """What makes base-2 logits of cosines."""
    return 1.0 / (temperature * math.log(2.0))


def scaled_memory(
    size: int, D: int, *, exact: bool, device: torch.device
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Memory for scaled rows of D elements, for their low halves where `exact`, for the scales."""
    u = torch.empty(size, padded(D), dtype=torch.float16, device=device)
    scale = torch.empty(size, dtype=torch.float32, device=device)
    return u, torch.empty_like(u) if exact else None, scale


def scaled_rows(
    x: Tensor,  # [N, D]
    y: Tensor | None,  # [M, D]
    temperature: float,
    *,
    exact: bool,
    padding: int,
    positive: Tensor | None = None,  # [N]
    pairs: bool = True,
    into: tuple[Tensor, Tensor | None, Tensor] | None = None,
    zero: Tensor | None = None,
) -> ScaledRows:
    """The rows of x, above those of y, as the other kernels take them; one launch.

    Args:
        x: Raw rows.
        y: More of them, row i of y the positive of row i of x; None makes x's their own.
        temperature: T.
        exact: Keep the low halves as well.
        padding: Rows of zeros below the last.
        positive: The row of y that is each row's positive, where that is not row i.
        pairs: Whether the positives' logits are wanted.
        into: Memory for the rows, their low halves and scales.
        zero: fp32 memory to clear.
    """
    (N, D), sides = x.shape, 1 if y is None else 2
    y = x if y is None else y
    width, below = padded(D), N * (sides - 1)
    size = below + y.shape[0] + padding
    u, u_low, scale = into or scaled_memory(size, D, exact=exact, device=x.device)
    pos2 = torch.empty(N, dtype=torch.float32, device=x.device) if pairs else None
    lowest = torch.empty(2, dtype=torch.int32, device=x.device)
    block = max(1, min(32, 8192 // width))
    _normalize_kernel[(triton.cdiv(max(N, size - below), block), sides)](
        x,
        y,
        positive,
        u,
        u_low,
        scale,
        pos2,
        scale if zero is None else zero,
        lowest,
        N,
        y.shape[0],
        D,
        *x.stride(),
        *y.stride(),
        size,
        0 if zero is None else zero.numel(),
        base2_scale(temperature),
        BLOCK=block,
        BLOCK_D=width,
        num_warps=4,
    )
    return ScaledRows(u, u_low, scale, pos2, lowest)
