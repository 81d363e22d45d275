"""NT-Xent with hard and debiased negatives in Triton: loss and gradient in three launches.

Row i has n negatives, with the weights w = exp(beta s), and tau is the share of positives among
them. With A_i = sum of w exp(s) and B_i = sum of w,

    Ng_i = n max((A_i / B_i - tau exp(s_i,pi)) / (1 - tau), exp(-1 / T))
    loss_i = log(Ng_i + exp(s_i,pi)) - s_i,pi
    d loss_i / d s_i,pi = -c_i
    c_i = (Ng_i + n tau / (1 - tau) exp(s_i,pi)) / (Ng_i + exp(s_i,pi))
    d loss_i / d s_ij = w_ij (h_i exp(s_ij) - v_i)
    h_i = (1 + beta) c_i / A_i,   v_i = beta c_i / B_i

Constant weights have h_i = c_i / A_i and v_i = 0. Where the maximum is exp(-1 / T), h_i = v_i = 0
and c_i has no term with tau.

Programs own rows. They walk over the columns once for the sums and once for the gradient, which
needs the weights of the row and those of the column, since that is a row too. With the largest
possible cosine as the shift, the sums stay in the range of fp32 and leave room for the factors of
h. Below T = 0.03 (1 + beta) they would not, and the shift is a running maximum.
"""

from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._gradient import softmax_loss
from ._launch import Compilations, Tiling, blocks, cdiv, meta_rows, on_device_of, padded, workspace
from ._rows import (
    FP16_BITS,
    LN2,
    MAX_EXPONENT,
    _mean_kernel,
    add_rescaled,
    load_own,
    load_raw,
    load_unit,
    matrix,
    mean,
    negative_logits,
    normalize,
    scaled_memory,
    select_side,
    sigmoid,
    softplus,
    store_raw_grad,
    unscaled,
)

# from here up, times 1 + beta, exp(-2 (1 + beta) / T) is 1e9 times the least normal fp32 number
_FIXED_TEMPERATURE = 0.03


class HardStatistics(NamedTuple):
    """What the gradient needs to know of all 2N rows."""

    c_ptr: Tensor  # [2N]
    h_ptr: Tensor  # [2N]
    v_ptr: Tensor  # [2N]
    shift_ptr: Tensor  # [2N], of the exponentials in h and v
    partial_ptr: Tensor  # [programs] parts of the losses' sum


@triton.jit
def _hard_sums_kernel(
    rows,  # ScaledRows
    pos2_ptr,  # [N]
    stats,  # HardStatistics
    N,
    beta,
    tau_plus,
    ONLINE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    DEBIASED: tl.constexpr,
    CONSTANT: tl.constexpr,
    blocks,  # Blocks
):
    """Computes the losses of the rows that a program owns, and their statistics."""
    BLOCK_M: tl.constexpr = blocks.BLOCK_M
    n = 2 * N
    own_first = tl.program_id(0) * BLOCK_M
    own = load_own(rows, rows.u_ptr, own_first, n, blocks)
    # no logit is beyond these, but by a rounding
    shift = tl.zeros([BLOCK_M], tl.float32) + (-rows.scale2 if ONLINE else rows.scale2)
    total = tl.zeros([BLOCK_M], tl.float32)
    mass = tl.zeros([BLOCK_M], tl.float32)
    for first in range(0, n, blocks.BLOCK_N):
        s2, _, _ = negative_logits(rows, own, rows.u_ptr, first, n, N, blocks)
        if ONLINE:
            new_shift = tl.maximum(shift, tl.max(s2, axis=1))
            total *= tl.exp2((1.0 + beta) * (shift - new_shift))
            mass *= tl.exp2(beta * (shift - new_shift))
            shift = new_shift
        below = s2 - shift[:, None]
        exp = tl.exp2(below)
        if WEIGHTED:
            weights = tl.exp2(beta * below)
            exp *= weights
            mass += tl.sum(weights, axis=1)
        total += tl.sum(exp, axis=1)

    offs_m = own_first + tl.arange(0, BLOCK_M)
    mask_m = offs_m < n
    pos2 = tl.load(pos2_ptr + tl.where(offs_m < N, offs_m, offs_m - N), mask=mask_m, other=0.0)
    negatives = (n - 2).to(tl.float32)
    if not WEIGHTED:
        mass += negatives
    # log2 of Ng / n, divided by exp(s_i,pi)
    ratio2 = shift + tl.log2(total) - tl.log2(mass) - pos2
    floored = offs_m < 0
    if DEBIASED:
        # where the ratio is tiny: more than any share that leaves something, but in fp32's range
        share = tau_plus * tl.exp2(tl.where(ratio2 < -100.0, 100.0, -ratio2))
        spent = share >= 1.0
        kept = tl.where(spent, 1.0, (1.0 - share) / (1.0 - tau_plus))
        debiased2 = ratio2 + tl.log2(kept)
        floor2 = -rows.scale2 - pos2
        floored = spent | (debiased2 <= floor2)
        ratio2 = tl.where(floored, floor2, debiased2)
    margin = (ratio2 + tl.log2(negatives)) * LN2
    c = sigmoid(margin)
    if DEBIASED:
        others = sigmoid(-margin) * negatives * tau_plus / (1.0 - tau_plus)
        c += tl.where(floored, 0.0, others)
    free = tl.where(floored, 0.0, c)
    tl.store(stats.c_ptr + offs_m, c, mask=mask_m)
    tl.store(stats.h_ptr + offs_m, free * (1.0 if CONSTANT else 1.0 + beta) / total, mask=mask_m)
    tl.store(stats.v_ptr + offs_m, free * (0.0 if CONSTANT else beta) / mass, mask=mask_m)
    tl.store(stats.shift_ptr + offs_m, shift, mask=mask_m)
    loss = tl.sum(tl.where(mask_m, softplus(margin), 0.0))
    tl.store(stats.partial_ptr + tl.program_id(0), loss)


