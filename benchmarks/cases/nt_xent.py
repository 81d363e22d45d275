"""NT-Xent of raw projections z0, z1 of shape [N, D], and the peers that compute it.

All return the scalar loss

    L = 1/(2N) sum_i [ log sum_{j != i} exp(s_ij) - s_{i, i +- N} ],   s_ij = cos(z_i, z_j) / T

over the n = 2N rows of z = [z0; z1], and all are differentiated by `torch.autograd.grad`. The peers
written in torch ops follow the formula and nobody's code. `released` does what CLAE's repository
does at every call: cosine similarities by broadcasting, with O(n^2 D) work and memory and without a
matrix product, and a boolean mask of the negatives that lives on the CPU.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import clae_fast
from benchmarks.case import Case, Forms, Peer, rows
from benchmarks.cases.blockwise import KEPT_TILES_BYTES, chunked, chunked_symmetric
from clae_fast import reference


def nt_xent(n: int, D: int = 128, temperature: float = 0.5) -> Case:
    """NT-Xent of n = 2N rows; its FLOPs are those of the form that recomputes similarities."""
    square, row, T = n * n, n * D, temperature
    on_gpu = {"gpu_only": True, "captured": True}
    peers = {
        "released": Peer(lambda device: {"": released_nt_xent(n, T)}, numbers=6.2 * square * D),
        "lightly": Peer(lambda device: _lightly(T), "lightly", 4.5 * square),
        "pytorch_metric_learning": Peer(
            lambda device: _metric_learning(n, T), "pytorch-metric-learning", 13 * square
        ),
        "torch_eager": Peer(partial(_eager, n, T), numbers=3.5 * square),
        "torch_compile": Peer(lambda device: _compile(n, T), numbers=1.2 * square, compiled=True),
        "torch_chunked": Peer(lambda device: chunked(n, T), numbers=1024 * n + 4 * row),
        "torch_chunked_symmetric": Peer(
            lambda device: chunked_symmetric(n, T), numbers=KEPT_TILES_BYTES / 4 + 4 * row
        ),
        "released, mask on the GPU": Peer(
            lambda device: {"": released_nt_xent(n, T, device)}, **on_gpu
        ),
        "mm + cross_entropy, TF32": Peer(
            lambda device: {"": _eager(n, T, device)["in place"]}, **on_gpu
        ),
    }
    for name, dtype in (("TF32", torch.float32), ("fp16", torch.float16)):
        forms = partial(_compile_to, dtype, T)
        peers[f"torch.compile, {name}"] = Peer(forms, compiled=True, **on_gpu)
    return Case(
        partial(rows, ((n // 2, D), (n // 2, D)), leaves=2),
        partial(clae_fast.nt_xent, temperature=T),
        partial(reference.nt_xent, temperature=T),
        peers,
        leaves=2,
        flops=4 * square * D,
    )


def released_nt_xent(
    n: int, temperature: float, device: torch.device | None = None
) -> Callable[[Tensor, Tensor], Tensor]:
    """NT-Xent as CLAE's repository computes it, for batches of n = 2N rows.

    Its mask of the negatives stays on the CPU whatever the device, and indexes at every call. With
    `device`, the indices that the mask stands for are made once, on that device.
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


def _lightly(temperature: float) -> Forms:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lightly.loss import NTXentLoss
    return {"": NTXentLoss(temperature=temperature)}


def _metric_learning(n: int, temperature: float) -> Forms:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from pytorch_metric_learning import losses
    forms = {"SupConLoss": losses.SelfSupervisedLoss(losses.SupConLoss(temperature))}
    # NTXentLoss gives the same value but holds n x n(n - 2) numbers: it takes 16 times as long as
    # SupConLoss at n = 128, and runs out of memory soon after
    if n <= 128:
        forms["NTXentLoss"] = losses.SelfSupervisedLoss(losses.NTXentLoss(temperature))
    return forms


def _eager(n: int, temperature: float, device: torch.device) -> Forms:
    diagonal = torch.eye(n, dtype=torch.bool, device=device)
    labels = torch.arange(n, device=device).roll(n // 2)

    def straight(z0: Tensor, z1: Tensor) -> Tensor:
        z = F.normalize(torch.cat((z0, z1)))
        logits = torch.mm(z, z.t()) / temperature
        return F.cross_entropy(logits.masked_fill(diagonal, -torch.inf), labels)

    def in_place(z0: Tensor, z1: Tensor) -> Tensor:
        z = F.normalize(torch.cat((z0, z1)))
        logits = torch.mm(z / temperature, z.t()).fill_diagonal_(-torch.inf)
        return F.cross_entropy(logits, labels)

    return {"straight": straight, "in place": in_place}


def _compile(n: int, temperature: float) -> Forms:
    def straight(z0: Tensor, z1: Tensor) -> Tensor:
        z = F.normalize(torch.cat((z0, z1)))
        diagonal = torch.eye(n, dtype=torch.bool)
        logits = (torch.mm(z, z.t()) / temperature).masked_fill(diagonal, -torch.inf)
        return F.cross_entropy(logits, torch.arange(n).roll(n // 2))

    torch.compiler.reset()
    return {"": torch.compile(straight, fullgraph=True, dynamic=False)}


def _compile_to(dtype: torch.dtype, temperature: float, device: torch.device) -> Forms:
    scale = torch.tensor(1 / temperature, device=device)
    compiled = _compiled(dtype, device.type)
    return {"": lambda z0, z1: compiled(z0, z1, scale)}


@functools.cache
def _compiled(dtype: torch.dtype, device: str) -> Callable[..., Tensor]:
    """NT-Xent with products in `dtype`, compiled for each shape that it meets."""

    def loss(z0: Tensor, z1: Tensor, scale: Tensor) -> Tensor:
        n = 2 * len(z0)
        z = F.normalize(torch.cat((z0, z1)))
        logits = torch.mm((z * scale).to(dtype), z.to(dtype).t())
        column = torch.arange(n, device=z.device)
        logits = logits.masked_fill(column[:, None] == column, -torch.inf)
        return F.cross_entropy(logits.float(), column.roll(n // 2))

    return torch.compile(loss, dynamic=False, **compile_options(device))


def compile_options(device: str) -> dict[str, Any]:
    """How the GPU suite compiles a peer; a rehearsal only traces it."""
    if device != "cuda":
        return {"backend": "eager"}
    # torch's own graphs copy their inputs, so the suite captures the compiled code instead
    return {"mode": "max-autotune-no-cudagraphs", "fullgraph": True}
