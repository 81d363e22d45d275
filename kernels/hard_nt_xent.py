"""NT-Xent with hard and debiased negatives in Triton: loss and gradient in three launches.

With the weights w = exp(beta s) of the n negatives of row i, A_i = sum of w exp(s), B_i = sum of w
and tau the share of positives among them,

    Ng_i = n max((A_i / B_i - tau exp(s_i,pi)) / (1 - tau), exp(-1 / T))
    loss_i = log(Ng_i + exp(s_i,pi)) - s_i,pi
    d loss_i / d s_i,pi = -c_i
    c_i = (Ng_i + n tau / (1 - tau) exp(s_i,pi)) / (Ng_i + exp(s_i,pi))
    d loss_i / d s_ij = w_ij (h_i exp(s_ij) - v_i)
    h_i = (1 + beta) c_i / A_i,   v_i = beta c_i / B_i

or, for constant weights, h_i = c_i / A_i and v_i = 0; where the maximum is the second, h_i = v_i =
0 and c_i has no term with tau. Programs own rows: they walk over the columns once for the
sums, and once for the gradient, whose weights are those of the row and of the column, which is a
row too. Sums stay in fp32's range with the largest cosine as the shift, and leave room for the
factors of h; below T = 0.03 (1 + beta), where they would not, the shift is a running maximum.
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
    mean,
    negative_logits,
    scaled_rows,
    select_side,
    store_raw_grad,
    unit,
)
from ._softmax import softmax_loss

# from here up, over 1 + beta, exp(-2 (1 + beta) / T) is 1e9 times the smallest normal fp32 number
_FIXED_TEMPERATURE = 0.03


@triton.jit
def _hard_sums_kernel(
    u_ptr,  # [padded, BLOCK_D]
    u_low_ptr,  # [padded, BLOCK_D] or None
    scale_ptr,  # [padded]
    pos2_ptr,  # [N]
    c_ptr,  # [2N]
    h_ptr,  # [2N]
    v_ptr,  # [2N]
    shift_ptr,  # [2N]
    partial_ptr,  # [programs]
    N,
    scale2,
    beta,
    tau_plus,
    ONLINE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    DEBIASED: tl.constexpr,
    CONSTANT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Losses of the rows that a program owns, and what the gradient needs of them."""
    own_first = tl.program_id(0) * BLOCK_M
    rows = own_first + tl.arange(0, BLOCK_M)
    own_scale = tl.load(scale_ptr + rows) * scale2
    own, own_low = 0, 0
    if BLOCK_K == BLOCK_D:
        own, own_low = load_tile(u_ptr, u_low_ptr, own_first, BLOCK_M, BLOCK_D, False)
    # no logit is beyond these, but by a rounding
    shift = tl.zeros([BLOCK_M], tl.float32) + (-scale2 if ONLINE else scale2)
    total = tl.zeros([BLOCK_M], tl.float32)
    mass = tl.zeros([BLOCK_M], tl.float32)
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
            2 * N,
            first,
            2 * N,
            N,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            BLOCK_D,
            False,
        )
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

    is_row = rows < 2 * N
    pos2 = tl.load(pos2_ptr + tl.where(rows < N, rows, rows - N), mask=is_row, other=0.0)
    negatives = (2 * N - 2).to(tl.float32)
    if not WEIGHTED:
        mass += negatives
    # log2 of Ng / n over exp(s_i,pi)
    ratio2 = shift + tl.log2(total) - tl.log2(mass) - pos2
    floored = rows < 0
    if DEBIASED:
        # above any share that leaves something, but in fp32's range
        share = tau_plus * tl.exp2(tl.where(ratio2 < -100.0, 100.0, -ratio2))
        spent = share >= 1.0
        kept = tl.where(spent, 1.0, (1.0 - share) / (1.0 - tau_plus))
        debiased2 = ratio2 + tl.log2(kept)
        floor2 = -scale2 - pos2
        floored = spent | (debiased2 <= floor2)
        ratio2 = tl.where(floored, floor2, debiased2)
    margin = (ratio2 + tl.log2(negatives)) * LN2
    ratio = tl.exp(-tl.abs(margin))
    loss = tl.maximum(margin, 0.0) + log1p(ratio)
    q = tl.where(margin > 0, 1.0, ratio) / (1.0 + ratio)
    c = q
    if DEBIASED:
        others = tl.where(margin > 0, ratio, 1.0) / (1.0 + ratio)
        c += tl.where(floored, 0.0, others * negatives * tau_plus / (1.0 - tau_plus))
    free = tl.where(floored, 0.0, c)
    tl.store(c_ptr + rows, c, mask=is_row)
    tl.store(h_ptr + rows, free * (1.0 if CONSTANT else 1.0 + beta) / total, mask=is_row)
    tl.store(v_ptr + rows, free * (0.0 if CONSTANT else beta) / mass, mask=is_row)
    tl.store(shift_ptr + rows, shift, mask=is_row)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(tl.where(is_row, loss, 0.0)))


