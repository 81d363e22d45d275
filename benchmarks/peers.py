"""The NT-Xent losses that ours is measured against, each in the best form known to us.

A peer is a name and its *forms*: ways to write the same thing, or settings such as a block size.
`prepare` checks every form against the float64 reference and keeps the fastest, so that a peer is
judged by its best and a wrong one is never timed. All take raw projections z0, z1 of shape [N, D]
and return the scalar loss

    L = 1/(2N) sum_i [ log sum_{j != i} exp(s_ij) - s_{i, i +- N} ],   s_ij = cos(z_i, z_j) / T

over the 2N rows of z = [z0; z1], and all are differentiated by `torch.autograd.grad`.

The forms written in torch ops follow the formula and nobody's code. `released` does what CLAE's
repository does at every call: cosine similarities by broadcasting, O(n^2 D) work and memory without
a matrix product, and a boolean mask of the negatives that lives on the CPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

import clae_fast.reference
from benchmarks.memory import available_bytes
from benchmarks.timing import fastest

Loss = Callable[[Tensor, Tensor], Tensor]

# relative error of loss and gradient above which a form counts as wrong
TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 5e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}
# what torch_chunked_symmetric may keep; ours has to do with the same at n = 16384
KEPT_TILES_BYTES = 64 * 2**20


class UnavailableError(Exception):
    """A peer that cannot run here or at this size; the message says why."""


@dataclass(frozen=True)
class Peer:
    """One peer.

    Attributes:
        forms: `forms(n, temperature)` gives the ways to write it at n = 2N rows, by name.
        peak: Peak memory of loss and gradient in bytes, about: `peak(n, D, itemsize)`.
    """

    forms: Callable[[int, float], dict[str, Loss]]
    peak: Callable[[int, int, int], float]


@dataclass(frozen=True)
class Prepared:
    """A checked loss, ready to be timed."""

    form: str
    loss: Loss
    error: float


def value_and_grad(loss: Loss, z0: Tensor, z1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and the gradients of both leaves: what is timed."""
    value = loss(z0, z1)
    return (value.detach(), *torch.autograd.grad(value, (z0, z1)))