@triton.jit
def _hard_gradient_kernel(
    z0,  # Matrix [N, D]
    z1,  # Matrix [N, D]
    rows,  # ScaledRows
    stats,  # HardStatistics
    loss_ptr,  # []
    dz_ptr,  # [2N, D]
    partials,
    beta,
    grad_scale,
    ONLINE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    blocks,  # Blocks
):
    """Computes the gradients of the raw rows of one view that a program owns.

    The first program adds up the loss.
    """
    BLOCK_M: tl.constexpr = blocks.BLOCK_M
    BLOCK_D: tl.constexpr = blocks.BLOCK_D
    N = z0.N
    n = 2 * N
    side = tl.program_id(1)
    if (tl.program_id(0) == 0) & (side == 0):
        tl.store(loss_ptr, mean(stats.partial_ptr, partials, n))
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < N
    base = side * N
    own = load_own(rows, rows.u_ptr, base + tl.program_id(0) * BLOCK_M, base + N, blocks)
    own_h = tl.load(stats.h_ptr + base + offs_m, mask=mask_m, other=0.0)[:, None]
    own_v = tl.load(stats.v_ptr + base + offs_m, mask=mask_m, other=0.0)[:, None]
    own_shift = tl.load(stats.shift_ptr + base + offs_m, mask=mask_m, other=0.0)[:, None]
    exponent = tl.zeros([BLOCK_M], tl.float32) + MAX_EXPONENT
    du = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in range(0, n, blocks.BLOCK_N):
        s2, columns, scale = negative_logits(rows, own, rows.u_ptr, first, n, N, blocks)
        offs_n = first + tl.arange(0, blocks.BLOCK_N)
        mask_n = offs_n < n
        h = tl.load(stats.h_ptr + offs_n, mask=mask_n, other=0.0)[None, :]
        v = tl.load(stats.v_ptr + offs_n, mask=mask_n, other=0.0)[None, :]
        if ONLINE:
            shift = tl.load(stats.shift_ptr + offs_n, mask=mask_n, other=0.0)[None, :]
            from_row, from_column = s2 - own_shift, s2 - shift
            weights = tl.exp2((1.0 + beta) * from_row) * own_h
            weights += tl.exp2((1.0 + beta) * from_column) * h
            if WEIGHTED:
                weights -= tl.exp2(beta * from_row) * own_v + tl.exp2(beta * from_column) * v
        else:
            below = s2 - rows.scale2
            weights = tl.exp2(below) * (own_h + h)
            if WEIGHTED:
                weights = tl.exp2(beta * below) * (weights - (own_v + v))
        weights *= (scale * 2.0 ** (FP16_BITS - 1))[None, :]
        du, exponent = add_rescaled(du, exponent, weights, columns, rows)
    du = unscaled(du, exponent)

    c = tl.load(stats.c_ptr + offs_m, mask=mask_m, other=0.0)
    c += tl.load(stats.c_ptr + N + offs_m, mask=mask_m, other=0.0)
    other = select_side(z0, z1, 1 - side)
    du -= c[:, None] * load_unit(other, offs_m, mask_m, BLOCK_D)
    dz_ptr += base.to(tl.int64) * z0.D
    raw, norm = load_raw(select_side(z0, z1, side), offs_m, mask_m, BLOCK_D)
    store_raw_grad(dz_ptr, du * grad_scale, raw, norm, offs_m, mask_m, z0.D, BLOCK_D)


