"""Softmax losses over similarities of rows, one positive a row: NT-Xent, its tied form, InfoNCE.

With unit rows u, s_ij = u_i . u_j / T, the positive pi(i) of row i, and neg_i the sum of exp(s_ij)
over the columns j of row i but itself and pi(i):

    loss_i = log(neg_i + exp(s_i,pi)) - s_i,pi = softplus(log neg_i - s_i,pi)
    d loss / d u_i = (1 / count T) (sum_j (P_ij + P_ji) u_j - (q_i + q_pi) u_pi),   j negatives
    P_ij = exp(s_ij) / (neg_i + exp(s_i,pi)),   q_i = neg_i / (neg_i + exp(s_i,pi))

in which P and q of what is no row of the loss, as a key of one-way InfoNCE, are 0. Only the
negatives go through the tensor cores. The positive is computed in fp32 and enters with the weight
q, never as P - 1: that difference has no correct digit left where the loss is small.

The operands stand below one another, x above y, and are told apart by the ranges that rows and
columns are taken of:

                    rows          columns       count     pi(i)
    NT-Xent         x and y       x and y       2N        i +- N
    tied            x             x, twice      N         i
    InfoNCE         x             y             N         i + N
    two-way         x, then y     y, then x     2N        i +- N

In three launches and O(n D) memory, and with the same bits at every run:

1. `_normalize_kernel` writes the rows for the tensor cores and the positives' logits.
2. `_negatives_kernel` sums exp(s) over tiles. A tile serves its rows and, where their sums are
   wanted too, its columns; of a symmetric matrix only the half is computed, n^2 D FLOPs for n rows.
   Tiles are dealt out in advance, and every program adds to sums of its own. Once all have arrived,
   the programs add these up in a fixed order. No shift is needed: |s| <= 1 / T. Below T = 0.023,
   where that is too much for fp32, `_online_kernel` keeps a running maximum: it owns rows.
3. `_gradient_kernel` owns rows, computes their similarities again and multiplies the weights
   P_ij + P_ji with the rows: 4 n^2 D FLOPs. The weights of a row are scaled by a power of two for
   fp16, so that a row with a tiny gradient keeps its digits: by one that follows the largest so far
   in the exact mode and below T = 0.023, by a bound known beforehand otherwise.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ._launch import INTERPRETED, Tiling, blocks, on_device_of, padded, resident_programs
from ._rows import (
    FP16_BITS,
    LN2,
    MAX_EXPONENT,
    _mean_kernel,
    base2_scale,
    load_raw,
    load_tile,
    log1p,
    mask_logits,
    mean,
    negative_logits,
    partners_of,
    products,
    scaled_rows,
    select_side,
    store_raw_grad,
    take_from_named,
    unit,
    wait_for_all,
)

# from here up exp(1 / T) and exp(-1 / T) and sums of them are normal fp32 numbers
UNSHIFTED_TEMPERATURE = 0.023
# rows whose sums a program adds up at a time, and the programs whose sums it takes at a time
SUM_ROWS = 64
_SUM_SLOTS = tl.constexpr(16)


@triton.jit
def _store_statistics(
    neg2,  # [BLOCK] log2 of the negatives' sum
    rows,
    pos2_ptr,
    stat_ptr,
    neg2_ptr,
    q_ptr,
    losses_ptr,
    partial_ptr,
    lowest_ptr,
    block,
    N,
    total,
    counted,
    scale2,
    ONLINE: tl.constexpr,
    TIED: tl.constexpr,
):
    """What the gradient needs of rows, their loss, and the lowest of the logarithms lse2."""
    is_row = rows < counted
    pos2 = tl.load(pos2_ptr + tl.where(rows < N, rows, rows - N), mask=is_row, other=0.0)
    if TIED:
        neg2 += 1.0  # every negative is there in both views
    margin = (neg2 - pos2) * LN2  # log neg_i - s_i,pi; -inf without negatives
    ratio = tl.exp(-tl.abs(margin))
    loss = tl.maximum(margin, 0.0) + log1p(ratio)
    lse2 = pos2 + loss / LN2
    # what is no row has no denominator, and so no share in the gradient
    stat = tl.where(is_row, lse2, float("inf"))
    if not ONLINE:
        stat = tl.exp2(-stat)
    q = tl.where(margin > 0, 1.0, ratio) / (1.0 + ratio)
    mask = rows < total
    tl.store(stat_ptr + rows, stat, mask=mask)
    tl.store(neg2_ptr + rows, neg2, mask=mask)
    tl.store(q_ptr + rows, tl.where(is_row, q, 0.0), mask=mask)
    if losses_ptr is not None:
        tl.store(losses_ptr + rows, loss, mask=is_row)
    tl.store(partial_ptr + block, tl.sum(tl.where(is_row, loss, 0.0)))
    # positive numbers are ordered as their bits are
    bits = (lse2 + scale2 + 1.0).to(tl.int32, bitcast=True)
    tl.atomic_min(lowest_ptr, tl.min(tl.where(is_row, bits, 0x7F7FFFFF)))


@triton.jit
def _add_up(
    sums_ptr,
    slots,
    pos2_ptr,
    stat_ptr,
    neg2_ptr,
    q_ptr,
    losses_ptr,
    partial_ptr,
    lowest_ptr,
    N,
    total,
    counted,
    scale2,
    TIED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Adds up the programs' sums and stores the statistics of some of the rows."""
    for block in range(tl.program_id(0), tl.cdiv(total, ROWS), tl.num_programs(0)):
        rows = block * ROWS + tl.arange(0, ROWS)
        neg = tl.zeros([ROWS], tl.float32)
        for first in range(0, slots, _SUM_SLOTS):
            slot = first + tl.arange(0, _SUM_SLOTS)
            offsets = slot.to(tl.int64)[:, None] * total + rows[None, :]
            mask = (slot < slots)[:, None] & (rows < total)[None, :]
            neg += tl.sum(tl.load(sums_ptr + offsets, mask=mask, other=0.0), axis=0)
        _store_statistics(
            tl.log2(neg),
            rows,
            pos2_ptr,
            stat_ptr,
            neg2_ptr,
            q_ptr,
            losses_ptr,
            partial_ptr,
            lowest_ptr,
            block,
            N,
            total,
            counted,
            scale2,
            False,
            TIED,
        )


