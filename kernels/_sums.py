"""The row sums of the softmax losses: NT-Xent, its tied form, InfoNCE.

With unit rows u, s_ij = u_i . u_j / T, the positive pi(i) of row i, and neg_i the sum of exp(s_ij)
over the columns j of row i but itself and pi(i):

    loss_i = log(neg_i + exp(s_i,pi)) - s_i,pi = softplus(log neg_i - s_i,pi)
    d loss / d u_i = (1 / count T) (sum_j (P_ij + P_ji) u_j - (q_i + q_pi) u_pi),   j negatives
    P_ij = exp(s_ij) / L_i,   L_i = neg_i + exp(s_i,pi),   q_i = neg_i / L_i

A column that is no row of the loss, as a key of one-way InfoNCE, has P = q = 0. Only the negatives
go through the tensor cores. The positive is computed in fp32 and enters with the weight q, never as
P - 1: that difference has no correct digit left where the loss is small.

The operands stand below one another, x above y, and the losses differ in the ranges that rows and
columns are taken from:

                    rows          columns       count     pi(i)
    NT-Xent         x and y       x and y       2N        i +- N
    tied            x             x, twice      N         i
    InfoNCE         x             y             N         i + N
    two-way         x, then y     y, then x     2N        i +- N

Three launches and O(n D) memory compute loss and gradient, with the same bits at every run:

1. `_normalize_kernel` writes the rows for the tensor cores and the positives' logits.
2. `_negatives_kernel` sums exp(s) over tiles. A tile serves its rows and, where their sums are
   wanted too, its columns; of a symmetric matrix only one half is computed, n^2 D FLOPs for n rows.
   Tiles are dealt out in advance, and every program adds to sums of its own. Once all programs have
   arrived, they add these sums up in a fixed order. No shift is needed, since |s| <= 1 / T. Below
   T = 0.023 that is too much for fp32, and `_online_kernel`, which owns rows, keeps a running
   maximum instead.
3. `_gradient_kernel` in `_gradient.py` owns rows, computes their similarities again and multiplies
   the weights P_ij + P_ji with the rows: 4 n^2 D FLOPs.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ._launch import INTERPRETED, Tiling, blocks, cdiv, constants, resident_programs, workspace
from ._rows import (
    LN2,
    ScaledRows,
    add_exponentials,
    load_own,
    load_scale,
    load_tile,
    mask_logits,
    negative_logits,
    normalize,
    products,
    scaled_memory,
    sigmoid,
    softplus,
    wait_for_all,
)

# from here up exp(1 / T), exp(-1 / T) and sums of them are normal fp32 numbers
UNSHIFTED_TEMPERATURE = 0.023
# rows whose sums a program adds up at a time, and the programs whose sums it takes at a time
_SUM_ROWS = tl.constexpr(64)
_SUM_SLOTS = tl.constexpr(16)
# the bits of the largest finite number
_HUGE_BITS = tl.constexpr(0x7F7FFFFF)
_COOPERATIVE = tl.constexpr(not INTERPRETED)


class Form(NamedTuple):
    """What the kernels of a softmax loss are compiled for."""

    STACKED: bool  # rows and columns are all of x and y
    TIED: bool  # there is no y, and every row is its own positive
    ONLINE: bool  # the temperature is low


class Statistics(NamedTuple):
    """What the gradient needs to know of all `total` rows of x and y.

    The first `counted` of them are rows of the loss; the others have no denominator, and so no
    share in the gradient.
    """

    stat_ptr: Tensor  # [total] 1 / L_i, or log2 L_i where ONLINE
    neg2_ptr: Tensor  # [total] log2 neg_i
    q_ptr: Tensor  # [total]
    partial_ptr: Tensor  # [partials] parts of the losses' sum
    lowest_ptr: Tensor  # [1] from which `lowest2` reads the lowest log2 L_i
    N: int  # rows of x
    total: int
    counted: int


@triton.jit
def _store_statistics(
    neg2,  # [BLOCK] log2 of the negatives' sum
    rows,
    block,
    pos2_ptr,  # [N]
    losses_ptr,  # [counted] or None
    stats,
    scale2,
    form,
):
    """Stores the statistics of rows, their losses and the sum of these."""
    is_row = rows < stats.counted
    pos2 = tl.load(pos2_ptr + tl.where(rows < stats.N, rows, rows - stats.N), is_row, other=0.0)
    if form.TIED:
        neg2 += 1.0  # every negative is there in both views
    margin = (neg2 - pos2) * LN2  # log neg_i - s_i,pi, which is -inf without negatives
    loss = softplus(margin)
    lse2 = pos2 + loss / LN2
    stat = tl.where(is_row, lse2, float("inf"))
    if not form.ONLINE:
        stat = tl.exp2(-stat)
    mask = rows < stats.total
    tl.store(stats.stat_ptr + rows, stat, mask=mask)
    tl.store(stats.neg2_ptr + rows, neg2, mask=mask)
    tl.store(stats.q_ptr + rows, tl.where(is_row, sigmoid(margin), 0.0), mask=mask)
    if losses_ptr is not None:
        tl.store(losses_ptr + rows, loss, mask=is_row)
    tl.store(stats.partial_ptr + block, tl.sum(tl.where(is_row, loss, 0.0)))
    # positive numbers are ordered as their bits are
    bits = (lse2 + scale2 + 1.0).to(tl.int32, bitcast=True)
    bits = tl.where(is_row, bits, _HUGE_BITS)
    tl.atomic_max(stats.lowest_ptr, tl.max(-bits + _HUGE_BITS))


@triton.jit
def lowest2(stats, scale2):
    """The lowest log2 L_i of all rows of the loss."""
    bits = -tl.load(stats.lowest_ptr) + _HUGE_BITS
    return bits.to(tl.float32, bitcast=True) - scale2 - 1.0


@triton.jit
def _add_up(sums_ptr, slots, pos2_ptr, losses_ptr, stats, scale2, form):
    """Adds up the programs' sums and stores the statistics of the rows of this program."""
    for block in range(tl.program_id(0), tl.cdiv(stats.total, _SUM_ROWS), tl.num_programs(0)):
        rows = block * _SUM_ROWS + tl.arange(0, _SUM_ROWS)
        neg = tl.zeros([_SUM_ROWS], tl.float32)
        for first in range(0, slots, _SUM_SLOTS):
            slot = first + tl.arange(0, _SUM_SLOTS)
            offsets = slot.to(tl.int64)[:, None] * stats.total + rows[None, :]
            mask = (slot < slots)[:, None] & (rows < stats.total)[None, :]
            neg += tl.sum(tl.load(sums_ptr + offsets, mask=mask, other=0.0), axis=0)
        _store_statistics(tl.log2(neg), rows, block, pos2_ptr, losses_ptr, stats, scale2, form)


