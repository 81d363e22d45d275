"""The gradient of the softmax losses, and the launches of a whole loss.

The formulas are in `_sums.py`. `_gradient_kernel` multiplies the weights P_ij + P_ji with the rows.
The weights of a row are scaled by a power of two for fp16, so that a row with a tiny gradient keeps
its digits. In the exact mode and at low temperatures that power follows the largest weight so far;
otherwise a bound is known beforehand.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import (
    Tilings,
    blocks,
    cdiv,
    constants,
    on_device_of,
    padded,
    splits_of,
    tilings,
    workspace,
)
from ._rows import (
    FP16_BITS,
    MAX_EXPONENT,
    _mean_kernel,
    add_rescaled,
    add_weighted,
    arrives_last,
    floored,
    load_own,
    load_raw,
    load_unit,
    matrix,
    mean,
    negative_logits,
    partners_of,
    select_side,
    store_raw_grad,
    take_from_named,
    unscaled,
)
from ._sums import UNSHIFTED_TEMPERATURE, Form, lowest2, row_sums, tile_sources


class Output(NamedTuple):
    """What the gradient kernel writes, and what it needs for that alone."""

    loss_ptr: Tensor  # []
    dz_ptr: Tensor  # [rows of the wanted sides, D]
    du_ptr: Tensor | None  # [splits, rows of all blocks, BLOCK_D], where programs share rows
    arrived_ptr: Tensor | None  # [blocks], zero
    partials: int
    first_side: int  # 0, or 1 where only the gradient by y is wanted
    scale: float  # of the gradient


@triton.jit
def _gradient_kernel(
    x,  # Matrix [N, D]
    y,  # Matrix [M, D], or x
    rows,  # ScaledRows
    u_own,  # rows.u_ptr, or a descriptor of tiles of BLOCK_M rows
    u_columns,  # rows.u_ptr, or a descriptor of tiles of BLOCK_N rows
    stats,  # Statistics
    positive_ptr,  # [N] or None
    weight_ptr,  # [N], from -1 to 1, or None
    out,  # Output
    form,  # Form
    blocks,  # Blocks
):
    """Computes the gradients of the raw rows that a program owns, which are rows of one side.

    A row of x counts in them as much as its weight says; only the one-way loss has weights. Where
    there are too few rows for the GPU, several programs own them together and walk over a split of
    the columns each. The last to arrive adds up what all have found, in a fixed order.
    """
    BLOCK_M: tl.constexpr = blocks.BLOCK_M
    BLOCK_N: tl.constexpr = blocks.BLOCK_N
    BLOCK_D: tl.constexpr = blocks.BLOCK_D
    RUNNING: tl.constexpr = form.ONLINE or rows.low_ptr is not None
    NO_STAT: tl.constexpr = float("inf") if form.ONLINE else 0.0
    side = out.first_side + tl.program_id(1)
    z = select_side(x, y, side)
    # the sides share a grid, and the shorter one has no rows for the last programs of it
    if tl.program_id(0) * BLOCK_M >= z.N:
        return
    N = x.N
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < z.N
    base = side * N
    if form.STACKED:
        first_column, end = 0, stats.total
    else:
        first_column = tl.where(side == 0, N, 0)
        end = tl.where(side == 0, stats.total, N)

    own_stat = tl.load(stats.stat_ptr + base + offs_m, mask=mask_m, other=NO_STAT)
    own_weight = tl.zeros([BLOCK_M], tl.float32)
    if weight_ptr is not None:
        own_weight = tl.load(weight_ptr + base + offs_m, mask=base + offs_m < N, other=1.0)
    if RUNNING:
        exponent = tl.zeros([BLOCK_M], tl.float32) + MAX_EXPONENT
    else:
        # P_ij <= neg_i / L_i and P_ji <= neg_i / L_j, as neg_i has exp(s_ij) in it
        neg2 = tl.load(stats.neg2_ptr + base + offs_m, mask=mask_m, other=0.0)
        neg2 = tl.maximum(neg2, -64.0)  # without negatives it is -inf
        bound2 = tl.minimum(neg2 - lowest2(stats, rows.scale2), 0.0)
        exponent = tl.minimum(-tl.ceil(bound2) + (FP16_BITS - 1.0), MAX_EXPONENT)
    # the columns' scale is below 2 ** (1 - FP16_BITS), and goes into the weights as well
    up = tl.exp2(exponent + (FP16_BITS - 1))
    own_inverse = own_stat * up
    own = load_own(rows, u_own, base + tl.program_id(0) * BLOCK_M, base + z.N, blocks)

    du = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    length = tl.cdiv(tl.cdiv(end - first_column, BLOCK_N), tl.num_programs(2)) * BLOCK_N
    start = first_column + tl.program_id(2) * length
    for first in range(start, tl.minimum(start + length, end), BLOCK_N):
        s2, columns, scale = negative_logits(
            rows, own, u_columns, first, end, N, blocks, positive_ptr
        )
        offs_n = first + tl.arange(0, BLOCK_N)
        stat = tl.load(stats.stat_ptr + offs_n, mask=offs_n < end, other=NO_STAT)
        if form.ONLINE:
            weights = tl.exp2(s2 - own_stat[:, None]) + tl.exp2(s2 - stat[None, :])
        elif RUNNING:
            weights = tl.exp2(s2) * (own_stat[:, None] + stat[None, :])
        else:
            both = own_inverse[:, None] * scale[None, :]
            both += up[:, None] * (stat * scale)[None, :]
            weights = tl.exp2(s2) * both
        if RUNNING:
            weights *= (scale * 2.0 ** (FP16_BITS - 1))[None, :]
        if weight_ptr is not None:
            weights *= own_weight[:, None]
            weights *= tl.load(weight_ptr + offs_n, mask=offs_n < N, other=1.0)[None, :]
        if RUNNING:
            du, exponent = add_rescaled(du, exponent, weights, columns, rows)
        else:
            du = add_weighted(du, weights, columns, rows)
    du = unscaled(du, exponent)

    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0) & (tl.program_id(2) == 0):
        tl.store(out.loss_ptr, mean(stats.partial_ptr, out.partials, stats.counted))
    if out.du_ptr is not None:
        block = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        offsets = (block * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None] * BLOCK_D
        offsets += tl.arange(0, BLOCK_D)[None, :]
        split_size = (tl.num_programs(0) * tl.num_programs(1) * BLOCK_M).to(tl.int64) * BLOCK_D
        tl.store(out.du_ptr + tl.program_id(2) * split_size + offsets, du)
        if not arrives_last(out.arrived_ptr + block, tl.num_programs(2)):
            return
        du = tl.load(out.du_ptr + offsets)
        for split in range(1, tl.num_programs(2)):
            du += tl.load(out.du_ptr + split * split_size + offsets)

    raw, norm = load_raw(z, offs_m, mask_m, BLOCK_D)
    q = tl.load(stats.q_ptr + base + offs_m, mask=mask_m, other=0.0)
    if form.TIED:
        du -= q[:, None] * (raw / floored(norm)[:, None])
    elif positive_ptr is None:
        paired = offs_m < N
        q += tl.load(stats.q_ptr + N - base + offs_m, mask=paired, other=0.0)
        if weight_ptr is not None:
            q *= tl.load(weight_ptr + offs_m, mask=paired, other=0.0)
        other = select_side(x, y, 1 - side)
        du -= q[:, None] * load_unit(other, offs_m, paired, BLOCK_D)
    elif side == 0:
        if weight_ptr is not None:
            q *= own_weight
        partners, exist = partners_of(offs_m, positive_ptr, mask_m, y.N)
        du -= q[:, None] * load_unit(y, partners, exist, BLOCK_D)
    else:
        du = take_from_named(du, x, positive_ptr, stats.q_ptr, weight_ptr, offs_m, BLOCK_D)
    dz_ptr = out.dz_ptr + (base - out.first_side * N).to(tl.int64) * x.D
    store_raw_grad(dz_ptr, du * out.scale, raw, norm, offs_m, mask_m, x.D, BLOCK_D)


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
        stacked: Whether rows and columns are all of x and y, instead of x and y.
        two_way: Whether the columns are rows of the loss, too.
        grads: Whether the gradients by x and by y are wanted.
        exact: Keep fp32 rows in two parts.
        positive: int64, the row of y that is the positive of each row of x; None is row i, M >= N.
            This and the next two are for rows that are not stacked, in one direction.
        weight: fp32 from -1 to 1, what each row counts in the gradients; None is 1.
        mean: Whether the loss is the rows' mean; if not, the gradients are those of their sum.
        config: Tilings other than the default.

    Returns:
        The loss, fp32 [] or [N], and the wanted gradients, x's above y's, fp32 [N + M, D] with
        both; no elements without either.
    """
    (N, D), M = x.shape, 0 if y is None else len(y)
    counted = N + M if stacked or two_way else N
    exact = exact and x.dtype == torch.float32
    form = Form(STACKED=stacked, TIED=y is None, ONLINE=temperature < UNSHIFTED_TEMPERATURE)
    tiles = config or tilings(D, exact=exact, online=form.ONLINE)
    own = tiles.gradient
    if config is None and positive is not None and grads[1]:
        # a named row has a row of x beside its sum
        own = own._replace(rows=min(own.rows, 32))
    blocks_of_side = cdiv(max(N * grads[0], M * grads[1]), own.rows)
    own_blocks = blocks_of_side * sum(grads)
    splits = splits_of(max(1, own_blocks), N + M if stacked else max(N, M), own, x.device)
    shared = own_blocks if splits > 1 else 0
    loss = torch.empty((), dtype=torch.float32, device=x.device)
    losses = None if mean else torch.empty(counted, dtype=torch.float32, device=x.device)

    with on_device_of(x):
        sums = row_sums(
            x,
            y,
            temperature,
            form,
            tiles.sums,
            counted=counted,
            columns=two_way or grads[1],
            exact=exact,
            padding=tiles.padding,
            positive=positive,
            losses=losses,
            counters=shared,
        )
        if not any(grads):
            if losses is None:
                _mean_kernel[(1,)](sums.stats.partial_ptr, loss, sums.partials, counted)
            return loss if losses is None else losses, x.new_empty(0, dtype=torch.float32)
        dz = torch.empty(N * grads[0] + M * grads[1], D, dtype=torch.float32, device=x.device)
        (du,) = workspace(x.device, splits * shared * own.rows * padded(D))
        out = Output(
            loss,
            dz,
            du if shared else None,
            sums.counters if shared else None,
            sums.partials,
            first_side=0 if grads[0] else 1,
            scale=1.0 / ((counted if mean else 1) * temperature),
        )
        _gradient_kernel[(blocks_of_side, sum(grads), splits)](
            matrix(x),
            matrix(x if y is None else y),
            sums.rows,
            *tile_sources(sums.rows, own),
            sums.stats,
            positive,
            weight,
            out,
            constants(form),
            **blocks(own, D),
            # or the compiler spills for the sake of blocks that nobody wants
            maxnreg=own.registers,
        )
    return loss if losses is None else losses, dz