@triton.jit
def _negatives_kernel(
    u_ptr,  # [padded, BLOCK_D]
    u_low_ptr,  # [padded, BLOCK_D] or None
    u_own,  # u_ptr, or a descriptor of tiles of BLOCK_M rows
    u_columns,  # u_ptr, or a descriptor of tiles of BLOCK_N rows
    scale_ptr,  # [padded]
    sums_ptr,  # [programs, total], zero
    positive_ptr,  # [N] or None
    pos2_ptr,  # [N]
    stat_ptr,  # [total]
    neg2_ptr,  # [total]
    q_ptr,  # [total]
    losses_ptr,  # [counted] or None
    partial_ptr,  # [cdiv(total, ROWS)]
    lowest_ptr,  # [2]
    N,
    total,
    counted,
    row_end,
    column_first,
    scale2,
    SYMMETRIC: tl.constexpr,
    COLUMNS: tl.constexpr,
    TIED: tl.constexpr,
    COOPERATIVE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """Sums of exp(s) over negatives, by row and by column, in slots of the programs' own.

    Tiles are numbered along strips of rows. Of a symmetric matrix a strip has the blocks from its
    diagonal one to the middle of the others, going around: every pair of blocks once, and as many
    in all strips, but that the last of an even number belongs to the upper half of them. A block is
    as wide as high, and has PARTS tiles.
    """
    PARTS: tl.constexpr = BLOCK_M // BLOCK_N
    tl.static_assert(not SYMMETRIC or BLOCK_M % BLOCK_N == 0, "rows must be a multiple of columns")
    program = tl.program_id(0)
    sums_ptr += program.to(tl.int64) * total
    blocks = tl.cdiv(row_end, BLOCK_M)
    half = (blocks // 2 + 1) * PARTS
    strip = half if SYMMETRIC else tl.cdiv(total - column_first, BLOCK_N)
    tiles = blocks.to(tl.int64) * strip
    begin = tiles * program // tl.num_programs(0)
    end = tiles * (program + 1) // tl.num_programs(0)

    for number in range(begin // strip, tl.cdiv(end, strip)):
        block = tl.cast(number, tl.int32)
        start = tl.maximum(begin - number * strip, 0).to(tl.int32)
        length = strip
        if SYMMETRIC:
            length -= PARTS * ((blocks % 2 == 0) & (2 * block >= blocks)).to(tl.int32)
        stop = tl.minimum(end - number * strip, length).to(tl.int32)
        own_first = block * BLOCK_M
        own, own_low = 0, 0
        if BLOCK_K == BLOCK_D:
            own, own_low = load_tile(u_own, u_low_ptr, own_first, BLOCK_M, BLOCK_D, DESCRIPTORS)
        offs_own = own_first + tl.arange(0, BLOCK_M)
        own_scale = tl.load(scale_ptr + offs_own) * scale2
        # added up over the columns at the end of the strip, where that costs next to nothing; the
        # columns' own sums, of every tile, are along the axis that a warp has most of
        own_sums = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for step in range(start, stop):
            column = step
            if SYMMETRIC:
                column += block * PARTS
                column = tl.where(column < blocks * PARTS, column, column - blocks * PARTS)
            first = column_first + column * BLOCK_N
            tile, tile_low = 0, 0
            if BLOCK_K == BLOCK_D:
                tile, tile_low = load_tile(
                    u_columns, u_low_ptr, first, BLOCK_N, BLOCK_D, DESCRIPTORS
                )
            dots = products(
                tile,
                tile_low,
                own,
                own_low,
                u_ptr,
                u_low_ptr,
                first,
                own_first,
                BLOCK_N,
                BLOCK_M,
                BLOCK_K,
                BLOCK_D,
            )
            offs_n = first + tl.arange(0, BLOCK_N)
            s2 = dots * tl.load(scale_ptr + offs_n)[:, None] * own_scale[None, :]
            s2 = mask_logits(
                s2, first, total, own_first, row_end, N, BLOCK_N, BLOCK_M, positive_ptr
            )
            exp = tl.exp2(s2)
            own_sums += exp
            if COLUMNS:
                # a diagonal block's rows are its columns
                mask = (offs_n < total) & ((step >= PARTS) | (not SYMMETRIC))
                tl.atomic_add(sums_ptr + offs_n, tl.sum(exp, axis=1), mask=mask, sem="relaxed")
        # what comes from two strips is added in their order
        tl.debug_barrier()
        mask = offs_own < row_end
        tl.atomic_add(sums_ptr + offs_own, tl.sum(own_sums, axis=0), mask=mask, sem="relaxed")
        tl.debug_barrier()

    if COOPERATIVE:
        wait_for_all(lowest_ptr + 1)
        _add_up(
            sums_ptr - program.to(tl.int64) * total,
            tl.num_programs(0),
            pos2_ptr,
            stat_ptr,
            neg2_ptr,
            q_ptr,
            losses_ptr,
            partial_ptr,
            lowest_ptr,
            N,
            total,
            counted,
            scale2,
            TIED,
            ROWS,
        )


@triton.jit
def _add_up_kernel(
    sums_ptr,  # [slots, total]
    slots,
    pos2_ptr,  # [N]
    stat_ptr,  # [total]
    neg2_ptr,  # [total]
    q_ptr,  # [total]
    losses_ptr,  # [counted] or None
    partial_ptr,  # [cdiv(total, ROWS)]
    lowest_ptr,  # [2]
    N,
    total,
    counted,
    scale2,
    TIED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The end of `_negatives_kernel` where its programs do not run at once: interpreted."""
    _add_up(
        sums_ptr,
        slots,
        pos2_ptr,
        stat_ptr,
        neg2_ptr,
        q_ptr,
        losses_ptr,
        partial_ptr,
        lowest_ptr,
        N,
        total,
        counted,
        scale2,
        TIED,
        ROWS,
    )


@triton.jit
def _online_kernel(
    u_ptr,  # [padded, BLOCK_D]
    u_low_ptr,  # [padded, BLOCK_D] or None
    scale_ptr,  # [padded]
    positive_ptr,  # [N] or None
    pos2_ptr,  # [N]
    stat_ptr,  # [total]
    neg2_ptr,  # [total]
    q_ptr,  # [total]
    losses_ptr,  # [counted] or None
    partial_ptr,  # [programs]
    lowest_ptr,  # [2]
    N,
    total,
    counted,
    scale2,
    STACKED: tl.constexpr,
    TIED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Statistics of the rows that a program owns, with a running maximum."""
    own_first = tl.program_id(0) * BLOCK_M
    first_column, end = 0, total
    own_end = total
    if not STACKED:
        # a block with rows of x has no more than these; y's rows begin a block of their own
        x_blocks = tl.cdiv(N, BLOCK_M)
        is_x = tl.program_id(0) < x_blocks
        own_first = tl.where(is_x, own_first, N + (tl.program_id(0) - x_blocks) * BLOCK_M)
        own_end = tl.where(is_x, N, total)
        first_column = tl.where(is_x, N, 0)
        end = tl.where(is_x, total, N)
    offs_own = own_first + tl.arange(0, BLOCK_M)
    own_scale = tl.load(scale_ptr + offs_own) * scale2
    own, own_low = 0, 0
    if BLOCK_K == BLOCK_D:
        own, own_low = load_tile(u_ptr, u_low_ptr, own_first, BLOCK_M, BLOCK_D, False)
    # no logit is below -scale2, but by a rounding
    shift = tl.zeros([BLOCK_M], tl.float32) - scale2
    neg = tl.zeros([BLOCK_M], tl.float32)
    for first in range(first_column, end, BLOCK_N):
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
            end,
            N,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            BLOCK_D,
            False,
            positive_ptr,
        )
        new_shift = tl.maximum(shift, tl.max(s2, axis=1))
        neg = neg * tl.exp2(shift - new_shift) + tl.sum(tl.exp2(s2 - new_shift[:, None]), axis=1)
        shift = new_shift
    rows = tl.where(offs_own < own_end, offs_own, total)
    _store_statistics(
        shift + tl.log2(neg),
        rows,
        pos2_ptr,
        stat_ptr,
        neg2_ptr,
        q_ptr,
        losses_ptr,
        partial_ptr,
        lowest_ptr,
        tl.program_id(0),
        N,
        total,
        counted,
        scale2,
        True,
        TIED,
    )


@triton.jit
def _gradient_kernel(
    x_ptr,  # [N, D]
    y_ptr,  # [M, D], or x
    u_ptr,  # [padded, BLOCK_D]
    u_low_ptr,  # [padded, BLOCK_D] or None
    u_own,  # u_ptr, or a descriptor of tiles of BLOCK_M rows
    u_columns,  # u_ptr, or a descriptor of tiles of BLOCK_N rows
    scale_ptr,  # [padded]
    stat_ptr,  # [total]
    neg2_ptr,  # [total]
    q_ptr,  # [total]
    positive_ptr,  # [N] or None
    weight_ptr,  # [N], from -1 to 1, or None
    partial_ptr,  # [partials]
    lowest_ptr,  # [2]
    loss_ptr,  # []
    dz_ptr,  # [rows of the wanted sides, D]
    du_ptr,  # [splits, rows of all blocks, BLOCK_D] or None
    arrived_ptr,  # [blocks], zero, or None
    N,
    M,
    D,
    stride_xn,
    stride_xd,
    stride_yn,
    stride_yd,
    partials,
    counted,
    first_side,
    scale2,
    grad_scale,
    STACKED: tl.constexpr,
    TIED: tl.constexpr,
    ONLINE: tl.constexpr,
    RUNNING: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """Gradients of the raw rows that a program owns, rows of one side.

    A row of x counts in them as much as its weight says, in the one-way loss that has weights.
    Where there are too few rows for the GPU, several programs own them together and walk over a
    split of the columns each. The last to arrive adds up what all have found, in a fixed order.
    """
    side = first_side + tl.program_id(1)
    z_ptr, stride_n, stride_d, size = select_side(
        x_ptr, y_ptr, stride_xn, stride_xd, stride_yn, stride_yd, N, M, side
    )
    # the sides share a grid, and the shorter one has no rows for the last of it
    if tl.program_id(0) * BLOCK_M >= size:
        return
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    base = side * N
    own_first = base + tl.program_id(0) * BLOCK_M
    own_end = base + size
    if TIED:
        first_column, end = 0, N
    elif STACKED:
        first_column, end = 0, 2 * N
    else:
        first_column = tl.where(side == 0, N, 0)
        end = tl.where(side == 0, N + M, N)

    mask_own = rows < size
    own_scale = tl.load(scale_ptr + base + rows, mask=mask_own, other=0.0) * scale2
    own_stat = tl.load(stat_ptr + base + rows, mask=mask_own, other=float("inf") if ONLINE else 0.0)
    own_weight = tl.zeros([BLOCK_M], tl.float32)
    if weight_ptr is not None:
        own_weight = tl.load(weight_ptr + base + rows, mask=base + rows < N, other=1.0)
    # the columns' scale is below 2 ** (1 - FP16_BITS), and goes into the weights as well
    if RUNNING:
        exponent = tl.zeros([BLOCK_M], tl.float32) + MAX_EXPONENT
    else:
        # P_ij <= neg_i / L_i and P_ji <= neg_i / L_j: neg_i has exp(s_ij) in it; L >= 2 ** lowest2
        lowest2 = tl.load(lowest_ptr).to(tl.float32, bitcast=True) - scale2 - 1.0
        neg2 = tl.load(neg2_ptr + base + rows, mask=mask_own, other=0.0)
        neg2 = tl.maximum(neg2, -64.0)  # without negatives it is -inf
        exponent = -tl.ceil(tl.minimum(neg2 - lowest2, 0.0)) + (FP16_BITS - 1.0)
        exponent = tl.minimum(exponent, MAX_EXPONENT)
    up = tl.exp2(exponent + (FP16_BITS - 1))
    own_inverse = own_stat * up

    own, own_low = 0, 0
    if BLOCK_K == BLOCK_D:
        own, own_low = load_tile(u_own, u_low_ptr, own_first, BLOCK_M, BLOCK_D, DESCRIPTORS)
    du = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    length = tl.cdiv(tl.cdiv(end - first_column, BLOCK_N), tl.num_programs(2)) * BLOCK_N
    start = first_column + tl.program_id(2) * length
    for first in range(start, tl.minimum(start + length, end), BLOCK_N):
        s2, tile, tile_low, scale = negative_logits(
            own,
            own_low,
            u_columns,
            u_ptr,
            u_low_ptr,
            scale_ptr,
            own_scale,
            own_first,
            own_end,
            first,
            end,
            N,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            BLOCK_D,
            DESCRIPTORS,
            positive_ptr,
        )
        offs_n = first + tl.arange(0, BLOCK_N)
        stat = tl.load(stat_ptr + offs_n, mask=offs_n < end, other=float("inf") if ONLINE else 0.0)
        if RUNNING:
            if ONLINE:
                weights = tl.exp2(s2 - own_stat[:, None]) + tl.exp2(s2 - stat[None, :])
            else:
                weights = tl.exp2(s2) * (own_stat[:, None] + stat[None, :])
            weights *= (scale * 2.0 ** (FP16_BITS - 1))[None, :]
            if weight_ptr is not None:
                weights *= own_weight[:, None]
                weights *= tl.load(weight_ptr + offs_n, mask=offs_n < N, other=1.0)[None, :]
            top = tl.max(weights if weight_ptr is None else tl.abs(weights), axis=1)
            top = tl.maximum(top, 2.0 ** (FP16_BITS - MAX_EXPONENT))
            new_exponent = tl.minimum(exponent, -tl.ceil(tl.log2(top)) + FP16_BITS)
            weights *= tl.exp2(new_exponent)[:, None]
            du *= tl.exp2(new_exponent - exponent)[:, None]
            exponent = new_exponent
        else:
            both = own_inverse[:, None] * scale[None, :] + up[:, None] * (stat * scale)[None, :]
            weights = tl.exp2(s2) * both
            if weight_ptr is not None:
                weights *= own_weight[:, None]
                weights *= tl.load(weight_ptr + offs_n, mask=offs_n < N, other=1.0)[None, :]
        high = weights.to(tl.float16)
        du = tl.dot(high, tile, du)
        if u_low_ptr is not None:
            du = tl.dot((weights - high.to(tl.float32)).to(tl.float16), tile, du)
            du = tl.dot(high, tile_low, du)
    du *= tl.exp2(-exponent - (FP16_BITS - 1.0))[:, None]

    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0) & (tl.program_id(2) == 0):
        tl.store(loss_ptr, mean(partial_ptr, partials, counted))
    if du_ptr is not None:
        block = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        offsets = (block * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None] * BLOCK_D
        offsets += tl.arange(0, BLOCK_D)[None, :]
        size_of_split = (tl.num_programs(0) * tl.num_programs(1) * BLOCK_M).to(tl.int64) * BLOCK_D
        tl.store(du_ptr + tl.program_id(2) * size_of_split + offsets, du)
        tl.debug_barrier()
        if tl.atomic_add(arrived_ptr + block, 1, sem="acq_rel") < tl.num_programs(2) - 1:
            return
        tl.debug_barrier()
        du = tl.load(du_ptr + offsets)
        for split in range(1, tl.num_programs(2)):
            du += tl.load(du_ptr + split * size_of_split + offsets)

    z, norm = load_raw(z_ptr, stride_n, stride_d, rows, mask_own, D, BLOCK_D)
    q = tl.load(q_ptr + base + rows, mask=mask_own, other=0.0)
    if TIED:
        du -= q[:, None] * unit(z, norm)
    elif positive_ptr is not None:
        if side == 0:
            if weight_ptr is not None:
                q *= own_weight
            partners, exist = partners_of(rows, positive_ptr, mask_own, M)
            other, other_norm = load_raw(y_ptr, stride_yn, stride_yd, partners, exist, D, BLOCK_D)
            du -= q[:, None] * unit(other, other_norm)
        else:
            du = take_from_named(
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
                BLOCK_D,
            )
    else:
        paired = rows < N
        q += tl.load(q_ptr + N - base + rows, mask=paired, other=0.0)
        if weight_ptr is not None:
            q *= tl.load(weight_ptr + rows, mask=paired, other=0.0)
        other_ptr, stride_n, stride_d, _ = select_side(
            x_ptr, y_ptr, stride_xn, stride_xd, stride_yn, stride_yd, N, M, 1 - side
        )
        other, other_norm = load_raw(other_ptr, stride_n, stride_d, rows, paired, D, BLOCK_D)
        du -= q[:, None] * unit(other, other_norm)
    dz_ptr += (base - first_side * N).to(tl.int64) * D
    store_raw_grad(dz_ptr, du * grad_scale, z, norm, rows, size, D, BLOCK_D)


class Tilings(NamedTuple):
    """The tilings of the two kernels that do the work; `sums` is the online kernel's as well.

    Where rows and columns are the same, rows of a tile of `sums` must be a multiple of its columns.
    """

    sums: Tiling
    gradient: Tiling


def tilings(D: int, *, exact: bool, online: bool = False) -> Tilings:
    """Tilings for rows of D elements, kept in two parts where `exact`; T is low where `online`.

    The largest, of those tried, that neither spill nor take more shared memory than every card
    since compute capability 8.0 grants; `benchmarks/compile_kernels.py` shows it.
    """
    width = padded(D)
    if exact:
        depth = min(64, width)
        if width > 128:
            wide = Tiling(32, 32, width, 8, 2) if width == 256 else Tiling(16, 16, depth, 8, 2)
            return Tilings(Tiling(16, 16, depth, 8, 2), wide)
        return Tilings(Tiling(32, 32, width, 4, 2), Tiling(64, 32, width, 8, 2))
    if width > 256:
        return Tilings(Tiling(64, 32, 128, 8, 2), Tiling(16, 16384 // width, 64, 8, 2))
    if width == 256:
        return Tilings(Tiling(64, 64, width, 8, 2), Tiling(64, 32, width, 8, 2))
    if width == 128:
        gradient = Tiling(64, 32 if online else 64, width, 4, 3, resident=2)
    else:
        gradient = Tiling(128, 64, width, 8, 3)
    return Tilings(Tiling(128, 64, width, 8, 4), gradient)


def softmax_loss(
    x: Tensor,  # [N, D]
    y: Tensor | None,  # [M, D]
    temperature: float,
    *,
    stacked: bool,
    two_way: bool = False,
    grads: tuple[bool, bool],
    exact: bool = False,
    positive: Tensor | None = None,  # [N]
    weight: Tensor | None = None,  # [N]
    mean: bool = True,
    config: Tilings | None = None,
) -> tuple[Tensor, Tensor]:
    """The mean loss of raw rows, or the rows' losses, and the wanted gradients.

    Args:
        x: Rows, fp32, fp16 or bf16, any strides.
        y: More rows, of the same dtype and device; None for tied rows.
        temperature: T, positive.
        stacked: Rows and columns are all of x and y, not x and y.
        two_way: The columns are rows of the loss, too.
        grads: Whether the gradients by x and by y are wanted.
        exact: Keep fp32 rows in two parts.
        positive: int64, the row of y that is the positive of each row of x; None is row i, M >= N.
            As the next two for rows that are not stacked, in one direction.
        weight: fp32 from -1 to 1, what each row counts in the gradients; None is 1.
        mean: Whether the loss is the rows' mean; if not, the gradients are those of their sum.
        config: Tilings other than the default.

    Returns:
        The loss, fp32 [] or [N], and the gradients, fp32 [N + M, D], x's above y's, without the
        rows of what is not wanted.
    """
    tied = y is None
    (N, D), M = x.shape, 0 if y is None else y.shape[0]
    total = N + M
    counted = total if stacked or two_way else N
    exact = exact and x.dtype == torch.float32
    online = temperature < UNSHIFTED_TEMPERATURE
    tiles, own_tiles = config or tilings(D, exact=exact, online=online)
    if config is None and positive is not None and grads[1]:
        # a named row has a row of x beside its sum
        own_tiles = own_tiles._replace(rows=min(own_tiles.rows, 32))
    scale2 = base2_scale(temperature)
    own_blocks = triton.cdiv(max(N * grads[0], M * grads[1]), own_tiles.rows)
    columns = total if stacked else max(N, M)
    splits = splits_of(max(1, own_blocks * sum(grads)), columns, own_tiles, x.device)
    partials = triton.cdiv(total, SUM_ROWS)
    slots = 0 if online else resident_programs(x.device) * tiles.resident
    if online:
        owners = [total] if stacked else [N, M]
        partials = sum(triton.cdiv(rows, tiles.rows) for rows in owners)
    # counters of arrivals, then sums
    counters = own_blocks * sum(grads) if splits > 1 else 0
    zero = torch.empty(counters + slots * total, dtype=torch.float32, device=x.device)
    arrived, sums = zero[:counters].view(torch.int32), zero[counters:]
    stat, neg2, q = torch.empty(3, total, dtype=torch.float32, device=x.device)
    partial = torch.empty(partials, dtype=torch.float32, device=x.device)
    loss = torch.empty((), dtype=torch.float32, device=x.device)
    losses = None if mean else torch.empty(counted, dtype=torch.float32, device=x.device)
    dz = torch.empty(N * grads[0] + M * grads[1], D, dtype=torch.float32, device=x.device)

    with on_device_of(x):
        padding = max(*tiles[:2], *own_tiles[:2])
        u, u_low, scale, pos2, lowest = scaled_rows(
            x, y, temperature, exact=exact, padding=padding, positive=positive, zero=zero
        )
        statistics = (pos2, stat, neg2, q, losses, partial, lowest, N, total, counted)
        if online:
            _online_kernel[(partials,)](
                u,
                u_low,
                scale,
                positive,
                *statistics,
                scale2,
                STACKED=stacked,
                TIED=tied,
                **blocks(tiles, D),
            )
        else:
            _negatives_kernel[(slots,)](
                u,
                u_low,
                *_tile_sources(u, tiles),
                scale,
                sums,
                positive,
                *statistics,
                total if stacked else N,
                0 if stacked else N,
                scale2,
                SYMMETRIC=stacked,
                COLUMNS=stacked or two_way or grads[1],
                TIED=tied,
                COOPERATIVE=not INTERPRETED,
                ROWS=SUM_ROWS,
                DESCRIPTORS=tiles.descriptors,
                **blocks(tiles, D),
                **({} if INTERPRETED else {"launch_cooperative_grid": True}),
            )
            if INTERPRETED:
                _add_up_kernel[(slots,)](sums, slots, *statistics, scale2, TIED=tied, ROWS=SUM_ROWS)
        if not any(grads):
            if losses is None:
                _mean_kernel[(1,)](partial, loss, partials, counted)
            return loss if losses is None else losses, dz
        other = x if y is None else y
        grid = (own_blocks, sum(grads), splits)
        rows = grid[0] * grid[1] * own_tiles.rows
        du = torch.empty(splits, rows, u.shape[1], device=x.device) if splits > 1 else None
        _gradient_kernel[grid](
            x,
            other,
            u,
            u_low,
            *_tile_sources(u, own_tiles),
            scale,
            stat,
            neg2,
            q,
            positive,
            weight,
            partial,
            lowest,
            loss,
            dz,
            du,
            None if du is None else arrived,
            N,
            len(other),
            D,
            *x.stride(),
            *other.stride(),
            partials,
            counted,
            0 if grads[0] else 1,
            scale2,
            1.0 / ((counted if mean else 1) * temperature),
            STACKED=stacked,
            TIED=tied,
            ONLINE=online,
            RUNNING=online or exact,
            DESCRIPTORS=own_tiles.descriptors,
            **blocks(own_tiles, D),
            # or the compiler spills for the sake of blocks that nobody wants
            maxnreg=own_tiles.registers,
        )
    return loss if losses is None else losses, dz


def splits_of(blocks: int, columns: int, tiles: Tiling, device: torch.device) -> int:
    """How many programs share a block of rows, so that the GPU is full and evenly so."""
    programs = resident_programs(device) * tiles.resident
    # each has four tiles at least
    most = min(triton.cdiv(columns, 4 * tiles.columns), triton.cdiv(4 * programs, blocks))

    def busy(splits: int) -> float:
        waves = blocks * splits / programs
        return waves / math.ceil(waves)

    options = range(1, most + 1)
    return next((splits for splits in options if busy(splits) > 0.9), max(options, key=busy))


def _tile_sources(u: Tensor, tiles: Tiling) -> tuple[Tensor | TensorDescriptor, ...]:
    """What a kernel loads its own rows and its columns from."""
    if not tiles.descriptors:
        return u, u
    return (
        TensorDescriptor.from_tensor(u, [tiles.rows, u.shape[1]]),
        TensorDescriptor.from_tensor(u, [tiles.columns, u.shape[1]]),
    )
