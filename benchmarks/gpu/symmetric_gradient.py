"""The other way to the gradient of NT-Xent, to measure beside the one that is shipped.

`kernels/_softmax.py` owns rows and computes every similarity twice: 4 n^2 D FLOPs, the same bits at
every run. The weights P_ij + P_ji are symmetric, so a tile could serve its rows and its columns:
3 n^2 D FLOPs, but the columns' part, as large as the tile's rows of u, goes to memory by atomic
additions, in an order that changes from run to run. Which is faster is for the GPU to say:
`benchmarks/gpu_suite.py` times both.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from clae_fast.kernels._launch import Tiling, blocks, padded, resident_programs
from clae_fast.kernels._rows import FP16_BITS, load_tile, mask_logits


@triton.jit
def _symmetric_gradient_kernel(
    u_ptr,  # [padded, BLOCK_D]
    scale_ptr,  # [padded]
    inverse_ptr,  # [n]
    du_ptr,  # [n, BLOCK_D], zero
    N,
    n,
    scale2,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Strips of tiles as `_negatives_kernel` deals them out; sums of (P_ij + P_ji) u_j."""
    PARTS: tl.constexpr = BLOCK_M // BLOCK_N
    high_blocks = tl.cdiv(n, BLOCK_M)
    strip = (high_blocks // 2 + 1) * PARTS
    tiles = high_blocks.to(tl.int64) * strip
    begin = tiles * tl.program_id(0) // tl.num_programs(0)
    end = tiles * (tl.program_id(0) + 1) // tl.num_programs(0)
    offs_d = tl.arange(0, BLOCK_D)
    for number in range(begin // strip, tl.cdiv(end, strip)):
        block = tl.cast(number, tl.int32)
        start = tl.maximum(begin - number * strip, 0).to(tl.int32)
        length = strip - PARTS * ((high_blocks % 2 == 0) & (2 * block >= high_blocks)).to(tl.int32)
        stop = tl.minimum(end - number * strip, length).to(tl.int32)
        own_first = block * BLOCK_M
        offs_own = own_first + tl.arange(0, BLOCK_M)
        own, _ = load_tile(u_ptr, None, own_first, BLOCK_M, BLOCK_D, False)
        own_scale = tl.load(scale_ptr + offs_own)
        own_inverse = tl.load(inverse_ptr + offs_own, mask=offs_own < n, other=0.0)
        du = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for step in range(start, stop):
            column = block * PARTS + step
            column = tl.where(column < high_blocks * PARTS, column, column - high_blocks * PARTS)
            first = column * BLOCK_N
            offs_n = first + tl.arange(0, BLOCK_N)
            tile, _ = load_tile(u_ptr, None, first, BLOCK_N, BLOCK_D, False)
            scale = tl.load(scale_ptr + offs_n)
            inverse = tl.load(inverse_ptr + offs_n, mask=offs_n < n, other=0.0)
            scales = own_scale[:, None] * scale[None, :]
            s2 = tl.dot(own, tl.trans(tile)) * scales * scale2
            s2 = mask_logits(s2, own_first, n, first, n, N, BLOCK_M, BLOCK_N)
            # with the scales of both sides the weights stay symmetric
            weights = tl.exp2(s2) * (own_inverse[:, None] + inverse[None, :]) * scales
            top = tl.maximum(tl.max(weights), 1e-30)
            exponent = FP16_BITS * 1.0 - tl.ceil(tl.log2(top))
            half = (weights * tl.exp2(exponent)).to(tl.float16)
            du += tl.dot(half, tile) * tl.exp2(-exponent)
            if step >= PARTS:
                part = tl.dot(tl.trans(half), own) * (tl.exp2(-exponent) / scale)[:, None]
                offsets = offs_n.to(tl.int64)[:, None] * BLOCK_D + offs_d[None, :]
                tl.atomic_add(du_ptr + offsets, part, mask=(offs_n < n)[:, None], sem="relaxed")
        offsets = offs_own.to(tl.int64)[:, None] * BLOCK_D + offs_d[None, :]
        mask = (offs_own < n)[:, None]
        tl.atomic_add(du_ptr + offsets, du / own_scale[:, None], mask=mask, sem="relaxed")


def symmetric_gradient(
    u: Tensor,  # [n + padding, width]
    scale: Tensor,  # [n + padding]
    inverse: Tensor,  # [n]
    du: Tensor,  # [n, width]
    scale2: float,
    tiles: Tiling,
) -> None:
    """Adds the negatives' part of NT-Xent's du to `du`.

    Args:
        u: Rows as `clae_fast.kernels._rows.scaled_rows` makes them.
        scale: Their scales; of the padding, too.
        inverse: One over the rows' softmax denominators.
        du: Zeros.
        scale2: What makes base-2 logits of cosines.
        tiles: The tiling.
    """
    n = len(inverse)
    _symmetric_gradient_kernel[(resident_programs(u.device),)](
        u, scale, inverse, du, n // 2, n, scale2, **blocks(tiles, u.shape[1])
    )


def example(n: int, D: int, device: torch.device, tiles: Tiling) -> tuple[Tensor, ...]:
    """Operands of `symmetric_gradient` but for the last two, with denominators of random rows."""
    u = torch.zeros(n + tiles.rows, padded(D), dtype=torch.float16, device=device)
    rows = torch.nn.functional.normalize(torch.randn(n, D, device=device))
    u[:n, :D] = (rows * 2.0**13).half()
    scale = torch.full((n + tiles.rows,), 2.0**-13, device=device)
    inverse = torch.rand(n, device=device) / n
    return u, scale, inverse, torch.zeros(n, padded(D), device=device)
