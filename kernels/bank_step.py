"""A step of a bank of learnable keys in Triton: gradient, velocity and update in one pass over it.

The N anchors have unit rows u_i and the bank has unit rows w_k, with s_ik = u_i . w_k / T. L_i is
the sum of exp(s) over the columns of row i, q_i the negatives' share of it, and c_i what the row
counts:

    P_ik = exp(s_ik) / L_i, or q_i where entry k is row i's positive
    r_k = sum_i c_i P_ik u_i, less its part along w_k
    V_k = momentum V_k - r_k / (|W_k| T) + weight_decay W_k,   W_k = W_k - lr V_k

The anchors, their keys, if there are any, and the bank stand below one another in one matrix of
scaled rows. A step takes four launches and O((N + K) D) memory, with the same bits at every run:

1, 2. `_normalize_kernel` writes the rows for the tensor cores: first those of the anchors and keys,
   which may be in half precision, then those of the bank.
3. `_denominators_kernel` owns anchors and keeps a running maximum, at any temperature. Programs
   share anchors and walk over a split of the columns each; the last to arrive adds up what all have
   found, in a fixed order. If the anchors' losses are known, there is no walk.
4. `_update_kernel` owns rows of the bank, computes their similarities to all anchors again, and
   takes the sum of the weighted anchors through gradient, velocity and update while it is in
   registers. Positives enter in fp32, outside of the tensor cores.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import (
    Compilations,
    Tiling,
    Tilings,
    blocks,
    cdiv,
    meta_rows,
    on_device_of,
    padded,
    splits_of,
    workspace,
)
from ._launch import tilings as tilings_of_losses
from ._rows import (
    EPS,
    FP16_BITS,
    LN2,
    MAX_EXPONENT,
    ScaledRows,
    add_exponentials,
    add_rescaled,
    arrives_last,
    floored,
    load_own,
    load_raw,
    load_unit,
    logits,
    matrix,
    normalize,
    positive_logits,
    scaled_memory,
    sigmoid,
    softplus,
    take_from_named,
    unscaled,
)


class AnchorStatistics(NamedTuple):
    """What the update needs to know of every anchor."""

    lse2_ptr: Tensor  # [N] log2 L_i
    count_ptr: Tensor  # [N] c_i
    share_ptr: Tensor  # [N] c_i q_i


@triton.jit
def _denominators_kernel(
    anchor,  # Matrix [N, D]
    bank,  # Matrix [K, D]
    positive_ptr,  # [N] or None
    weight_ptr,  # [N] or None
    losses_ptr,  # [N] or None
    pos2_ptr,  # [N], or None where positives are named
    rows,  # ScaledRows
    partial_ptr,  # [2, splits, rows of all blocks]
    arrived_ptr,  # [blocks], zero
    stats,  # AnchorStatistics
    view,  # anchors of a view
    blocks,  # Blocks
):
    """Stores the statistics of the anchors that a program owns, alone or with others."""
    BLOCK_M: tl.constexpr = blocks.BLOCK_M
    BLOCK_N: tl.constexpr = blocks.BLOCK_N
    BLOCK_D: tl.constexpr = blocks.BLOCK_D
    N, K = anchor.N, bank.N
    own_first = tl.program_id(0) * BLOCK_M
    offs_m = own_first + tl.arange(0, BLOCK_M)
    mask_m = offs_m < N
    shift = tl.zeros([BLOCK_M], tl.float32) - rows.scale2
    total = tl.zeros([BLOCK_M], tl.float32)
    if losses_ptr is None:
        own = load_own(rows, rows.u_ptr, own_first, N, blocks)
        # the columns are the keys, if there are any, and then the bank
        key_tiles = 0
        if positive_ptr is None:
            key_tiles = tl.cdiv(N, BLOCK_N)
        tiles = key_tiles + tl.cdiv(K, BLOCK_N)
        begin = tl.program_id(1) * tiles // tl.num_programs(1)
        end = (tl.program_id(1) + 1) * tiles // tl.num_programs(1)
        if positive_ptr is None:
            for number in range(begin, tl.minimum(end, key_tiles)):
                first = number * BLOCK_N
                offs_n = first + tl.arange(0, BLOCK_N)
                # a row meets the keys of its own view, but not its own key
                excluded = offs_m[:, None] // view != offs_n[None, :] // view
                excluded |= (offs_m[:, None] == offs_n[None, :]) | (offs_n >= N)[None, :]
                s2, _, _ = logits(rows, own, rows.u_ptr, N + first, 2 * N, blocks)
                s2 = tl.where(excluded, float("-inf"), s2)
                total, shift = add_exponentials(total, shift, s2)
            bank_first = 2 * N
        else:
            named = tl.load(positive_ptr + offs_m, mask=mask_m, other=-1)
            bank_first = N
        for number in range(tl.maximum(begin, key_tiles), end):
            first = (number - key_tiles) * BLOCK_N
            offs_n = first + tl.arange(0, BLOCK_N)
            excluded = (offs_n >= K)[None, :]
            if positive_ptr is not None:
                excluded |= named[:, None] == offs_n[None, :]
            s2, _, _ = logits(rows, own, rows.u_ptr, bank_first + first, bank_first + K, blocks)
            s2 = tl.where(excluded, float("-inf"), s2)
            total, shift = add_exponentials(total, shift, s2)
        width = tl.num_programs(0) * BLOCK_M
        sums_ptr = partial_ptr + tl.num_programs(1) * width
        tl.store(partial_ptr + tl.program_id(1) * width + offs_m, shift)
        tl.store(sums_ptr + tl.program_id(1) * width + offs_m, total)
        if not arrives_last(arrived_ptr + tl.program_id(0), tl.num_programs(1)):
            return
        shift = tl.load(partial_ptr + offs_m)
        total = tl.load(sums_ptr + offs_m)
        for split in range(1, tl.num_programs(1)):
            other_shift = tl.load(partial_ptr + split * width + offs_m)
            other = tl.load(sums_ptr + split * width + offs_m)
            new_shift = tl.maximum(shift, other_shift)
            total = total * tl.exp2(shift - new_shift) + other * tl.exp2(other_shift - new_shift)
            shift = new_shift

    if positive_ptr is None:
        pos2 = tl.load(pos2_ptr + offs_m, mask=mask_m, other=0.0)
    else:
        u = load_unit(anchor, offs_m, mask_m, BLOCK_D)
        pos2 = rows.scale2 * positive_logits(u, bank, positive_ptr, offs_m, mask_m, BLOCK_D)
    if losses_ptr is None:
        margin = (shift + tl.log2(total) - pos2) * LN2
        loss, q = softplus(margin), sigmoid(margin)
    else:
        loss = tl.load(losses_ptr + offs_m, mask=mask_m, other=0.0)
        # 1 - exp(-loss), as exact for a small loss as for a large one
        decay = tl.exp(-loss)
        small = tl.where(decay == 1.0, 1.0, loss / -tl.log(tl.where(decay == 1.0, 0.5, decay)))
        q = tl.where(decay == 1.0, loss, (1.0 - decay) * tl.where(loss < 1.0, small, 1.0))
    if weight_ptr is None:
        count = 1.0 / N + tl.zeros([BLOCK_M], tl.float32)
    else:
        count = tl.load(weight_ptr + offs_m, mask=mask_m, other=0.0)
    tl.store(stats.lse2_ptr + offs_m, pos2 + loss / LN2, mask=mask_m)
    tl.store(stats.count_ptr + offs_m, count, mask=mask_m)
    tl.store(stats.share_ptr + offs_m, count * q, mask=mask_m)


@triton.jit
def _update_kernel(
    bank,  # Matrix [K, D], contiguous
    velocity_ptr,  # [K, D]
    anchor,  # Matrix [N, D]
    positive_ptr,  # [N] or None
    lr_ptr,  # []
    rows,  # ScaledRows
    stats,  # AnchorStatistics
    bank_first,
    grad_scale,
    momentum,
    weight_decay,
    blocks,  # Blocks
):
    """Computes gradient, velocity and update of the rows of the bank that a program owns."""
    BLOCK_M: tl.constexpr = blocks.BLOCK_M
    BLOCK_D: tl.constexpr = blocks.BLOCK_D
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < bank.N
    own_first = bank_first + tl.program_id(0) * BLOCK_M
    own = load_own(rows, rows.u_ptr, own_first, bank_first + bank.N, blocks)
    exponent = tl.zeros([BLOCK_M], tl.float32) + MAX_EXPONENT
    du = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in range(0, anchor.N, blocks.BLOCK_N):
        s2, columns, scale = logits(rows, own, rows.u_ptr, first, anchor.N, blocks)
        offs_n = first + tl.arange(0, blocks.BLOCK_N)
        mask_n = offs_n < anchor.N
        if positive_ptr is not None:
            named = tl.load(positive_ptr + offs_n, mask=mask_n, other=-1)
            s2 = tl.where(offs_m[:, None] == named[None, :], float("-inf"), s2)
        lse2 = tl.load(stats.lse2_ptr + offs_n, mask=mask_n, other=float("inf"))
        count = tl.load(stats.count_ptr + offs_n, mask=mask_n, other=0.0)
        count *= scale * 2.0 ** (FP16_BITS - 1)
        weights = tl.exp2(s2 - lse2[None, :]) * count[None, :]
        du, exponent = add_rescaled(du, exponent, weights, columns, rows)
    # downhill is away from the anchors
    du = -unscaled(du, exponent)
    if positive_ptr is not None:
        du = take_from_named(du, anchor, positive_ptr, stats.share_ptr, None, offs_m, BLOCK_D)
    raw, norm = load_raw(bank, offs_m, mask_m, BLOCK_D)
    w = raw / floored(norm)[:, None]
    radial = tl.where(norm < EPS, 0.0, tl.sum(w * du, axis=1))
    gradient = (du - radial[:, None] * w) * (grad_scale / floored(norm))[:, None]
    offs_d = tl.arange(0, BLOCK_D)
    offsets = offs_m.to(tl.int64)[:, None] * bank.D + offs_d[None, :]
    stored = mask_m[:, None] & (offs_d < bank.D)[None, :]
    velocity = tl.load(velocity_ptr + offsets, mask=stored, other=0.0)
    velocity = momentum * velocity + gradient + weight_decay * raw
    tl.store(velocity_ptr + offsets, velocity, mask=stored)
    tl.store(bank.ptr + offsets, raw - tl.load(lr_ptr) * velocity, mask=stored)


def tilings(D: int, *, exact: bool) -> Tilings:
    """Tilings for rows of D elements: those of the losses, where these leave enough registers.

    The update keeps rows of bank and velocity beside the gradient's sum.
    """
    sums, gradient = tilings_of_losses(D, exact=exact, online=True)
    width = padded(D)
    if width > 256:
        return Tilings(sums._replace(rows=16), gradient)
    if exact:
        return Tilings(sums, gradient)
    if width == 256:
        return Tilings(sums, Tiling(32, 32, width, 8, 2))
    return Tilings(sums, Tiling(32 if width == 128 else 64, 64, width, 4, 3, resident=2))


def bank_step(
    bank: Tensor,  # [K, D]
    velocity: Tensor,  # [K, D]
    anchor: Tensor,  # [N, D]
    keys: Tensor | None,  # [N, D]
    positive: Tensor | None,  # [N]
    weight: Tensor | None,  # [N]
    losses: Tensor | None,  # [N]
    lr: Tensor,  # []
    views: int,
    temperature: float,
    momentum: float,
    weight_decay: float,
    exact: bool = False,
    config: Tilings | None = None,
) -> None:
    """Updates bank and velocity in place.

    Args:
        bank: fp32, contiguous.
        velocity: fp32, contiguous.
        anchor: Rows, fp32, fp16 or bf16, any strides.
        keys: The anchors' positives, in their dtype; None where `positive` names these.
        positive: int64, the bank entry that is each anchor's positive; None where there are keys.
        weight: fp32, what each anchor counts; None is 1 / N.
        losses: The anchors' losses, fp32; None where they are not known.
        lr: The learning rate, fp32, on the bank's device.
        views: How many views the anchors and keys are of; an anchor meets the keys of its own view.
        temperature: T, positive.
        momentum: The factor of the velocity.
        weight_decay: The factor of the bank that is added to the gradient.
        exact: Keep rows in two parts.
        config: Tilings other than the default.
    """
    (N, D), K = anchor.shape, len(bank)
    tiles = config or tilings(D, exact=exact)
    bank_first = N if keys is None else 2 * N
    own_blocks = cdiv(N, tiles.sums.rows)
    splits = 1 if losses is not None else splits_of(own_blocks, K, tiles.sums, bank.device)
    positive, weight, losses = (
        None if t is None else t.contiguous() for t in (positive, weight, losses)
    )
    arrived, partial, pos2, *memory = workspace(
        bank.device, own_blocks, 2 * splits * own_blocks * tiles.sums.rows, N, N, N, N
    )
    stats = AnchorStatistics(*memory)
    size = bank_first + K + tiles.padding
    rows = scaled_memory(size, D, temperature, exact=exact, device=bank.device)

    def part(first: int, end: int) -> ScaledRows:
        low = None if rows.low_ptr is None else rows.low_ptr[first:end]
        return ScaledRows(rows.u_ptr[first:end], low, rows.scale_ptr[first:end], rows.scale2)

    with on_device_of(bank):
        pairs = None if keys is None else pos2
        normalize(anchor, keys, part(0, bank_first), pos2=pairs, zero=arrived)
        normalize(bank, None, part(bank_first, size))
        _denominators_kernel[(own_blocks, splits)](
            matrix(anchor),
            matrix(bank),
            positive,
            weight,
            losses,
            pairs,
            rows,
            partial,
            arrived.view(torch.int32),
            stats,
            N // views,
            **blocks(tiles.sums, D),
        )
        _update_kernel[(cdiv(K, tiles.gradient.rows),)](
            matrix(bank),
            velocity,
            matrix(anchor),
            positive,
            lr,
            rows,
            stats,
            bank_first,
            1.0 / temperature,
            momentum,
            weight_decay,
            **blocks(tiles.gradient, D),
            # or the compiler spills for the sake of blocks that nobody wants
            maxnreg=tiles.gradient.registers,
        )


def compilations() -> Compilations:
    """Calls that compile every kernel of this file at every default tiling."""
    empty = partial(torch.empty, device="meta")
    names, rows = empty(256, dtype=torch.int64), empty(256)
    for D, exact in (
        (64, False),
        (128, False),
        (256, False),
        (512, False),
        (64, True),
        (128, True),
    ):
        bank, z = empty(4096, D), meta_rows(D, exact=exact, N=256)
        numbers = (empty(()), 1, 0.02, 0.9, 1e-4, exact)
        operands: tuple[Any, ...]
        for case, operands in (
            ("keys", (z, None, None, None)),
            ("named", (None, names, rows, None)),
            ("losses", (None, names, None, rows)),
        ):
            operands += numbers
            call = partial(bank_step, bank, bank, z, *operands)
            yield f"D={D}{exact * ' exact'} {case}", call
