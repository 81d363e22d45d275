"""NT-Xent in torch ops that never hold all n x n similarities, but blocks of rows or tiles.

Both peers follow the formula and nobody's code. They form the gradient in the forward pass.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

from benchmarks.case import Forms

# what tiles may take that are kept; ours needs no more than that at n = 16384
KEPT_TILES_BYTES = 64 * 2**20


def chunked(n: int, temperature: float) -> Forms:
    """Blocks of whole rows."""
    blocks = (256, 512, 1024) if n > 512 else (n // 2, n)
    return {f"rows of {block}": _blockwise(_RowBlocks, temperature, block) for block in blocks}


def chunked_symmetric(n: int, temperature: float) -> Forms:
    """Tiles of one triangle of the similarities, kept where they are few, or recomputed."""
    forms: Forms = {}
    for block in (256, 512) if n > 512 else (max(1, n // 4), n // 2):
        tiles = f"tiles of {block}"
        forms[f"{tiles}, recomputed"] = _blockwise(_SymmetricTiles, temperature, block, False)
        if 2 * n * (n + block) <= KEPT_TILES_BYTES:
            forms[f"{tiles}, kept"] = _blockwise(_SymmetricTiles, temperature, block, True)
    return forms


def _blockwise(function: type[_Blockwise], *settings: float) -> Callable[..., Tensor]:
    def loss(z0: Tensor, z1: Tensor) -> Tensor:
        z = torch.cat((z0, z1))
        z = z.float() if z.dtype in (torch.float16, torch.bfloat16) else z
        return function.apply(F.normalize(z), *settings)

    return loss


class _Blockwise(torch.autograd.Function):
    """The backward pass of a loss whose forward pass has formed the gradient already."""

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (dz,) = ctx.saved_tensors
        return (dz * grad, *(None for _ in ctx.needs_input_grad[1:]))


class _RowBlocks(_Blockwise):
    """Blocks of whole rows: three products and one exp for each element.

    With P = softmax over the row: dz = 1/(n T) (P z + P^T z - 2 z_positive).
    """

    @staticmethod
    def forward(ctx: FunctionCtx, z: Tensor, temperature: float, block: int) -> Tensor:
        n = len(z)
        buffer = z.new_empty(min(block, n), n)
        scaled, dz = z / temperature, torch.zeros_like(z)
        log_den = z.new_zeros(())
        for i in range(0, n, block):
            rows = z[i : i + block]
            p = torch.mm(scaled[i : i + block], z.t(), out=buffer[: len(rows)])
            p.sub_(1 / temperature).exp_()
            p.diagonal(i).zero_()
            den = p.sum(1, keepdim=True)
            log_den += den.log().sum()
            p.div_(den)
            dz[i : i + block].addmm_(p, z)
            dz.addmm_(p.t(), rows)
        return _finish(ctx, z, dz, log_den, temperature)


class _SymmetricTiles(_Blockwise):
    """Tiles on and above the diagonal, each used for its rows and for its columns.

    With E_ij = exp(s_ij - 1/T), E_ii = 0 and den = E 1:
    dz = 1/(n T) (G z - 2 z_positive),  G_ij = E_ij (1/den_i + 1/den_j).
    """

    @staticmethod
    def forward(ctx: FunctionCtx, z: Tensor, temperature: float, block: int, keep: bool) -> Tensor:
        n = len(z)
        scaled, dz, den = z / temperature, torch.zeros_like(z), z.new_zeros(n)
        slices = [slice(i, min(i + block, n)) for i in range(0, n, block)]
        pairs = [(a, b) for k, a in enumerate(slices) for b in slices[k:]]
        buffers = z.new_empty(2, block * block)

        def view(buffer: Tensor, a: slice, b: slice) -> Tensor:
            rows, columns = a.stop - a.start, b.stop - b.start
            return buffer[: rows * columns].view(rows, columns)

        def tile(a: slice, b: slice) -> Tensor:
            if keep:
                e = torch.mm(scaled[a], z[b].t())
            else:
                e = torch.mm(scaled[a], z[b].t(), out=view(buffers[0], a, b))
            e.sub_(1 / temperature).exp_()
            if a == b:
                e.fill_diagonal_(0)
            return e

        kept = []
        for a, b in pairs:
            e = tile(a, b)
            den[a] += e.sum(1)
            if a != b:
                den[b] += e.sum(0)
            if keep:
                kept.append(e)
        weight = den.reciprocal()
        for k, (a, b) in enumerate(pairs):
            e = kept[k] if keep else tile(a, b)
            both = torch.add(weight[a, None], weight[b], out=view(buffers[1], a, b))
            g = e.mul_(both)
            dz[a].addmm_(g, z[b])
            if a != b:
                dz[b].addmm_(g.t(), z[a])
        return _finish(ctx, z, dz, den.log().sum(), temperature)


def _finish(ctx: FunctionCtx, z: Tensor, dz: Tensor, log_den: Tensor, temperature: float) -> Tensor:
    """Adds the part of the positives, saves the gradient and returns the loss."""
    n = len(z)
    positive = z.roll(n // 2, 0)
    dz.sub_(positive, alpha=2).div_(n * temperature)
    ctx.save_for_backward(dz)
    similarity = torch.linalg.vecdot(z, positive).sum() / temperature
    return (log_den - similarity) / n + 1 / temperature
