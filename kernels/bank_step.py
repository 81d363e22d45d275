"""A step of a bank of learnable keys in Triton: gradient, velocity and update in one pass over it.

With unit rows u_i of N anchors and w_k of the bank, s_ik = u_i . w_k / T, L_i the sum of exp(s)
over the columns of row i, c_i what it counts and q_i the negatives' share of L_i:

    P_ik = exp(s_ik) / L_i, or q_i where entry k is row i's positive
    r_k = sum_i c_i P_ik u_i, less its part along w_k
    V_k = momentum V_k - r_k / (|W_k| T) + weight_decay W_k,   W_k = W_k - lr V_k

Anchors, their keys, if any, and the bank stand below one another in one matrix of scaled rows. In
four launches and O((N + K) D) memory, with the same bits at every run:

1, 2. `_normalize_kernel` writes the rows for the tensor cores: those of the anchors and keys, in
   their dtype, and those of the bank.
3. `_denominators_kernel` owns anchors and has a running maximum, at any temperature. Programs share
   anchors and walk over a split of the columns each; the last to arrive adds up what all have
   found, in a fixed order. Where the anchors' losses are known it walks over nothing.
4. `_update_kernel` owns rows of the bank, computes their similarities to all anchors again, and
   takes the sum of these through gradient, velocity and update while it is in registers. Positives
   enter in fp32, outside of the tensor cores.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Tiling, blocks, on_device_of, padded
from ._rows import (
    EPS,
    FP16_BITS,
    LN2,
    MAX_EXPONENT,
    base2_scale,
    load_raw,
    load_tile,
    log1p,
    positive_logits,
    products,
    scaled_memory,
    scaled_rows,
    take_from_named,
    unit,
)
from ._softmax import Tilings, splits_of
from ._softmax import tilings as tilings_of_losses


@triton.jit
def _add_exponentials(
    shift,
    total,
    own,
    own_low,
    own_scale,
    u_ptr,
    u_low_ptr,
    scale_ptr,
    own_first,
    first,
    excluded,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sums of exp2(s2 - shift) and the shifts, with a tile of columns in them."""
    tile, tile_low = load_tile(u_ptr, u_low_ptr, first, BLOCK_N, BLOCK_D, False)
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
    s2 = tl.where(excluded, float("-inf"), dots * own_scale[:, None] * scale[None, :])
    new_shift = tl.maximum(shift, tl.max(s2, axis=1))
    total = total * tl.exp2(shift - new_shift) + tl.sum(tl.exp2(s2 - new_shift[:, None]), axis=1)
    return new_shift, total