def paired_views(n: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two leaves [n/2, dim]: unit normal rows, and the same with noise of half that size."""
    generator = torch.Generator().manual_seed(0)
    z0 = torch.randn(n // 2, dim, generator=generator)
    z1 = z0 + 0.5 * torch.randn(n // 2, dim, generator=generator)
    return z0.to(dtype).requires_grad_(), z1.to(dtype).requires_grad_()


def oracle(z0: Tensor, z1: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients in float64 by the reference implementation."""
    z0, z1 = (z.detach().double().requires_grad_() for z in (z0, z1))
    loss = partial(clae_fast.reference.nt_xent, temperature=temperature)
    return value_and_grad(loss, z0, z1)


def relative_error(
    loss: Loss, z0: Tensor, z1: Tensor, truth: tuple[Tensor, Tensor, Tensor]
) -> float:
    """The larger of the loss's and the gradient's relative error, NaN where either is."""
    got = value_and_grad(loss, z0, z1)
    value = (got[0].double() - truth[0]).abs() / truth[0].abs()
    wrong = torch.stack([(g.double() - t).norm() for g, t in zip(got[1:], truth[1:], strict=True)])
    size = torch.stack([t.norm() for t in truth[1:]])
    return torch.maximum(value, wrong.norm() / size.norm()).item()


def prepare(
    forms: dict[str, Loss],
    z0: Tensor,
    z1: Tensor,
    truth: tuple[Tensor, Tensor, Tensor],
) -> Prepared:
    """Check every form of a loss on these views and keep the fastest.

    Raises:
        UnavailableError: A form fails, or it is wrong.
    """
    errors = {}
    for form, loss in forms.items():
        try:
            errors[form] = relative_error(loss, z0, z1, truth)
        except (RuntimeError, MemoryError) as error:
            reason = (str(error) or type(error).__name__).strip().splitlines()[0]
            raise UnavailableError(reason) from error
        if not errors[form] <= TOLERANCE[z0.dtype]:
            off = f"{errors[form]:.1e} off the float64 reference"
            raise UnavailableError(f"wrong, {off}{form and f' ({form})'}")
    best = fastest({form: partial(value_and_grad, forms[form], z0, z1) for form in forms})
    return Prepared(best, forms[best], errors[best])


def prepare_peer(
    name: str, z0: Tensor, z1: Tensor, temperature: float, truth: tuple[Tensor, Tensor, Tensor]
) -> Prepared:
    """`prepare` for one of PEERS.

    Raises:
        UnavailableError: Its package is missing, memory is too short, a form fails or is wrong.
    """
    n, dim = 2 * len(z0), z0.shape[1]
    need = PEERS[name].peak(n, dim, z0.element_size())
    if need > 0.8 * available_bytes():
        raise UnavailableError(f"needs about {need / 2**30:.0f} GiB of memory")
    return prepare(PEERS[name].forms(n, temperature), z0, z1, truth)


def _released(n: int, temperature: float) -> dict[str, Loss]:
    return {"": released_nt_xent(n, temperature)}


def released_nt_xent(n: int, temperature: float, device: torch.device | None = None) -> Loss:
    """NT-Xent as CLAE's repository computes it, for batches of n = 2N rows.

    Its mask of the negatives stays on the CPU whatever the device, and indexes at every call. With
    `device`, the indices that it stands for are there once and for all.
    """
    half = n // 2
    mask = ~(torch.eye(n) + torch.eye(n).roll(half, 0)).bool()
    negative = mask if device is None else mask.to(device).nonzero(as_tuple=True)

    def loss(z0: Tensor, z1: Tensor) -> Tensor:
        z = torch.cat((F.normalize(z0), F.normalize(z1)))
        similarity = F.cosine_similarity(z.unsqueeze(1), z.unsqueeze(0), dim=2) / temperature
        positives = torch.cat((similarity.diagonal(half), similarity.diagonal(-half)))
        negatives = similarity[negative].view(n, -1)
        logits = torch.cat((positives.unsqueeze(1), negatives), dim=1)
        labels = torch.zeros(n, dtype=torch.long, device=z.device)
        return F.cross_entropy(logits, labels, reduction="sum") / n

    return loss


def _lightly(n: int, temperature: float) -> dict[str, Loss]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from lightly.loss import NTXentLoss
        except ImportError as error:
            raise UnavailableError("lightly is not installed (the extra `bench` has it)") from error
    return {"": NTXentLoss(temperature=temperature)}


def _pytorch_metric_learning(n: int, temperature: float) -> dict[str, Loss]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from pytorch_metric_learning import losses
        except ImportError as error:
            raise UnavailableError(
                "pytorch-metric-learning is not installed (the extra `bench` has it)"
            ) from error
    forms = {"SupConLoss": losses.SelfSupervisedLoss(losses.SupConLoss(temperature))}
    # NTXentLoss gives the same value but holds n x n(n - 2) numbers: 16 times SupConLoss's time at
    # n = 128, and out of memory soon after
    if n <= 128:
        forms["NTXentLoss"] = losses.SelfSupervisedLoss(losses.NTXentLoss(temperature))
    return forms


def _torch_eager(n: int, temperature: float) -> dict[str, Loss]:
    diagonal = torch.eye(n, dtype=torch.bool)
    labels = torch.arange(n).roll(n // 2)

    def straight(z0: Tensor, z1: Tensor) -> Tensor:
        z = F.normalize(torch.cat((z0, z1)))
        logits = torch.mm(z, z.t()) / temperature
        return F.cross_entropy(logits.masked_fill(diagonal, -torch.inf), labels)

    def in_place(z0: Tensor, z1: Tensor) -> Tensor:
        z = F.normalize(torch.cat((z0, z1)))
        logits = torch.mm(z / temperature, z.t()).fill_diagonal_(-torch.inf)
        return F.cross_entropy(logits, labels)

    return {"straight": straight, "in place": in_place}


def _torch_compile(n: int, temperature: float) -> dict[str, Loss]:
    def straight(z0: Tensor, z1: Tensor) -> Tensor:
        z = F.normalize(torch.cat((z0, z1)))
        diagonal = torch.eye(n, dtype=torch.bool)
        logits = (torch.mm(z, z.t()) / temperature).masked_fill(diagonal, -torch.inf)
        return F.cross_entropy(logits, torch.arange(n).roll(n // 2))

    torch.compiler.reset()
    return {"": torch.compile(straight, fullgraph=True, dynamic=False)}


def _torch_chunked(n: int, temperature: float) -> dict[str, Loss]:
    blocks = (256, 512, 1024) if n > 512 else (n // 2, n)
    return {f"rows of {block}": _blockwise(_RowBlocks, temperature, block) for block in blocks}


def _torch_chunked_symmetric(n: int, temperature: float) -> dict[str, Loss]:
    forms: dict[str, Loss] = {}
    for block in (256, 512) if n > 512 else (max(1, n // 4), n // 2):
        tiles = f"tiles of {block}"
        forms[f"{tiles}, recomputed"] = _blockwise(_SymmetricTiles, temperature, block, False)
        if 2 * n * (n + block) <= KEPT_TILES_BYTES:
            forms[f"{tiles}, kept"] = _blockwise(_SymmetricTiles, temperature, block, True)
    return forms


PEERS = {
    "released": Peer(_released, lambda n, d, size: 6.2 * n * n * d * size),
    "lightly": Peer(_lightly, lambda n, d, size: 4.5 * n * n * size),
    "pytorch_metric_learning": Peer(_pytorch_metric_learning, lambda n, d, size: 13 * n * n * size),
    "torch_eager": Peer(_torch_eager, lambda n, d, size: 3.5 * n * n * size),
    "torch_compile": Peer(_torch_compile, lambda n, d, size: 1.2 * n * n * size),
    "torch_chunked": Peer(_torch_chunked, lambda n, d, size: 4.0 * n * (1024 + 4 * d)),
    "torch_chunked_symmetric": Peer(
        _torch_chunked_symmetric, lambda n, d, size: KEPT_TILES_BYTES + 16.0 * n * d
    ),
}


def _blockwise(function: type[_Blockwise], *settings: float) -> Loss:
    def loss(z0: Tensor, z1: Tensor) -> Tensor:
        z = torch.cat((z0, z1))
        z = z.float() if z.dtype in (torch.float16, torch.bfloat16) else z
        return function.apply(F.normalize(z), *settings)

    return loss


class _Blockwise(torch.autograd.Function):
    """Forms the gradient in the forward pass, from blocks of the n x n similarities."""

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
    """Add the positives' part, save the gradient, return the loss."""
    n = len(z)
    positive = z.roll(n // 2, 0)
    dz.sub_(positive, alpha=2).div_(n * temperature)
    ctx.save_for_backward(dz)
    similarity = torch.linalg.vecdot(z, positive).sum() / temperature
    return (log_den - similarity) / n + 1 / temperature