@triton.jit
def _hard_gradient_kernel(
    z0_ptr,  # [N, D]
    z1_ptr,  # [N, D]
    u_ptr,  # [padded, BLOCK_D]
    u_low_ptr,  # [padded, BLOCK_D] or None
    scale_ptr,  # [padded]
    c_ptr,  # [2N]
    h_ptr,  # [2N]
    v_ptr,  # [2N]
    shift_ptr,  # [2N]
    partial_ptr,  # [partials]
    loss_ptr,  # []
    dz_ptr,  # [2N, D]
    N,
    D,
    stride0_n,
    stride0_d,
    stride1_n,
    stride1_d,
    partials,
    scale2,
    beta,
    grad_scale,
    ONLINE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradients of the raw rows of one view that a program owns; the first adds up the loss."""
    side = tl.program_id(1)
    if (tl.program_id(0) == 0) & (side == 0):
        tl.store(loss_ptr, mean(partial_ptr, partials, 2 * N))
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_own = rows < N
    base = side * N
    own_first, own_end = base + tl.program_id(0) * BLOCK_M, base + N
    own_scale = tl.load(scale_ptr + own_first + tl.arange(0, BLOCK_M)) * scale2
    own, own_low = 0, 0
    if BLOCK_K == BLOCK_D:
        own, own_low = load_tile(u_ptr, u_low_ptr, own_first, BLOCK_M, BLOCK_D, False)
    own_h = tl.load(h_ptr + base + rows, mask=mask_own, other=0.0)[:, None]
    own_v = tl.load(v_ptr + base + rows, mask=mask_own, other=0.0)[:, None]
    own_shift = tl.load(shift_ptr + base + rows, mask=mask_own, other=0.0)[:, None]
    exponent = tl.zeros([BLOCK_M], tl.float32) + MAX_EXPONENT
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
        columns = first + tl.arange(0, BLOCK_N)
        mask_n = columns < 2 * N
        h = tl.load(h_ptr + columns, mask=mask_n, other=0.0)[None, :]
        v = tl.load(v_ptr + columns, mask=mask_n, other=0.0)[None, :]
        if ONLINE:
            shift = tl.load(shift_ptr + columns, mask=mask_n, other=0.0)[None, :]
            from_row, from_column = s2 - own_shift, s2 - shift
            weights = tl.exp2((1.0 + beta) * from_row) * own_h
            weights += tl.exp2((1.0 + beta) * from_column) * h
            if WEIGHTED:
                weights -= tl.exp2(beta * from_row) * own_v + tl.exp2(beta * from_column) * v
        else:
            below = s2 - scale2
            weights = tl.exp2(below) * (own_h + h)
            if WEIGHTED:
                weights = tl.exp2(beta * below) * (weights - (own_v + v))
        # for fp16: a row's weights are scaled by a power of two that follows the largest so far
        weights *= (scale * 2.0 ** (FP16_BITS - 1))[None, :]
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
    du *= tl.exp2(-exponent - (FP16_BITS - 1.0))[:, None]

    c = tl.load(c_ptr + rows, mask=mask_own, other=0.0)
    c += tl.load(c_ptr + N + rows, mask=mask_own, other=0.0)
    z_ptr, stride_n, stride_d, _ = select_side(
        z0_ptr, z1_ptr, stride0_n, stride0_d, stride1_n, stride1_d, N, N, 1 - side
    )
    other, other_norm = load_raw(z_ptr, stride_n, stride_d, rows, mask_own, D, BLOCK_D)
    du -= c[:, None] * unit(other, other_norm)
    z_ptr, stride_n, stride_d, _ = select_side(
        z0_ptr, z1_ptr, stride0_n, stride0_d, stride1_n, stride1_d, N, N, side
    )
    z, norm = load_raw(z_ptr, stride_n, stride_d, rows, mask_own, D, BLOCK_D)
    dz_ptr += base.to(tl.int64) * D
    store_raw_grad(dz_ptr, du * grad_scale, z, norm, rows, N, D, BLOCK_D)


def tiling(D: int, *, exact: bool) -> Tiling:
    """Tiling for rows of D <= 256 elements, kept in two parts where `exact`."""
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
        The loss, fp32 [], and dz, fp32 [2N, D], rows 0 to N - 1 for z0; [0] where not wanted.
    """
    N, D = z0.shape
    # NT-Xent as it is, of which half a matrix is enough
    if N == 1 or beta == tau_plus == 0:
        grads = (grad, grad)
        loss, dz = softmax_loss(z0, z1, temperature, stacked=True, grads=grads, exact=exact)
        return loss, dz if grad else dz.view(0)
    exact = exact and z0.dtype == torch.float32
    tiles = config or tiling(D, exact=exact)
    partials = triton.cdiv(2 * N, tiles.rows)
    statistics = torch.empty(4, 2 * N, dtype=torch.float32, device=z0.device)
    partial = torch.empty(partials, dtype=torch.float32, device=z0.device)
    loss = torch.empty((), dtype=torch.float32, device=z0.device)
    dz = torch.empty((2 * N, D) if grad else 0, dtype=torch.float32, device=z0.device)
    scale2 = base2_scale(temperature)
    form = {"ONLINE": temperature < _FIXED_TEMPERATURE * (1 + beta), "WEIGHTED": beta > 0}
    with on_device_of(z0):
        padding = max(tiles.rows, tiles.columns)
        u, u_low, scale, pos2, _ = scaled_rows(z0, z1, temperature, exact=exact, padding=padding)
        _hard_sums_kernel[(partials,)](
            u,
            u_low,
            scale,
            pos2,
            *statistics,
            partial,
            N,
            scale2,
            float(beta),
            float(tau_plus),
            DEBIASED=tau_plus > 0,
            CONSTANT=detach_weights,
            **form,
            **blocks(tiles, D),
        )
        if not grad:
            _mean_kernel[(1,)](partial, loss, partials, 2 * N)
            return loss, dz
        _hard_gradient_kernel[(triton.cdiv(N, tiles.rows), 2)](
            z0,
            z1,
            u,
            u_low,
            scale,
            *statistics,
            partial,
            loss,
            dz,
            N,
            D,
            *z0.stride(),
            *z1.stride(),
            partials,
            scale2,
            float(beta),
            1.0 / (2 * N * temperature),
            **form,
            **blocks(tiles, D),
            # or the compiler spills for the sake of blocks that nobody wants
            maxnreg=tiles.registers,
        )
    return loss, dz
