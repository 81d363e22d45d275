"""NT-Xent over n = 2N rows in Triton: the loss, or the loss with its gradient, in three launches.

With unit rows u, s_ij = u_i . u_j / T, the positive pi(i) of row i in the other view, and
neg_i = sum of exp(s_ij) over all j but i and pi(i):

    loss_i = log(neg_i + exp(s_i,pi)) - s_i,pi = softplus(log neg_i - s_i,pi)
    d loss / d u_i = (1 / nT) (sum_j (P_ij + P_ji) u_j - (q_i + q_pi) u_pi),   j not i, not pi(i)
    P_ij = exp(s_ij) / (neg_i + exp(s_i,pi)),   q_i = neg_i / (neg_i + exp(s_i,pi))

Only the negatives go through the tensor cores. The positive is computed in fp32 and enters with the
weight q, never as P - 1: that difference has no correct digit left where the loss is small.

A block owns rows of one view, walks over all n rows in a fixed order and writes what it owns, so
results repeat bit for bit. The similarities exist one tile at a time; memory is O(n D).

The tensor cores multiply fp16, whose error on unit rows is an eighth of bf16's. fp32 input is split
into two fp16 numbers, high + low, and three of the four products are summed: 22 bits, close to
fp32's 24. Logits are kept in base 2, where the exponential is one instruction: s2 = s log2(e).
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import RowTiles, on_device_of, row_tiles

# F.normalize's: a shorter row is divided by this instead of by its norm
EPS = tl.constexpr(1e-12)
LN2 = tl.constexpr(math.log(2.0))
# unit rows and weights are scaled to at most 2 ** 14 in fp16: no overflow, and 28 octaves of normal
# numbers below, which the low half of a split needs
FP16_BITS = tl.constexpr(14)
# but no weight by more than 2 ** 100
MAX_EXPONENT = tl.constexpr(100.0)
MEAN_BLOCK = tl.constexpr(1024)
# from here up exp(-2 / T) is a normal fp32 number, and 1 / T can stand for every row's maximum
FIXED_SHIFT_TEMPERATURE = 0.023


@triton.jit
def _select_view(z0_ptr, z1_ptr, stride0_n, stride0_d, stride1_n, stride1_d, view):
    """Pointer and strides of view 0 or 1."""
    z_ptr = tl.where(view == 0, z0_ptr, z1_ptr)
    stride_n = tl.where(view == 0, stride0_n, stride1_n)
    stride_d = tl.where(view == 0, stride0_d, stride1_d)
    return z_ptr, stride_n, stride_d


@triton.jit
def _load_normalized(z_ptr, stride_n, stride_d, offs_n, N, D, BLOCK_D: tl.constexpr):
    """Unit rows of a view in fp32, zero outside of [N, D], and the norms that they had."""
    offs_d = tl.arange(0, BLOCK_D)
    offsets = offs_n.to(tl.int64)[:, None] * stride_n + offs_d.to(tl.int64)[None, :] * stride_d
    mask = (offs_n < N)[:, None] & (offs_d < D)[None, :]
    z = tl.load(z_ptr + offsets, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_N, BLOCK_D]
    norm = tl.sqrt(tl.sum(z * z, axis=1))
    # a comparison: the maximum of NaN and a number is the number
    return z / tl.where(norm < EPS, EPS, norm)[:, None], norm


@triton.jit
def _load_units(u_ptr, offs_n, mask_n, offs_d, BLOCK_D: tl.constexpr):
    """Columns offs_d of scaled fp16 unit rows or of their low halves."""
    offsets = offs_n.to(tl.int64)[:, None] * BLOCK_D + offs_d[None, :]
    return tl.load(u_ptr + offsets, mask=mask_n[:, None], other=0.0)


@triton.jit
def _negative_logits(
    u_ptr,
    u_low_ptr,
    offs_own,
    mask_own,
    offs_n,
    mask_n,
    N,
    scale2,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Base-2 logits of a tile, -inf for the row itself, its positive and columns past the last."""
    s2 = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, BLOCK_D, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        own = _load_units(u_ptr, offs_own, mask_own, offs_k, BLOCK_D)
        u = _load_units(u_ptr, offs_n, mask_n, offs_k, BLOCK_D)
        s2 = tl.dot(own, tl.trans(u), s2, input_precision="ieee")
        if u_low_ptr is not None:
            u_low = _load_units(u_low_ptr, offs_n, mask_n, offs_k, BLOCK_D)
            s2 = tl.dot(own, tl.trans(u_low), s2, input_precision="ieee")
            own_low = _load_units(u_low_ptr, offs_own, mask_own, offs_k, BLOCK_D)
            s2 = tl.dot(own_low, tl.trans(u), s2, input_precision="ieee")
    s2 *= scale2 * 2.0 ** (-2 * FP16_BITS)
    row = offs_own[:, None]
    column = offs_n[None, :]
    negative = (row != column) & (row + N != column) & (row != column + N) & mask_n[None, :]
    return tl.where(negative, s2, float("-inf"))