def tiling(D: int, *, exact: bool) -> Tiling:
    """The tiling for rows of D <= 256 elements, which are kept in two parts where `exact`."""
    width = padded(D)
    rows = min(64, 8192 // width) // (1 + exact)
    return Tiling(rows, min(16 if exact else 32, rows), min(64 if exact else 128, width), 8, 2)


def hard_nt_xent(
    z0: Tensor,  # [N, D]
    z1: Tensor,  # [N, D]
    temperature: float,
    beta: float,
    tau_plus: float,
    detach_weights: bool,
    grad: bool,
    exact: bool = False,
    config: Tiling | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean loss of raw projections with hard and debiased negatives, and its gradient.

    Args:
        z0: First view [N, D], fp32, fp16 or bf16, any strides.
        z1: Second view, of the same shape, dtype and device.
        temperature: T, positive.
        beta: Concentration of the negatives' weights, not negative.
        tau_plus: Share of positives among the negatives, in [0, 1).
        detach_weights: Whether the weights are constants.
        grad: Whether the gradient is wanted.
        exact: Compute with fp32 rows to 22 bits instead of 11.
        config: A tiling other than the default.

    Returns:
        The loss, fp32 [], and dz, fp32 [2N, D]: rows 0 to N - 1 are for z0, the others for z1. dz
        has no elements where it is not wanted.
    """
    N, D = z0.shape
    # this is NT-Xent, of which half a matrix is enough
    if N == 1 or beta == tau_plus == 0:
        grads = (grad, grad)
        return softmax_loss(z0, z1, temperature, stacked=True, grads=grads, exact=exact)
    exact = exact and z0.dtype == torch.float32
    tiles = config or tiling(D, exact=exact)
    partials = cdiv(2 * N, tiles.rows)
    loss = torch.empty((), dtype=torch.float32, device=z0.device)
    dz = torch.empty((2 * N, D) if grad else 0, dtype=torch.float32, device=z0.device)
    pos2, *memory = workspace(z0.device, N, *(4 * [2 * N]), partials)
    stats = HardStatistics(*memory)
    size = 2 * N + max(tiles.rows, tiles.columns)
    rows = scaled_memory(size, D, temperature, exact=exact, device=z0.device)
    form = {"ONLINE": temperature < _FIXED_TEMPERATURE * (1 + beta), "WEIGHTED": beta > 0}
    with on_device_of(z0):
        normalize(z0, z1, rows, pos2=pos2)
        _hard_sums_kernel[(partials,)](
            rows,
            pos2,
            stats,
            N,
            float(beta),
            float(tau_plus),
            DEBIASED=tau_plus > 0,
            CONSTANT=detach_weights,
            **form,
            **blocks(tiles, D),
        )
        if not grad:
            _mean_kernel[(1,)](stats.partial_ptr, loss, partials, 2 * N)
            return loss, dz
        _hard_gradient_kernel[(cdiv(N, tiles.rows), 2)](
            matrix(z0),
            matrix(z1),
            rows,
            stats,
            loss,
            dz,
            partials,
            float(beta),
            1.0 / (2 * N * temperature),
            **form,
            **blocks(tiles, D),
            # or the compiler spills for the sake of blocks that nobody wants
            maxnreg=tiles.registers,
        )
    return loss, dz


def compilations() -> Compilations:
    """Calls that compile every kernel of this file at every default tiling."""
    for D, exact in ((64, False), (128, False), (128, True), (256, False)):
        z = meta_rows(D, exact=exact)
        for case, T, beta in (("", 0.5, 1.0), (" T=0.01", 0.01, 1.0), (" beta=0", 0.5, 0.0)):
            call = partial(hard_nt_xent, z, z, T, beta, 0.1, False, True, exact)
            yield f"D={D}{exact * ' exact'}{case}", call