@triton.jit
def _denominators_kernel(
    anchor_ptr,  # [N, D]
    bank_ptr,  # [K, D]
    positive_ptr,  # [N] or None
    weight_ptr,  # [N] or None
    losses_ptr,  # [N] or None
    pos2_ptr,  # [N], or None where positives are named
    u_ptr,  # [padded, BLOCK_D]
    u_low_ptr,  # [padded, BLOCK_D] or None
    scale_ptr,  # [padded]
    partial_ptr,  # [2, splits, rows of all blocks]
    arrived_ptr,  # [blocks], zero
    lse2_ptr,  # [N]
    count_ptr,  # [N]
    share_ptr,  # [N]
    N,
    K,
    D,
    view,
    stride_n,
    stride_d,
    scale2,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The logarithms log2 L_i, what anchors count, and that times q_i."""
    own_first = tl.program_id(0) * BLOCK_M
    rows = own_first + tl.arange(0, BLOCK_M)
    mask = rows < N
    shift = tl.zeros([BLOCK_M], tl.float32) - scale2
    total = tl.zeros([BLOCK_M], tl.float32)
    if losses_ptr is None:
        own_scale = tl.load(scale_ptr + rows) * scale2
        own, own_low = 0, 0
        if BLOCK_K == BLOCK_D:
            own, own_low = load_tile(u_ptr, u_low_ptr, own_first, BLOCK_M, BLOCK_D, False)
        # of all columns, keys and then bank
        key_tiles = 0
        if positive_ptr is None:
            key_tiles = tl.cdiv(N, BLOCK_N)
        tiles = key_tiles + tl.cdiv(K, BLOCK_N)
        begin = tl.program_id(1) * tiles // tl.num_programs(1)
        end = (tl.program_id(1) + 1) * tiles // tl.num_programs(1)
        if positive_ptr is None:
            for number in range(begin, tl.minimum(end, key_tiles)):
                columns = number * BLOCK_N + tl.arange(0, BLOCK_N)
                # a row meets the keys of its own view, and its own key elsewhere
                excluded = rows[:, None] // view != columns[None, :] // view
                excluded |= (rows[:, None] == columns[None, :]) | (columns >= N)[None, :]
                shift, total = _add_exponentials(
                    shift,
                    total,
                    own,
                    own_low,
                    own_scale,
                    u_ptr,
                    u_low_ptr,
                    scale_ptr,
                    own_first,
                    N + number * BLOCK_N,
                    excluded,
                    BLOCK_M,
                    BLOCK_N,
                    BLOCK_K,
                    BLOCK_D,
                )
            bank_first = 2 * N
        else:
            named = tl.load(positive_ptr + rows, mask=mask, other=-1)
            bank_first = N
        for number in range(tl.maximum(begin, key_tiles), end):
            first = (number - key_tiles) * BLOCK_N
            columns = first + tl.arange(0, BLOCK_N)
            excluded = (columns >= K)[None, :]
            if positive_ptr is not None:
                excluded |= named[:, None] == columns[None, :]
            shift, total = _add_exponentials(
                shift,
                total,
                own,
                own_low,
                own_scale,
                u_ptr,
                u_low_ptr,
                scale_ptr,
                own_first,
                bank_first + first,
                excluded,
                BLOCK_M,
                BLOCK_N,
                BLOCK_K,
                BLOCK_D,
            )
        width = tl.num_programs(0) * BLOCK_M
        sums_ptr = partial_ptr + tl.num_programs(1) * width
        tl.store(partial_ptr + tl.program_id(1) * width + rows, shift)
        tl.store(sums_ptr + tl.program_id(1) * width + rows, total)
        tl.debug_barrier()
        arrived = tl.atomic_add(arrived_ptr + tl.program_id(0), 1, sem="acq_rel")
        if arrived < tl.num_programs(1) - 1:
            return
        tl.debug_barrier()
        shift = tl.load(partial_ptr + rows)
        total = tl.load(sums_ptr + rows)
        for split in range(1, tl.num_programs(1)):
            other_shift = tl.load(partial_ptr + split * width + rows)
            other = tl.load(sums_ptr + split * width + rows)
            new_shift = tl.maximum(shift, other_shift)
            total = total * tl.exp2(shift - new_shift) + other * tl.exp2(other_shift - new_shift)
            shift = new_shift

    if positive_ptr is None:
        pos2 = tl.load(pos2_ptr + rows, mask=mask, other=0.0)
    else:
        z, norm = load_raw(anchor_ptr, stride_n, stride_d, rows, mask, D, BLOCK_D)
        pos2 = scale2 * positive_logits(
            z, norm, bank_ptr, positive_ptr, D, 1, rows, mask, K, D, BLOCK_D
        )
    if losses_ptr is None:
        margin = (shift + tl.log2(total) - pos2) * LN2
        ratio = tl.exp(-tl.abs(margin))
        loss = tl.maximum(margin, 0.0) + log1p(ratio)
        q = tl.where(margin > 0, 1.0, ratio) / (1.0 + ratio)
    else:
        loss = tl.load(losses_ptr + rows, mask=mask, other=0.0)
        # 1 - exp(-loss), as exact for a small loss as for a large one
        decay = tl.exp(-loss)
        small = tl.where(decay == 1.0, 1.0, loss / -tl.log(tl.where(decay == 1.0, 0.5, decay)))
        q = tl.where(decay == 1.0, loss, (1.0 - decay) * tl.where(loss < 1.0, small, 1.0))
    if weight_ptr is None:
        count = 1.0 / N + tl.zeros([BLOCK_M], tl.float32)
    else:
        count = tl.load(weight_ptr + rows, mask=mask, other=0.0)
    tl.store(lse2_ptr + rows, pos2 + loss / LN2, mask=mask)
    tl.store(count_ptr + rows, count, mask=mask)
    tl.store(share_ptr + rows, count * q, mask=mask)


@triton.jit
def _update_kernel(
    bank_ptr,  # [K, D]
    velocity_ptr,  # [K, D]
    anchor_ptr,  # [N, D]
    positive_ptr,  # [N] or None
    lr_ptr,  # []
    u_ptr,  # [padded, BLOCK_D]
    u_low_ptr,  # [padded, BLOCK_D] or None
    scale_ptr,  # [padded]
    lse2_ptr,  # [N]
    count_ptr,  # [N]
    share_ptr,  # [N]
    N,
    K,
    D,
    bank_first,
    stride_n,
    stride_d,
    scale2,
    grad_scale,
    momentum,
    weight_decay,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradient, velocity and update of the rows of the bank that a program owns."""
    entries = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    own_first = bank_first + tl.program_id(0) * BLOCK_M
    own_scale = tl.load(scale_ptr + bank_first + entries) * scale2
    own, own_low = 0, 0
    if BLOCK_K == BLOCK_D:
        own, own_low = load_tile(u_ptr, u_low_ptr, own_first, BLOCK_M, BLOCK_D, False)
    exponent = tl.zeros([BLOCK_M], tl.float32) + MAX_EXPONENT
    du = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in range(0, N, BLOCK_N):
        tile, tile_low = load_tile(u_ptr, u_low_ptr, first, BLOCK_N, BLOCK_D, False)
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
        anchors = first + tl.arange(0, BLOCK_N)
        mask = anchors < N
        scale = tl.load(scale_ptr + anchors)
        s2 = dots * own_scale[:, None] * scale[None, :]
        if positive_ptr is not None:
            named = tl.load(positive_ptr + anchors, mask=mask, other=-1)
            s2 = tl.where(entries[:, None] == named[None, :], float("-inf"), s2)
        lse2 = tl.load(lse2_ptr + anchors, mask=mask, other=float("inf"))
        count = tl.load(count_ptr + anchors, mask=mask, other=0.0)
        # the anchors' scale is below 2 ** (1 - FP16_BITS)
        weights = tl.exp2(s2 - lse2[None, :]) * (count * scale * 2.0 ** (FP16_BITS - 1))[None, :]
        top = tl.maximum(tl.max(tl.abs(weights), axis=1), 2.0 ** (FP16_BITS - MAX_EXPONENT))
        new_exponent = tl.minimum(exponent, -tl.ceil(tl.log2(top)) + FP16_BITS)
        weights *= tl.exp2(new_exponent)[:, None]
        du *= tl.exp2(new_exponent - exponent)[:, None]
        exponent = new_exponent
        high = weights.to(tl.float16)
        du = tl.dot(high, tile, du)
        if u_low_ptr is not None:
            du = tl.dot((weights - high.to(tl.float32)).to(tl.float16), tile, du)
            du = tl.dot(high, tile_low, du)
    # downhill is away from the anchors
    du *= -tl.exp2(-exponent - (FP16_BITS - 1.0))[:, None]
    if positive_ptr is not None:
        du = take_from_named(
            du,
            anchor_ptr,
            positive_ptr,
            share_ptr,
            None,
            stride_n,
            stride_d,
            entries,
            N,
            D,
            BLOCK_D,
        )
    raw, norm = load_raw(bank_ptr, D, 1, entries, entries < K, D, BLOCK_D)
    w = unit(raw, norm)
    radial = tl.where(norm < EPS, 0.0, tl.sum(w * du, axis=1))
    gradient = (du - radial[:, None] * w) * (grad_scale / tl.where(norm < EPS, EPS, norm))[:, None]
    offs_d = tl.arange(0, BLOCK_D)
    offsets = entries.to(tl.int64)[:, None] * D + offs_d[None, :]
    stored = (entries < K)[:, None] & (offs_d < D)[None, :]
    velocity = tl.load(velocity_ptr + offsets, mask=stored, other=0.0)
    velocity = momentum * velocity + gradient + weight_decay * raw
    tl.store(velocity_ptr + offsets, velocity, mask=stored)
    tl.store(bank_ptr + offsets, raw - tl.load(lr_ptr) * velocity, mask=stored)


def tilings(D: int, *, exact: bool) -> Tilings:
    """Tilings for rows of D elements: those of the losses, where these leave registers.

    The update has rows of bank and velocity beside the gradient's sum.
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
    """The step in place.

    Args:
        bank: fp32, contiguous.
        velocity: fp32, contiguous.
        anchor: Rows, fp32, fp16 or bf16, any strides.
        keys: The anchors' positives, in their dtype; None where `positive` names these.
        positive: int64, the bank entry that is each anchor's positive.
        weight: fp32, what each anchor counts; None is 1 / N.
        losses: fp32, of the anchors; None where they are not known.
        lr: fp32, on the bank's device.
        views: Of anchors and keys; an anchor meets the keys of its own alone.
        temperature: T, positive.
        momentum: Of the velocity.
        weight_decay: Added to the gradient.
        exact: Keep rows in two parts.
        config: Tilings other than the default.
    """
    (N, D), K = anchor.shape, len(bank)
    tiles, own_tiles = config or tilings(D, exact=exact)
    scale2 = base2_scale(temperature)
    bank_first = N if keys is None else 2 * N
    own_blocks = triton.cdiv(N, tiles.rows)
    splits = 1 if losses is not None else splits_of(own_blocks, K, tiles, bank.device)
    positive, weight, losses = (
        None if t is None else t.contiguous() for t in (positive, weight, losses)
    )
    arrived = torch.empty(own_blocks, dtype=torch.float32, device=bank.device)
    partial = torch.empty(2, splits, own_blocks * tiles.rows, device=bank.device)
    rows = torch.empty(3, N, dtype=torch.float32, device=bank.device)
    padding = max(*tiles[:2], *own_tiles[:2])
    u, u_low, scale = scaled_memory(bank_first + K + padding, D, exact=exact, device=bank.device)

    def memory(first: int, end: int) -> tuple[Tensor, Tensor | None, Tensor]:
        return u[first:end], None if u_low is None else u_low[first:end], scale[first:end]

    with on_device_of(bank):
        pos2 = scaled_rows(
            anchor,
            keys,
            temperature,
            exact=exact,
            padding=0,
            pairs=keys is not None,
            into=memory(0, bank_first),
            zero=arrived,
        ).pos2
        scaled_rows(
            bank,
            None,
            temperature,
            exact=exact,
            padding=padding,
            pairs=False,
            into=memory(bank_first, len(u)),
        )
        _denominators_kernel[(own_blocks, splits)](
            anchor,
            bank,
            positive,
            weight,
            losses,
            pos2,
            u,
            u_low,
            scale,
            partial,
            arrived.view(torch.int32),
            *rows,
            N,
            K,
            D,
            N // views,
            *anchor.stride(),
            scale2,
            **blocks(tiles, D),
        )
        _update_kernel[(triton.cdiv(K, own_tiles.rows),)](
            bank,
            velocity,
            anchor,
            positive,
            lr,
            u,
            u_low,
            scale,
            *rows,
            N,
            K,
            D,
            bank_first,
            *anchor.stride(),
            scale2,
            1.0 / temperature,
            momentum,
            weight_decay,
            **blocks(own_tiles, D),
            # or the compiler spills for the sake of blocks that nobody wants
            maxnreg=own_tiles.registers,
        )