@triton.jit
def _negatives_kernel(
    rows,  # ScaledRows
    u_own,  # rows.u_ptr, or a descriptor of tiles of BLOCK_M rows
    u_columns,  # rows.u_ptr, or a descriptor of tiles of BLOCK_N rows
    positive_ptr,  # [N] or None
    pos2_ptr,  # [N]
    losses_ptr,  # [counted] or None
    sums_ptr,  # [programs, total], zero
    arrived_ptr,  # [1], zero
    stats,  # Statistics, its lowest_ptr zero
    form,  # Form
    COLUMNS: tl.constexpr,
    blocks,  # Blocks
):
    """Sums exp(s) over negatives, by row and by column, in slots of the programs' own.

    Tiles are numbered along strips of rows. Of a symmetric matrix a strip has the blocks from its
    diagonal one to the middle of the others, going around: every pair of blocks once, and equally
    many in all strips, except that the last of an even number belongs to the upper half of them. A
    block is as wide as high, and has PARTS tiles.
    """
    BLOCK_M: tl.constexpr = blocks.BLOCK_M
    BLOCK_N: tl.constexpr = blocks.BLOCK_N
    PARTS: tl.constexpr = BLOCK_M // BLOCK_N
    SYMMETRIC: tl.constexpr = form.STACKED
    tl.static_assert(not SYMMETRIC or BLOCK_M % BLOCK_N == 0, "rows must be a multiple of columns")
    total = stats.total
    row_end = total if SYMMETRIC else stats.N
    column_first = 0 if SYMMETRIC else stats.N
    program = tl.program_id(0)
    own_sums_ptr = sums_ptr + program.to(tl.int64) * total
    strips = tl.cdiv(row_end, BLOCK_M)
    half = (strips // 2 + 1) * PARTS
    strip = half if SYMMETRIC else tl.cdiv(total - column_first, BLOCK_N)
    tiles = strips.to(tl.int64) * strip
    begin = tiles * program // tl.num_programs(0)
    end = tiles * (program + 1) // tl.num_programs(0)

    for number in range(begin // strip, tl.cdiv(end, strip)):
        block = tl.cast(number, tl.int32)
        start = tl.maximum(begin - number * strip, 0).to(tl.int32)
        length = strip
        if SYMMETRIC:
            length -= ((strips % 2 == 0) & (2 * block >= strips)).to(tl.int32) * PARTS
        stop = tl.minimum(end - number * strip, length).to(tl.int32)
        own = load_own(rows, u_own, block * BLOCK_M, row_end, blocks)
        # added up over the columns at the end of the strip, where that costs next to nothing; the
        # columns' own sums, of every tile, are along the axis that a warp has most of
        sums = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for step in range(start, stop):
            column = step
            if SYMMETRIC:
                column += block * PARTS
                column = tl.where(column < strips * PARTS, column, column - strips * PARTS)
            first = column_first + column * BLOCK_N
            columns = load_tile(rows, u_columns, first, total, BLOCK_N, blocks)
            dots = products(rows, columns, own, blocks)
            s2 = dots * load_scale(rows, first, BLOCK_N)[:, None] * own.scale[None, :]
            exp = tl.exp2(mask_logits(s2, columns, own, stats.N, positive_ptr))
            sums += exp
            if COLUMNS:
                offs_n = first + tl.arange(0, BLOCK_N)
                # the rows of a diagonal block are its columns
                mask = (offs_n < total) & ((step >= PARTS) | (not SYMMETRIC))
                tl.atomic_add(own_sums_ptr + offs_n, tl.sum(exp, axis=1), mask=mask, sem="relaxed")
        # what comes from two strips is added in their order
        tl.debug_barrier()
        offs_m = own.first + tl.arange(0, BLOCK_M)
        mask = offs_m < row_end
        tl.atomic_add(own_sums_ptr + offs_m, tl.sum(sums, axis=0), mask=mask, sem="relaxed")
        tl.debug_barrier()

    if _COOPERATIVE:
        wait_for_all(arrived_ptr)
        programs = tl.num_programs(0)
        _add_up(sums_ptr, programs, pos2_ptr, losses_ptr, stats, rows.scale2, form)


@triton.jit
def _add_up_kernel(
    sums_ptr,  # [slots, total]
    slots,
    pos2_ptr,  # [N]
    losses_ptr,  # [counted] or None
    stats,  # Statistics
    scale2,
    form,  # Form
):
    """The end of `_negatives_kernel` for the interpreter, whose programs do not run at once."""
    _add_up(sums_ptr, slots, pos2_ptr, losses_ptr, stats, scale2, form)


@triton.jit
def _online_kernel(
    rows,  # ScaledRows
    positive_ptr,  # [N] or None
    pos2_ptr,  # [N]
    losses_ptr,  # [counted] or None
    stats,  # Statistics
    form,  # Form
    blocks,  # Blocks
):
    """Stores the statistics of the rows that a program owns, by a running maximum."""
    BLOCK_M: tl.constexpr = blocks.BLOCK_M
    N, total = stats.N, stats.total
    own_first = tl.program_id(0) * BLOCK_M
    own_end = total
    first_column, end = 0, total
    if not form.STACKED:
        # a block with rows of x has no others; the rows of y begin a block of their own
        x_blocks = tl.cdiv(N, BLOCK_M)
        is_x = tl.program_id(0) < x_blocks
        own_first = tl.where(is_x, own_first, N + (tl.program_id(0) - x_blocks) * BLOCK_M)
        own_end = tl.where(is_x, N, total)
        first_column = tl.where(is_x, N, 0)
        end = tl.where(is_x, total, N)
    own = load_own(rows, rows.u_ptr, own_first, own_end, blocks)
    # no logit is below -scale2, but by a rounding
    shift = tl.zeros([BLOCK_M], tl.float32) - rows.scale2
    neg = tl.zeros([BLOCK_M], tl.float32)
    for first in range(first_column, end, blocks.BLOCK_N):
        s2, _, _ = negative_logits(rows, own, rows.u_ptr, first, end, N, blocks, positive_ptr)
        neg, shift = add_exponentials(neg, shift, s2)
    offs_m = own_first + tl.arange(0, BLOCK_M)
    offs_m = tl.where(offs_m < own_end, offs_m, total)
    neg2, block = shift + tl.log2(neg), tl.program_id(0)
    _store_statistics(neg2, offs_m, block, pos2_ptr, losses_ptr, stats, rows.scale2, form)


class RowSums(NamedTuple):
    """The scaled rows of a loss, their statistics, and memory that the gradient needs.

    Attributes:
        rows: The rows of x, above those of y.
        stats: Their statistics.
        partials: The number of parts of the losses' sum.
        counters: int32 zeros, as many as wanted.
    """

    rows: ScaledRows
    stats: Statistics
    partials: int
    counters: Tensor


def row_sums(
    x: Tensor,  # [N, D]
    y: Tensor | None,  # [M, D]
    temperature: float,
    form: Form,
    tiles: Tiling,
    *,
    counted: int,
    columns: bool,
    exact: bool,
    padding: int,
    positive: Tensor | None = None,  # [N]
    losses: Tensor | None = None,  # [counted]
    counters: int = 0,
) -> RowSums:
    """Scales the rows and computes their statistics, in two launches.

    Args:
        x: Raw rows.
        y: More raw rows; None for tied rows.
        temperature: T, positive.
        form: The loss.
        tiles: The tiling.
        counted: How many rows are rows of the loss.
        columns: Whether the columns' sums are wanted, where they are not those of the rows.
        exact: Whether rows are kept in two parts.
        padding: Rows of zeros below the last.
        positive: The row of y that is each row's positive, where that is not row i.
        losses: Where the rows' losses go, if they are wanted.
        counters: How many zeros the gradient needs.
    """
    (N, D), total = x.shape, len(x) + (0 if y is None else len(y))
    programs = resident_programs(x.device) * tiles.resident
    slots, partials = programs * total, cdiv(total, _SUM_ROWS.value)
    if form.ONLINE:
        owners = [total] if form.STACKED else [N, total - N]
        slots, partials = 0, sum(cdiv(size, tiles.rows) for size in owners)
    clear = [1, 3, cdiv(counters, 4) * 4, slots]  # the last two are aligned
    zero, stat, neg2, q, pos2, partial = workspace(
        x.device, sum(clear), total, total, total, N, partials
    )
    lowest, arrived, zeros, sums = zero.view(torch.int32).split(clear)
    rows = scaled_memory(total + padding, D, temperature, exact=exact, device=x.device)
    normalize(x, y, rows, pos2=pos2, positive=positive, zero=zero)
    stats = Statistics(stat, neg2, q, partial, lowest, N, total, counted)
    store = (pos2, losses)
    if form.ONLINE:
        _online_kernel[(partials,)](
            rows,
            positive,
            *store,
            stats,
            constants(form),
            **blocks(tiles._replace(descriptors=False), D),
        )
        return RowSums(rows, stats, partials, zeros)
    sums = sums.view(torch.float32)
    _negatives_kernel[(programs,)](
        rows,
        *tile_sources(rows, tiles),
        positive,
        *store,
        sums,
        arrived,
        stats,
        constants(form),
        COLUMNS=form.STACKED or columns,
        **blocks(tiles, D),
        # or the compiler spills for the sake of more programs than are launched
        maxnreg=tiles.registers,
        **({} if INTERPRETED else {"launch_cooperative_grid": True}),
    )
    if INTERPRETED:
        _add_up_kernel[(programs,)](sums, programs, *store, stats, rows.scale2, constants(form))
    return RowSums(rows, stats, partials, zeros)


def tile_sources(rows: ScaledRows, tiles: Tiling) -> tuple[Tensor | TensorDescriptor, ...]:
    """What a kernel loads its own rows and its columns through.

    Triton 3.6 launches no kernel whose descriptors are elements of a tuple, so these are arguments.
    """
    u = rows.u_ptr
    if not tiles.descriptors:
        return u, u
    sides = (tiles.rows, tiles.columns)
    return tuple(TensorDescriptor.from_tensor(u, [side, u.shape[1]]) for side in sides)
