"""The instance softmax with a spreading term in Triton: loss and gradient in three launches.

Columns are constants, so a program needs nothing but the rows that it owns: it walks over the
columns once for the most similar negative and the sum of the others, once for the spreading term,
and once for the gradient. With "top" the most similar negative of a row, p its softmax, q the
softmax without top and t = sum of p / (1 - p) over the negatives but top, the gradient of a row's
loss is

    top            p_top (2 - t)
    the positive   -(1 - p_pos) - p_pos t - p_top q_pos
    a negative k   p_k (2 - t + p_k / (1 - p_k)) - p_top q_k

by its logits. Of all p only p_top can be near 1, where 1 - p cancels: it has its own sum.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Tiling, blocks, on_device_of, padded
from ._rows import (
    FP16_BITS,
    LN2,
    MAX_EXPONENT,
    _mean_kernel,
    base2_scale,
    load_raw,
    load_tile,
    log1p,
    negative_logits,
    scaled_rows,
    select_side,
    store_raw_grad,
    unit,
)


@triton.jit
def _sigmoid(x):
    """1 / (1 + exp(-x)) and 1 / (1 + exp(x)), each as exact as the other."""
    ratio = tl.exp(-tl.abs(x))
    large, small = 1.0 / (1.0 + ratio), ratio / (1.0 + ratio)
    return tl.where(x > 0, large, small), tl.where(x > 0, small, large)


@triton.jit
def _softplus(x):
    """log(1 + exp(x))."""
    return tl.maximum(x, 0.0) + log1p(tl.exp(-tl.abs(x)))


@triton.jit
def _uel_kernel(
    z0_ptr,  # [N, D]
    z1_ptr,  # [N, D]
    u_ptr,  # [padded, BLOCK_D]
    u_low_ptr,  # [padded, BLOCK_D] or None
    scale_ptr,  # [padded]
    pos2_ptr,  # [N]
    partial_ptr,  # [2 cdiv(N, BLOCK_M)]
    dz_ptr,  # [2N, D] or None
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
    """Losses, and gradients where wanted, of the rows of one view that a program owns."""
    side = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_own = rows < N
    own_first, own_end = side * N + tl.program_id(0) * BLOCK_M, side * N + N
    own_scale = tl.load(scale_ptr + own_first + tl.arange(0, BLOCK_M)) * scale2
    own, own_low = 0, 0
    if BLOCK_K == BLOCK_D:
        own, own_low = load_tile(u_ptr, u_low_ptr, own_first, BLOCK_M, BLOCK_D, False)
    pos2 = tl.load(pos2_ptr + rows, mask=mask_own, other=0.0)

    top2 = tl.zeros([BLOCK_M], tl.float32) - float("inf")
    top = tl.zeros([BLOCK_M], tl.int32) - 1
    # the sum is over all columns but top; the positive's part comes last
    shift, others = pos2, tl.zeros([BLOCK_M], tl.float32)
    for first in range(0, 2 * N, BLOCK_N):
        s2, _, _, _ = negative_logits(
            own,
            own_low,
            u_ptr,
            u_ptr,
            u_low_ptr,
            scale_ptr,
            own_scale,
            own_first,
            own_end,
            first,
            2 * N,
            N,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            BLOCK_D,
            False,
        )
        columns = first + tl.arange(0, BLOCK_N)[None, :]
        tile_top2, index = tl.max(s2, axis=1, return_indices=True)
        index += first
        s2 = tl.where(columns == index[:, None], float("-inf"), s2)
        lesser = tl.minimum(top2, tile_top2)
        top = tl.where(tile_top2 > top2, index, top)
        top2 = tl.maximum(top2, tile_top2)
        new_shift = tl.maximum(shift, tl.maximum(lesser, tl.max(s2, axis=1)))
        others = others * tl.exp2(shift - new_shift) + tl.exp2(lesser - new_shift)
        others += tl.sum(tl.exp2(s2 - new_shift[:, None]), axis=1)
        shift = new_shift

    rest = others + tl.exp2(pos2 - shift)
    highest = tl.maximum(top2, shift)
    lse_neg2 = highest + tl.log2(tl.exp2(top2 - highest) + others * tl.exp2(shift - highest))
    margin = (lse_neg2 - pos2) * LN2
    top_logit = (top2 - shift - tl.log2(rest)) * LN2
    p_top, p_rest = _sigmoid(top_logit)
    spread = _softplus(top_logit)
    t = tl.zeros([BLOCK_M], tl.float32)
    for first in range(0, 2 * N, BLOCK_N):
        s2, _, _, _ = negative_logits(
            own,
            own_low,
            u_ptr,
            u_ptr,
            u_low_ptr,
            scale_ptr,
            own_scale,
            own_first,
            own_end,
            first,
            2 * N,
            N,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            BLOCK_D,
            False,
        )
        columns = first + tl.arange(0, BLOCK_N)[None, :]
        q = tl.exp2(s2 - shift[:, None]) / rest[:, None]
        p = tl.where(columns == top[:, None], 0.0, q * p_rest[:, None])
        spread -= tl.sum(log1p(-p), axis=1)
        t += tl.sum(p / (1.0 - p), axis=1)
    loss = tl.sum(tl.where(mask_own, _softplus(margin) + spread, 0.0))
    tl.store(partial_ptr + side * tl.num_programs(0) + tl.program_id(0), loss)

    if dz_ptr is not None:
        # no weight of a row is above 4 p_top
        exponent = -tl.ceil(tl.log2(p_top)) + (FP16_BITS - 2.0)
        up = tl.exp2(tl.minimum(exponent, MAX_EXPONENT) + (FP16_BITS - 1))
        du = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for first in range(0, 2 * N, BLOCK_N):
            s2, tile, tile_low, scale = negative_logits(
                own,
                own_low,
                u_ptr,
                u_ptr,
                u_low_ptr,
                scale_ptr,
                own_scale,
                own_first,
                own_end,
                first,
                2 * N,
                N,
                BLOCK_M,
                BLOCK_N,
                BLOCK_K,
                BLOCK_D,
                False,
            )
            columns = first + tl.arange(0, BLOCK_N)[None, :]
            q = tl.exp2(s2 - shift[:, None]) / rest[:, None]
            p = q * p_rest[:, None]
            weights = p * ((2.0 - t)[:, None] + p / (1.0 - p)) - p_top[:, None] * q
            is_top = columns == top[:, None]
            weights = tl.where(is_top, (p_top * (2.0 - t))[:, None], weights)
            weights *= up[:, None] * scale[None, :]
            high = weights.to(tl.float16)
            du = tl.dot(high, tile, du)
            if u_low_ptr is not None:
                du = tl.dot((weights - high.to(tl.float32)).to(tl.float16), tile, du)
                du = tl.dot(high, tile_low, du)
        du *= (1.0 / up)[:, None]

        p_negatives, _ = _sigmoid(margin)
        dpositive = p_negatives + tl.exp2(pos2 - shift) / rest * (p_rest * t + p_top)
        z_ptr, stride_n, stride_d, _ = select_side(
            z0_ptr, z1_ptr, stride0_n, stride0_d, stride1_n, stride1_d, N, N, 1 - side
        )
        other, other_norm = load_raw(z_ptr, stride_n, stride_d, rows, mask_own, D, BLOCK_D)
        du -= dpositive[:, None] * unit(other, other_norm)
        z_ptr, stride_n, stride_d, _ = select_side(
            z0_ptr, z1_ptr, stride0_n, stride0_d, stride1_n, stride1_d, N, N, side
        )
        z, norm = load_raw(z_ptr, stride_n, stride_d, rows, mask_own, D, BLOCK_D)
        dz_ptr += (side * N).to(tl.int64) * D
        store_raw_grad(dz_ptr, du * grad_scale, z, norm, rows, N, D, BLOCK_D)


def tiling(D: int, *, exact: bool) -> Tiling:
    """Tiling for rows of D <= 256 elements, kept in two parts where `exact`."""
    width = padded(D)
    rows = min(64, 8192 // width) // (1 + exact)
    return Tiling(rows, min(32, rows), min(64 if exact else 128, width), 8, 2)


def uel(
    z0: Tensor,  # [N, D]
    z1: Tensor,  # [N, D]
    temperature: float,
    grad: bool,
    exact: bool = False,
    config: Tiling | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean instance softmax with the spreading term of raw projections, and its gradient.

    Args:
        z0: First view [N, D], fp32, fp16 or bf16, any strides.
        z1: Second view, of the same shape, dtype and device.
        temperature: T, positive.
        grad: Whether the gradient is wanted.
        exact: Compute with fp32 rows to 22 bits instead of 11.
        config: A tiling other than the default.

    Returns:
        The loss, fp32 [], and dz, fp32 [2N, D], rows 0 to N - 1 for z0; [0] where not wanted.
    """
    N, D = z0.shape
    exact = exact and z0.dtype == torch.float32
    tiles = config or tiling(D, exact=exact)
    own_blocks = triton.cdiv(N, tiles.rows)
    partial = torch.empty(2 * own_blocks, dtype=torch.float32, device=z0.device)
    loss = torch.empty((), dtype=torch.float32, device=z0.device)
    dz = torch.empty((2 * N, D) if grad else 0, dtype=torch.float32, device=z0.device)
    with on_device_of(z0):
        padding = max(tiles.rows, tiles.columns)
        u, u_low, scale, pos2, _ = scaled_rows(z0, z1, temperature, exact=exact, padding=padding)
        _uel_kernel[(own_blocks, 2)](
            z0,
            z1,
            u,
            u_low,
            scale,
            pos2,
            partial,
            dz if grad else None,
            N,
            D,
            *z0.stride(),
            *z1.stride(),
            base2_scale(temperature),
            1.0 / (2 * N * temperature),
            **blocks(tiles, D),
        )
        _mean_kernel[(1,)](partial, loss, 2 * own_blocks, 2 * N)
    return loss, dz
