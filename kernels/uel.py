"""The instance softmax with a spreading term in Triton: loss and gradient in three launches.

Columns are constants, so a program needs nothing but the rows that it owns. It walks over the
columns three times: for the most similar negative and the sum of the others, for the spreading
term, and for the gradient. Let "top" be the most similar negative of a row, p the row's softmax, q
the softmax without top, and t the sum of p / (1 - p) over the negatives but top. By its logits, the
gradient of the row's loss is

    top            p_top (2 - t)
    the positive   -(1 - p_pos) - p_pos t - p_top q_pos
    a negative k   p_k (2 - t + p_k / (1 - p_k)) - p_top q_k

Of all p only p_top can be near 1, where 1 - p cancels; therefore it is computed on its own.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Compilations, Tiling, blocks, cdiv, meta_rows, on_device_of, padded, workspace
from ._rows import (
    FP16_BITS,
    LN2,
    MAX_EXPONENT,
    _mean_kernel,
    add_weighted,
    load_own,
    load_raw,
    load_unit,
    log1p,
    matrix,
    negative_logits,
    normalize,
    scaled_memory,
    select_side,
    sigmoid,
    softplus,
    store_raw_grad,
    unscaled,
)


@triton.jit
def _uel_kernel(
    z0,  # Matrix [N, D]
    z1,  # Matrix [N, D]
    rows,  # ScaledRows
    pos2_ptr,  # [N]
    partial_ptr,  # [2 cdiv(N, BLOCK_M)]
    dz_ptr,  # [2N, D] or None
    grad_scale,
    blocks,  # Blocks
):
    """Computes losses, and gradients where wanted, of the rows of one view that a program owns."""
    BLOCK_M: tl.constexpr = blocks.BLOCK_M
    BLOCK_N: tl.constexpr = blocks.BLOCK_N
    BLOCK_D: tl.constexpr = blocks.BLOCK_D
    N = z0.N
    n = 2 * N
    side = tl.program_id(1)
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < N
    own_first = side * N + tl.program_id(0) * BLOCK_M
    own = load_own(rows, rows.u_ptr, own_first, side * N + N, blocks)
    pos2 = tl.load(pos2_ptr + offs_m, mask=mask_m, other=0.0)

    top2 = tl.zeros([BLOCK_M], tl.float32) - float("inf")
    top = tl.zeros([BLOCK_M], tl.int32) - 1
    # the sum is over all columns but top; the positive's part comes last
    shift, others = pos2, tl.zeros([BLOCK_M], tl.float32)
    for first in range(0, n, BLOCK_N):
        s2, _, _ = negative_logits(rows, own, rows.u_ptr, first, n, N, blocks)
        offs_n = first + tl.arange(0, BLOCK_N)[None, :]
        tile_top2, index = tl.max(s2, axis=1, return_indices=True)
        index += first
        s2 = tl.where(offs_n == index[:, None], float("-inf"), s2)
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
    p_top, p_rest = sigmoid(top_logit), sigmoid(-top_logit)
    spread = softplus(top_logit)
    t = tl.zeros([BLOCK_M], tl.float32)
    for first in range(0, n, BLOCK_N):
        s2, _, _ = negative_logits(rows, own, rows.u_ptr, first, n, N, blocks)
        offs_n = first + tl.arange(0, BLOCK_N)[None, :]
        q = tl.exp2(s2 - shift[:, None]) / rest[:, None]
        p = tl.where(offs_n == top[:, None], 0.0, q * p_rest[:, None])
        spread -= tl.sum(log1p(-p), axis=1)
        t += tl.sum(p / (1.0 - p), axis=1)
    loss = tl.sum(tl.where(mask_m, softplus(margin) + spread, 0.0))
    tl.store(partial_ptr + side * tl.num_programs(0) + tl.program_id(0), loss)

    if dz_ptr is not None:
        # no weight of a row is above 4 p_top
        exponent = -tl.ceil(tl.log2(p_top)) + (FP16_BITS - 2.0)
        exponent = tl.minimum(exponent, MAX_EXPONENT)
        up = tl.exp2(exponent + (FP16_BITS - 1))
        du = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for first in range(0, n, BLOCK_N):
            s2, columns, scale = negative_logits(rows, own, rows.u_ptr, first, n, N, blocks)
            offs_n = first + tl.arange(0, BLOCK_N)[None, :]
            q = tl.exp2(s2 - shift[:, None]) / rest[:, None]
            p = q * p_rest[:, None]
            weights = p * ((2.0 - t)[:, None] + p / (1.0 - p)) - p_top[:, None] * q
            is_top = offs_n == top[:, None]
            weights = tl.where(is_top, (p_top * (2.0 - t))[:, None], weights)
            weights *= up[:, None] * scale[None, :]
            du = add_weighted(du, weights, columns, rows)
        du = unscaled(du, exponent)

        dpositive = sigmoid(margin) + tl.exp2(pos2 - shift) / rest * (p_rest * t + p_top)
        other = select_side(z0, z1, 1 - side)
        du -= dpositive[:, None] * load_unit(other, offs_m, mask_m, BLOCK_D)
        dz_ptr += (side * N).to(tl.int64) * z0.D
        raw, norm = load_raw(select_side(z0, z1, side), offs_m, mask_m, BLOCK_D)
        store_raw_grad(dz_ptr, du * grad_scale, raw, norm, offs_m, mask_m, z0.D, BLOCK_D)


def tiling(D: int, *, exact: bool) -> Tiling:
    """The tiling for rows of D <= 256 elements, which are kept in two parts where `exact`."""
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
        The loss, fp32 [], and dz, fp32 [2N, D]: rows 0 to N - 1 are for z0, the others for z1. dz
        has no elements where it is not wanted.
    """
    N, D = z0.shape
    exact = exact and z0.dtype == torch.float32
    tiles = config or tiling(D, exact=exact)
    own_blocks = cdiv(N, tiles.rows)
    loss = torch.empty((), dtype=torch.float32, device=z0.device)
    dz = torch.empty((2 * N, D) if grad else 0, dtype=torch.float32, device=z0.device)
    pos2, partial = workspace(z0.device, N, 2 * own_blocks)
    size = 2 * N + max(tiles.rows, tiles.columns)
    rows = scaled_memory(size, D, temperature, exact=exact, device=z0.device)
    with on_device_of(z0):
        normalize(z0, z1, rows, pos2=pos2)
        _uel_kernel[(own_blocks, 2)](
            matrix(z0),
            matrix(z1),
            rows,
            pos2,
            partial,
            dz if grad else None,
            1.0 / (2 * N * temperature),
            **blocks(tiles, D),
        )
        _mean_kernel[(1,)](partial, loss, 2 * own_blocks, 2 * N)
    return loss, dz


def compilations() -> Compilations:
    """Calls that compile every kernel of this file at every default tiling."""
    for D, exact in ((64, False), (128, False), (128, True), (256, False)):
        z = meta_rows(D, exact=exact)
        yield f"D={D}{exact * ' exact'}", partial(uel, z, z, 0.5, True, exact)
