"""What the kernels of the losses share: scaled rows in fp16, their products, and the steps between.

The rows of one operand, or of two, stand below one another in one matrix: x above y. A row z is
kept as 2 ** k z in fp16, with a norm in [2 ** 13, 2 ** 14), beside the fp32 factor that makes it a
unit row. That scaling is exact: fp16 and bf16 input enters the similarities without any rounding,
and fp32 input is rounded once, to the 11 bits of fp16. In the exact mode a second fp16 matrix keeps
the rest of every fp32 row, and three of the four products are summed: that gives 22 bits, close to
the 24 of fp32.

Logits are kept in base 2, where the exponential is one instruction: s2 = s log2(e).

Arguments that travel together are one NamedTuple. On the host its elements are tensors and numbers;
in a kernel they are pointers and scalars.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import cdiv, padded

# that of F.normalize: a shorter row is divided by this instead of by its norm
EPS = tl.constexpr(1e-12)
LN2 = tl.constexpr(math.log(2.0))
# norms of rows and weights are at most 2 ** 14 in fp16: nothing overflows, and 28 octaves of normal
# numbers are below
FP16_BITS = tl.constexpr(14)
# no row of weights is scaled by more than 2 ** 112
MAX_EXPONENT = tl.constexpr(112.0)
_MEAN_BLOCK = tl.constexpr(1024)
_NAMED_BLOCK = tl.constexpr(128)
_ZERO_BLOCK = tl.constexpr(1024)


class Matrix(NamedTuple):
    """Raw rows in fp32, fp16 or bf16, with any strides."""

    ptr: Tensor  # [N, D]
    stride_n: int
    stride_d: int
    N: int
    D: int


class ScaledRows(NamedTuple):
    """The matrix of scaled rows, which ends in rows of zeros so that tiles need no mask."""

    u_ptr: Tensor  # [padded, BLOCK_D]
    low_ptr: Tensor | None  # [padded, BLOCK_D], the rest of the rows in the exact mode
    scale_ptr: Tensor  # [padded]
    scale2: float  # makes base-2 logits of cosines


class Tile(NamedTuple):
    """Scaled rows from `first` on, of which those before `end` count."""

    first: int
    end: int
    high: Tensor  # [BLOCK, BLOCK_D]
    low: Tensor  # [BLOCK, BLOCK_D], `high` where rows are in one part


class Own(NamedTuple):
    """The tile of rows that a program owns."""

    first: int
    end: int
    high: Tensor  # [BLOCK_M, BLOCK_D]
    low: Tensor  # [BLOCK_M, BLOCK_D]
    scale: Tensor  # [BLOCK_M], which makes base-2 logits of products with unit rows


def matrix(rows: Tensor) -> Matrix:
    """Raw rows as a kernel takes them."""
    return Matrix(rows, *rows.stride(), *rows.shape)


@triton.jit
def select_side(x, y, side):
    """The matrix x for side 0, y for side 1."""
    first = side == 0
    ptr = tl.where(first, x.ptr, y.ptr)
    stride_n = tl.where(first, x.stride_n, y.stride_n)
    stride_d = tl.where(first, x.stride_d, y.stride_d)
    return Matrix(ptr, stride_n, stride_d, tl.where(first, x.N, y.N), x.D)


@triton.jit
def load_raw(z, rows, mask, BLOCK_D: tl.constexpr):
    """Rows of a matrix in fp32, zero outside of the mask, and their norms."""
    offs_d = tl.arange(0, BLOCK_D)
    offsets = rows.to(tl.int64)[:, None] * z.stride_n + offs_d.to(tl.int64)[None, :] * z.stride_d
    mask = mask[:, None] & (offs_d < z.D)[None, :]
    raw = tl.load(z.ptr + offsets, mask=mask, other=0.0).to(tl.float32)  # [BLOCK, BLOCK_D]
    return raw, tl.sqrt(tl.sum(raw * raw, axis=1))


@triton.jit
def floored(norm):
    """The norm, or EPS; by a comparison, since the maximum of NaN and a number is the number."""
    return tl.where(norm < EPS, EPS, norm)


@triton.jit
def load_unit(z, rows, mask, BLOCK_D: tl.constexpr):
    """Unit rows of a matrix in fp32, or rows divided by EPS."""
    raw, norm = load_raw(z, rows, mask, BLOCK_D)
    return raw / floored(norm)[:, None]


@triton.jit
def partners_of(rows, positive_ptr, mask, M):
    """The rows of y that are the positives of rows of x, and which of them exist."""
    partners, exist = rows, mask
    if positive_ptr is not None:
        partners = tl.load(positive_ptr + rows, mask=mask, other=-1)
        exist = (partners >= 0) & (partners < M)
    return partners, exist


@triton.jit
def positive_logits(u, y, positive_ptr, rows, mask, BLOCK_D: tl.constexpr):
    """The fp32 cosines of unit rows of x with their positives; NaN where none exists."""
    partners, exist = partners_of(rows, positive_ptr, mask, y.N)
    cosine = tl.sum(u * load_unit(y, partners, exist, BLOCK_D), axis=1)
    return tl.where(exist, cosine, float("nan"))


@triton.jit
def _normalize_kernel(
    x,  # Matrix [N, D]
    y,  # Matrix [M, D], or x
    positive_ptr,  # [N] or None
    out,  # ScaledRows
    pos2_ptr,  # [N] or None
    zero_ptr,  # [zero_size] or None
    padded,
    zero_size,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Writes the scaled rows and the positives' logits, and clears what later launches add to."""
    side = tl.program_id(1)
    z = select_side(x, y, side)
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    raw, norm = load_raw(z, rows, rows < z.N, BLOCK_D)
    norm = floored(norm)
    # 2 ** k is the norm less its mantissa, and 13 - k is an exponent of normal numbers
    exponent = (norm.to(tl.int32, bitcast=True) >> 23) & 0xFF
    up = ((253 - exponent + FP16_BITS) << 23).to(tl.float32, bitcast=True)
    scaled = raw * up[:, None]
    u = scaled.to(tl.float16)
    # the last side also writes the rows of zeros
    last = side == tl.num_programs(1) - 1
    stored = rows < tl.where(last, padded - side * x.N, z.N)
    below = side * x.N + rows
    offsets = below.to(tl.int64)[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    tl.store(out.u_ptr + offsets, u, mask=stored[:, None])
    if out.low_ptr is not None:
        low = (scaled - u.to(tl.float32)).to(tl.float16)
        tl.store(out.low_ptr + offsets, low, mask=stored[:, None])
    tl.store(out.scale_ptr + below, 1.0 / (norm * up), mask=stored)

    if pos2_ptr is not None and side == 0:
        paired = rows < x.N
        cosine = positive_logits(raw / norm[:, None], y, positive_ptr, rows, paired, BLOCK_D)
        tl.store(pos2_ptr + rows, cosine * out.scale2, mask=paired)
    if zero_ptr is not None:
        program = tl.program_id(0) * tl.num_programs(1) + side
        start = program.to(tl.int64) * _ZERO_BLOCK
        step = tl.num_programs(0) * tl.num_programs(1) * _ZERO_BLOCK
        for first in range(start, zero_size, step):
            offs = first + tl.arange(0, _ZERO_BLOCK)
            tl.store(zero_ptr + offs, tl.zeros([_ZERO_BLOCK], tl.float32), mask=offs < zero_size)


@triton.jit
def _load_rows(ptr, first, BLOCK: tl.constexpr, offs_d, BLOCK_D: tl.constexpr):
    rows = (first + tl.arange(0, BLOCK)).to(tl.int64)
    return tl.load(ptr + rows[:, None] * BLOCK_D + offs_d[None, :])


@triton.jit
def load_tile(rows, u, first, end, BLOCK: tl.constexpr, blocks):
    """A tile of scaled rows, loaded through `u`: rows.u_ptr, or a descriptor of such tiles."""
    offs_d = tl.arange(0, blocks.BLOCK_D)
    if blocks.DESCRIPTORS:
        high = u.load([first, 0])
    else:
        high = _load_rows(u, first, BLOCK, offs_d, blocks.BLOCK_D)
    low = high
    if rows.low_ptr is not None:
        low = _load_rows(rows.low_ptr, first, BLOCK, offs_d, blocks.BLOCK_D)
    return Tile(first, end, high, low)


@triton.jit
def load_scale(rows, first, BLOCK: tl.constexpr):
    """The factors that make unit rows of the scaled rows from `first` on."""
    return tl.load(rows.scale_ptr + first + tl.arange(0, BLOCK))


@triton.jit
def load_own(rows, u, first, end, blocks):
    """The tile of rows that a program owns."""
    scale = load_scale(rows, first, blocks.BLOCK_M) * rows.scale2
    own = load_tile(rows, u, first, end, blocks.BLOCK_M, blocks)
    return Own(first, end, own.high, own.low, scale)


@triton.jit
def products(rows, a, b, blocks):
    """The products of two tiles' rows, which are loaded again in parts where rows are wide."""
    BLOCK_A: tl.constexpr = a.high.shape[0]
    BLOCK_B: tl.constexpr = b.high.shape[0]
    dots = tl.zeros([BLOCK_A, BLOCK_B], tl.float32)
    if blocks.BLOCK_K == blocks.BLOCK_D:
        dots = tl.dot(a.high, tl.trans(b.high), dots)
        if rows.low_ptr is not None:
            dots = tl.dot(a.high, tl.trans(b.low), dots)
            dots = tl.dot(a.low, tl.trans(b.high), dots)
    else:
        for start in range(0, blocks.BLOCK_D, blocks.BLOCK_K):
            offs_k = start + tl.arange(0, blocks.BLOCK_K)
            high_a = _load_rows(rows.u_ptr, a.first, BLOCK_A, offs_k, blocks.BLOCK_D)
            high_b = _load_rows(rows.u_ptr, b.first, BLOCK_B, offs_k, blocks.BLOCK_D)
            dots = tl.dot(high_a, tl.trans(high_b), dots)
            if rows.low_ptr is not None:
                low_b = _load_rows(rows.low_ptr, b.first, BLOCK_B, offs_k, blocks.BLOCK_D)
                dots = tl.dot(high_a, tl.trans(low_b), dots)
                low_a = _load_rows(rows.low_ptr, a.first, BLOCK_A, offs_k, blocks.BLOCK_D)
                dots = tl.dot(low_a, tl.trans(high_b), dots)
    return dots


@triton.jit
def logits(rows, own, u, first, end, blocks):
    """The base-2 logits of own rows with the columns from `first` on, these and their scale."""
    columns = load_tile(rows, u, first, end, blocks.BLOCK_N, blocks)
    dots = products(rows, own, columns, blocks)
    # loaded late: during the products it would take registers
    scale = load_scale(rows, first, blocks.BLOCK_N)
    return dots * own.scale[:, None] * scale[None, :], columns, scale


@triton.jit
def mask_logits(s2, a, b, N, positive_ptr=None):
    """Puts -inf where a row meets itself or its positive, N rows away, and past either end.

    Most tiles have none of these, and skip the comparisons. Where positives are named, rows of x
    meet rows of y alone.
    """
    BLOCK_A: tl.constexpr = s2.shape[0]
    BLOCK_B: tl.constexpr = s2.shape[1]
    if positive_ptr is not None:
        rows = a.first + tl.arange(0, BLOCK_A)
        columns = b.first + tl.arange(0, BLOCK_B)
        # y begins N rows below x; a row of y itself gets -1
        of_row = tl.load(positive_ptr + rows, mask=rows < N, other=-1 - N) + N
        of_column = tl.load(positive_ptr + columns, mask=columns < N, other=-1 - N) + N
        excluded = (of_row[:, None] == columns[None, :]) | (of_column[None, :] == rows[:, None])
        excluded |= (rows >= a.end)[:, None] | (columns >= b.end)[None, :]
        s2 = tl.where(excluded, float("-inf"), s2)
    else:
        apart = b.first - a.first
        diagonal = (apart > -BLOCK_B) & (apart < BLOCK_A)
        above = (apart > N - BLOCK_B) & (apart < N + BLOCK_A)
        below = (apart > -N - BLOCK_B) & (apart < -N + BLOCK_A)
        cut = (a.first + BLOCK_A > a.end) | (b.first + BLOCK_B > b.end)
        if diagonal | above | below | cut:
            i = a.first + tl.arange(0, BLOCK_A)[:, None]
            j = b.first + tl.arange(0, BLOCK_B)[None, :]
            excluded = (i == j) | (i + N == j) | (i == j + N) | (i >= a.end) | (j >= b.end)
            s2 = tl.where(excluded, float("-inf"), s2)
    return s2


@triton.jit
def negative_logits(rows, own, u, first, end, N, blocks, positive_ptr=None):
    """The base-2 logits of negatives, -inf elsewhere, the columns and their scale."""
    s2, columns, scale = logits(rows, own, u, first, end, blocks)
    return mask_logits(s2, own, columns, N, positive_ptr), columns, scale


@triton.jit
def add_exponentials(total, shift, s2):
    """Adds up exp2(s2 - shift) by rows, with the largest s2 so far as the shift."""
    new_shift = tl.maximum(shift, tl.max(s2, axis=1))
    total = total * tl.exp2(shift - new_shift) + tl.sum(tl.exp2(s2 - new_shift[:, None]), axis=1)
    return total, new_shift


@triton.jit
def add_weighted(du, weights, columns, rows):
    """Adds weights @ columns to du, with weights that have been scaled for fp16."""
    high = weights.to(tl.float16)
    du = tl.dot(high, columns.high, du)
    if rows.low_ptr is not None:
        du = tl.dot((weights - high.to(tl.float32)).to(tl.float16), columns.high, du)
        du = tl.dot(high, columns.low, du)
    return du


@triton.jit
def add_rescaled(du, exponent, weights, columns, rows):
    """Adds weights @ columns to du, both scaled by 2 ** exponent, which it lowers where it must.

    The weights come with the columns' scale and 2 ** (FP16_BITS - 1) in them. The exponent of a row
    follows its largest weight so far, so that fp16 holds the weights with all of their digits.
    """
    top = tl.maximum(tl.max(tl.abs(weights), axis=1), 2.0 ** (FP16_BITS - MAX_EXPONENT))
    new_exponent = tl.minimum(exponent, -tl.ceil(tl.log2(top)) + FP16_BITS)
    weights *= tl.exp2(new_exponent)[:, None]
    du *= tl.exp2(new_exponent - exponent)[:, None]
    return add_weighted(du, weights, columns, rows), new_exponent


@triton.jit
def unscaled(du, exponent):
    """What `add_rescaled` has added up, without the powers of two."""
    return du * tl.exp2(-exponent - (FP16_BITS - 1.0))[:, None]


@triton.jit
def log1p(x):
    """log(1 + x) for x in [-1/2, 1], as exact for a small x as for a large one."""
    y = 1.0 + x
    return tl.where(y == 1.0, x, tl.log(y) * (x / tl.where(y == 1.0, 1.0, y - 1.0)))


@triton.jit
def softplus(x):
    """log(1 + exp(x))."""
    return tl.maximum(x, 0.0) + log1p(tl.exp(-tl.abs(x)))


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)); that of -x is 1 minus this without a rounding."""
    ratio = tl.exp(-tl.abs(x))
    return tl.where(x > 0, 1.0, ratio) / (1.0 + ratio)


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
def store_raw_grad(dz_ptr, du, raw, norm, rows, mask, D, BLOCK_D: tl.constexpr):
    """Takes du, the gradient of unit rows, through the normalization of raw rows and stores it.

    u = z / |z| passes (du - (u . du) u) / |z| on, and u = z / EPS passes du / EPS.
    """
    u = raw / floored(norm)[:, None]
    radial = tl.where(norm < EPS, 0.0, tl.sum(u * du, axis=1))
    dz = (du - radial[:, None] * u) / floored(norm)[:, None]
    offs_d = tl.arange(0, BLOCK_D)
    offsets = rows.to(tl.int64)[:, None] * D + offs_d[None, :]
    tl.store(dz_ptr + offsets, dz, mask=mask[:, None] & (offs_d < D)[None, :])


@triton.jit
def take_from_named(du, x, positive_ptr, q_ptr, weight_ptr, rows, BLOCK_D: tl.constexpr):
    """Takes q_i u_i, weighted, of every row i of x from the row of y that it names."""
    first_row, last_row = tl.min(rows), tl.max(rows)
    for first in range(0, x.N, _NAMED_BLOCK):
        index = first + tl.arange(0, _NAMED_BLOCK)
        named = tl.load(positive_ptr + index, mask=index < x.N, other=-1)
        here = (named >= first_row) & (named <= last_row)
        # there are few, which are taken one after another and in their order
        index = tl.where(here, index, x.N)
        for _ in range(tl.sum(here.to(tl.int32))):
            i = tl.min(index)
            index = tl.where(index == i, x.N, index)
            row = i + tl.zeros([1], tl.int32)
            u = load_unit(x, row, row < x.N, BLOCK_D)
            q = tl.load(q_ptr + i)
            if weight_ptr is not None:
                q *= tl.load(weight_ptr + i)
            mine = rows == tl.load(positive_ptr + i)
            du -= tl.where(mine, q, 0.0)[:, None] * u
    return du


@triton.jit
def arrives_last(arrived_ptr, programs):
    """Whether the other programs of a group were here before, with all that they have written."""
    tl.debug_barrier()
    before = tl.atomic_add(arrived_ptr, 1, sem="acq_rel")
    tl.debug_barrier()
    return before == programs - 1


@triton.jit
def wait_for_all(arrived_ptr):
    """Returns once every program of a cooperative launch is here, with all that it has written."""
    tl.debug_barrier()
    tl.atomic_add(arrived_ptr, 1, sem="release")
    while tl.atomic_add(arrived_ptr, 0, sem="acquire") < tl.num_programs(0):
        pass
    tl.debug_barrier()


def scaled_memory(
    size: int, D: int, temperature: float, *, exact: bool, device: torch.device
) -> ScaledRows:
    """Uninitialized memory for scaled rows of D elements, in two parts where `exact`."""
    u = torch.empty(size, padded(D), dtype=torch.float16, device=device)
    scale = torch.empty(size, dtype=torch.float32, device=device)
    low = torch.empty_like(u) if exact else None
    return ScaledRows(u, low, scale, 1.0 / (temperature * math.log(2.0)))


def normalize(
    x: Tensor,  # [N, D]
    y: Tensor | None,  # [M, D]
    out: ScaledRows,
    *,
    pos2: Tensor | None = None,  # [N]
    positive: Tensor | None = None,  # [N]
    zero: Tensor | None = None,
) -> None:
    """Writes the rows of x, above those of y, as the other kernels take them, in one launch.

    Args:
        x: Raw rows.
        y: More raw rows; with None, every row of x is its own positive.
        out: Where the scaled rows go; rows of zeros fill what is left of it.
        pos2: Where the base-2 logits of x's rows with their positives go, if these are wanted.
        positive: The row of y that is each row's positive; with None, that is row i.
        zero: fp32 memory to clear.
    """
    size, BLOCK_D = out.u_ptr.shape
    sides, other = (1, x) if y is None else (2, y)
    block = max(1, min(32, 8192 // BLOCK_D))
    longest = max(len(x), size - len(x) * (sides - 1))
    _normalize_kernel[(cdiv(longest, block), sides)](
        matrix(x),
        matrix(other),
        positive,
        out,
        pos2,
        zero,
        size,
        0 if zero is None else zero.numel(),
        BLOCK=block,
        BLOCK_D=BLOCK_D,
        num_warps=4,
    )