@triton.jit
def _log1p(x):
    """log(1 + x) for x in [0, 1], as exact for a small x as for a large one."""
    y = 1.0 + x
    return tl.where(y == 1.0, x, tl.log(y) * (x / tl.where(y == 1.0, 1.0, y - 1.0)))


@triton.jit
def _mean(partial_ptr, size, count):
    """sum(partial[:size]) / count, in a fixed order."""
    total = tl.zeros([MEAN_BLOCK], tl.float32)
    for start in range(0, size, MEAN_BLOCK):
        offs = start + tl.arange(0, MEAN_BLOCK)
        total += tl.load(partial_ptr + offs, mask=offs < size, other=0.0)
    return tl.sum(total) / count


@triton.jit
def _nt_xent_normalize_kernel(
    z0_ptr,  # [N, D]
    z1_ptr,  # [N, D]
    u_ptr,  # [2N, BLOCK_D]
    u_low_ptr,  # [2N, BLOCK_D] or None
    N,
    D,
    stride0_n,
    stride0_d,
    stride1_n,
    stride1_d,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    view = tl.program_id(1)
    z_ptr, stride_n, stride_d = _select_view(
        z0_ptr, z1_ptr, stride0_n, stride0_d, stride1_n, stride1_d, view
    )
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = (offs_n < N)[:, None]
    u, _ = _load_normalized(z_ptr, stride_n, stride_d, offs_n, N, D, BLOCK_D)
    u *= 2.0**FP16_BITS
    high = u.to(tl.float16)
    offsets = (view * N + offs_n).to(tl.int64)[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    tl.store(u_ptr + offsets, high, mask=mask_n)
    if u_low_ptr is not None:
        tl.store(u_low_ptr + offsets, (u - high.to(tl.float32)).to(tl.float16), mask=mask_n)


@triton.jit
def _nt_xent_rows_kernel(
    z0_ptr,  # [N, D]
    z1_ptr,  # [N, D]
    u_ptr,  # [2N, BLOCK_D]
    u_low_ptr,  # [2N, BLOCK_D] or None
    lse2_ptr,  # [2N]
    q_ptr,  # [2N]
    partial_ptr,  # [2 cdiv(N, BLOCK_M)]
    N,
    D,
    stride0_n,
    stride0_d,
    stride1_n,
    stride1_d,
    scale2,
    FIXED_SHIFT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    view = tl.program_id(1)
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < N
    offs_own = view * N + offs_m

    # no logit is below -scale2 or above scale2
    if FIXED_SHIFT:
        shift = tl.zeros([BLOCK_M], tl.float32) + scale2
    else:
        shift = tl.zeros([BLOCK_M], tl.float32) - scale2
    neg = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, 2 * N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        mask_n = offs_n < 2 * N
        s2 = _negative_logits(
            u_ptr,
            u_low_ptr,
            offs_own,
            mask_m,
            offs_n,
            mask_n,
            N,
            scale2,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            BLOCK_D,
        )
        if not FIXED_SHIFT:
            new_shift = tl.maximum(shift, tl.max(s2, axis=1))
            neg *= tl.exp2(shift - new_shift)
            shift = new_shift
        neg += tl.sum(tl.exp2(s2 - shift[:, None]), axis=1)

    u0, _ = _load_normalized(z0_ptr, stride0_n, stride0_d, offs_m, N, D, BLOCK_D)
    u1, _ = _load_normalized(z1_ptr, stride1_n, stride1_d, offs_m, N, D, BLOCK_D)
    pos2 = tl.sum(u0 * u1, axis=1) * scale2
    margin = (shift + tl.log2(neg) - pos2) * LN2  # log neg_i - s_i,pi; -inf for N = 1
    ratio = tl.exp(-tl.abs(margin))
    loss = tl.maximum(margin, 0.0) + _log1p(ratio)
    tl.store(lse2_ptr + offs_own, pos2 + loss / LN2, mask=mask_m)
    tl.store(q_ptr + offs_own, tl.where(margin > 0, 1.0, ratio) / (1.0 + ratio), mask=mask_m)
    program = view * tl.num_programs(0) + tl.program_id(0)
    tl.store(partial_ptr + program, tl.sum(tl.where(mask_m, loss, 0.0)))


@triton.jit
def _nt_xent_mean_kernel(
    partial_ptr,  # [size]
    loss_ptr,  # []
    size,
    count,
):
    tl.store(loss_ptr, _mean(partial_ptr, size, count))


@triton.jit
def _nt_xent_grad_kernel(
    z0_ptr,  # [N, D]
    z1_ptr,  # [N, D]
    u_ptr,  # [2N, BLOCK_D]
    u_low_ptr,  # [2N, BLOCK_D] or None
    lse2_ptr,  # [2N]
    q_ptr,  # [2N]
    partial_ptr,  # [2 cdiv(N, BLOCK_M)]
    loss_ptr,  # []
    dz_ptr,  # [2N, D]
    N,
    D,
    stride0_n,
    stride0_d,
    stride1_n,
    stride1_d,
    scale2,
    grad_scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    view = tl.program_id(1)
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < N
    offs_own = view * N + offs_m
    offs_d = tl.arange(0, BLOCK_D)
    lse2_own = tl.load(lse2_ptr + offs_own, mask=mask_m, other=float("inf"))

    du = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # a row's weights are scaled by a power of two that follows the largest so far
    exponent = tl.zeros([BLOCK_M], tl.float32) + MAX_EXPONENT
    for start in range(0, 2 * N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        mask_n = offs_n < 2 * N
        lse2 = tl.load(lse2_ptr + offs_n, mask=mask_n, other=float("inf"))
        s2 = _negative_logits(
            u_ptr,
            u_low_ptr,
            offs_own,
            mask_m,
            offs_n,
            mask_n,
            N,
            scale2,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            BLOCK_D,
        )
        weights = tl.exp2(s2 - lse2_own[:, None]) + tl.exp2(s2 - lse2[None, :])  # P_ij + P_ji

        top = tl.maximum(tl.max(weights, axis=1), 2.0 ** (FP16_BITS - MAX_EXPONENT))
        new_exponent = tl.minimum(exponent, tl.floor(-tl.log2(top) + FP16_BITS))
        weights *= tl.exp2(new_exponent)[:, None]
        du *= tl.exp2(new_exponent - exponent)[:, None]
        exponent = new_exponent
        high = weights.to(tl.float16)
        u = _load_units(u_ptr, offs_n, mask_n, offs_d, BLOCK_D)
        du = tl.dot(high, u, du, input_precision="ieee")
        if u_low_ptr is not None:
            low = (weights - high.to(tl.float32)).to(tl.float16)
            du = tl.dot(low, u, du, input_precision="ieee")
            u_low = _load_units(u_low_ptr, offs_n, mask_n, offs_d, BLOCK_D)
            du = tl.dot(high, u_low, du, input_precision="ieee")

    q = tl.load(q_ptr + offs_m, mask=mask_m, other=0.0)
    q += tl.load(q_ptr + N + offs_m, mask=mask_m, other=0.0)
    z_ptr, stride_n, stride_d = _select_view(
        z0_ptr, z1_ptr, stride0_n, stride0_d, stride1_n, stride1_d, 1 - view
    )
    u_pos, _ = _load_normalized(z_ptr, stride_n, stride_d, offs_m, N, D, BLOCK_D)
    du = (du * tl.exp2(-exponent - FP16_BITS)[:, None] - q[:, None] * u_pos) * grad_scale
    # u = z / |z| passes du - (u . du) u on, and u = z / EPS the whole of du
    z_ptr, stride_n, stride_d = _select_view(
        z0_ptr, z1_ptr, stride0_n, stride0_d, stride1_n, stride1_d, view
    )
    u_fp32, norm = _load_normalized(z_ptr, stride_n, stride_d, offs_m, N, D, BLOCK_D)
    radial = tl.where(norm < EPS, 0.0, tl.sum(u_fp32 * du, axis=1))
    dz = (du - radial[:, None] * u_fp32) / tl.where(norm < EPS, EPS, norm)[:, None]
    offsets = offs_own.to(tl.int64)[:, None] * D + offs_d[None, :]
    tl.store(dz_ptr + offsets, dz, mask=mask_m[:, None] & (offs_d < D)[None, :])

    if (tl.program_id(0) == 0) & (view == 0):
        tl.store(loss_ptr, _mean(partial_ptr, 2 * tl.num_programs(0), 2 * N))


class _RowStatistics(NamedTuple):
    """What the first two launches write."""

    u: Tensor  # [2N, width]
    u_low: Tensor | None  # [2N, width]
    lse2: Tensor  # [2N]
    q: Tensor  # [2N]
    partial: Tensor  # [2 cdiv(N, rows)]


def _tiles(z: Tensor) -> RowTiles:
    return row_tiles(z.shape[1], parts=2 if z.dtype == torch.float32 else 1)


def _row_statistics(
    z0: Tensor,  # [N, D]
    z1: Tensor,  # [N, D]
    temperature: float,
) -> _RowStatistics:
    N, D = z0.shape
    tiles = _tiles(z0)
    grid = (triton.cdiv(N, tiles.rows), 2)
    u = torch.empty(2 * N, tiles.width, dtype=torch.float16, device=z0.device)
    u_low = torch.empty_like(u) if z0.dtype == torch.float32 else None
    lse2, q = torch.empty(2, 2 * N, dtype=torch.float32, device=z0.device)
    partial = torch.empty(2 * grid[0], dtype=torch.float32, device=z0.device)
    sizes = (N, D, *z0.stride(), *z1.stride())
    _nt_xent_normalize_kernel[grid](
        z0,
        z1,
        u,
        u_low,
        *sizes,
        BLOCK_N=tiles.rows,
        BLOCK_D=tiles.width,
        num_warps=tiles.num_warps,
    )
    _nt_xent_rows_kernel[grid](
        z0,
        z1,
        u,
        u_low,
        lse2,
        q,
        partial,
        *sizes,
        1.0 / (temperature * math.log(2.0)),
        FIXED_SHIFT=temperature >= FIXED_SHIFT_TEMPERATURE,
        BLOCK_M=tiles.rows,
        BLOCK_N=tiles.rows,
        BLOCK_K=tiles.depth,
        BLOCK_D=tiles.width,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    return _RowStatistics(u, u_low, lse2, q, partial)


def nt_xent_fwd(
    z0: Tensor,  # [N, D]
    z1: Tensor,  # [N, D]
    temperature: float,
) -> Tensor:
    """Mean NT-Xent loss of raw projections.

    Args:
        z0: First view [N, D], fp32, fp16 or bf16, any strides.
        z1: Second view, of the same shape, dtype and device.
        temperature: T, positive.

    Returns:
        The loss, fp32 [].
    """
    loss = torch.empty((), dtype=torch.float32, device=z0.device)
    with on_device_of(z0):
        partial = _row_statistics(z0, z1, temperature).partial
        _nt_xent_mean_kernel[(1,)](partial, loss, partial.numel(), 2 * z0.shape[0])
    return loss


def nt_xent_fwd_bwd(
    z0: Tensor,  # [N, D]
    z1: Tensor,  # [N, D]
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Mean NT-Xent loss of raw projections and its gradient.

    Args:
        z0: First view [N, D], fp32, fp16 or bf16, any strides.
        z1: Second view, of the same shape, dtype and device.
        temperature: T, positive.

    Returns:
        The loss, fp32 [], and dz, fp32 [2N, D]: rows 0 to N - 1 for z0, the others for z1.
    """
    N, D = z0.shape
    tiles = _tiles(z0)
    loss = torch.empty((), dtype=torch.float32, device=z0.device)
    dz = torch.empty(2 * N, D, dtype=torch.float32, device=z0.device)
    with on_device_of(z0):
        rows = _row_statistics(z0, z1, temperature)
        _nt_xent_grad_kernel[(triton.cdiv(N, tiles.rows), 2)](
            z0,
            z1,
            *rows,
            loss,
            dz,
            N,
            D,
            *z0.stride(),
            *z1.stride(),
            1.0 / (temperature * math.log(2.0)),
            1.0 / (2 * N * temperature),
            BLOCK_M=tiles.rows,
            BLOCK_N=tiles.rows,
            BLOCK_K=tiles.depth,
            BLOCK_D=tiles.width,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )
    return loss, dz
