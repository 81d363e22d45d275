"""The other losses and the nearest keys, against the formula written in torch.

`torch_eager` is the formula as it is written for autograd, `torch_compile` is the same compiled,
and `torch_blocks` are our closed forms in torch ops, block by block (impl="torch").
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import clae_fast
from benchmarks.case import Case, Forms, Peer, rows
from benchmarks.cases import language_models
from clae_fast import reference

Function = Callable[..., Any]


def queue(N: int, K: int, D: int = 128, temperature: float = 0.2) -> Case:
    """A batch of MoCo's queries against its queue."""
    forms = {"cat": _moco, "whole": _cross_entropy}
    shapes = ((N, D), (N + K, D))
    return _case("info_nce", shapes, forms, 1, unit=True, temperature=temperature)


def pairs(n: int, D: int = 128, temperature: float = 0.2) -> Case:
    """InfoNCE of n pairs, one way."""
    return _case("info_nce", ((n, D), (n, D)), _cross_entropy, 2, temperature=temperature)


def both_ways(n: int, D: int = 128, temperature: float = 0.2) -> Case:
    """InfoNCE of n pairs and back, the mean of both."""
    settings = {"symmetric": True, "temperature": temperature}
    case = _case("info_nce", ((n, D), (n, D)), _both_ways, 2, **settings)
    case.peers["cut-cross-entropy"] = language_models.cut_cross_entropy(True, temperature)
    inf_cl = partial(language_models.inf_cl, temperature)
    case.peers["Inf-CL"] = Peer(inf_cl, "inf-cl", gpu_only=True)
    return case


def tied(n: int, D: int = 128, temperature: float = 0.5) -> Case:
    """The self attack: the gradient of NT-Xent of z against itself, and no loss."""
    return _case("tied_nt_xent", ((n, D),), _tied, compiled=False, temperature=temperature)


def uel(n: int, D: int = 128) -> Case:
    """The instance softmax with the spreading term, of n rows in two views."""
    return _case("uel", ((n // 2, D), (n // 2, D)), _uel, 2, temperature=0.1)


def hard(n: int, D: int = 128) -> Case:
    """NT-Xent with hard negatives, of n rows in two views."""
    return _case("hard_nt_xent", ((n // 2, D), (n // 2, D)), _hcl, 2, temperature=0.5)


def classes(n: int, D: int = 128) -> Case:
    """SupCon of n rows, eight a class."""
    labels = torch.arange(n) // 8
    return _case("sup_con", ((n, D),), _sup_con, 1, labels=labels, temperature=0.5)


def hard_classes(n: int, D: int = 128) -> Case:
    """H-SCL of n rows, eight a class."""
    labels = torch.arange(n) // 8
    return _case("h_scl", ((n, D),), _h_scl, 1, labels=labels, temperature=0.5)


def nearest(N: int, K: int, D: int = 128) -> Case:
    """The key that is nearest to each query."""
    return _case("topk_similarity", ((N, D), (K, D)), {"max": _max}, compiled=False, k=1)


def hardest(N: int, K: int, D: int = 128) -> Case:
    """The 64 keys that are nearest to each query."""
    return _case("topk_similarity", ((N, D), (K, D)), {"topk": _topk}, compiled=False, k=min(64, K))


def torch_peers(eager: Forms, op: Function, *, compiled: bool = True) -> dict[str, Peer]:
    """The peers of an op that torch's operations make, out of forms of its formula."""

    def compile_all(device: torch.device) -> Forms:
        torch.compiler.reset()
        return {form: torch.compile(f, dynamic=False) for form, f in eager.items()}

    peers = {"torch_eager": Peer(lambda device: eager)}
    if compiled:
        peers["torch_compile"] = Peer(compile_all, compiled=True)
    return {**peers, "torch_blocks": Peer(lambda device: {"": partial(op, impl="torch")})}


def _case(
    name: str,
    shapes: tuple[tuple[int, int], ...],
    eager: Function | Forms,
    leaves: int = 0,
    *,
    unit: bool = False,
    compiled: bool = True,
    **settings: Any,
) -> Case:
    """The op of this name against forms of its formula, all of which take the settings."""
    forms = eager if isinstance(eager, dict) else {"": eager}
    forms = {form: partial(function, **settings) for form, function in forms.items()}
    op, truth = (partial(getattr(of, name), **settings) for of in (clae_fast, reference))
    if name == "topk_similarity":
        op, truth = _similarities(op), _similarities(truth)
    inputs = partial(rows, shapes, leaves=leaves, unit=unit)
    return Case(inputs, op, truth, torch_peers(forms, op, compiled=compiled), leaves)


def _similarities(nearest: Function) -> Function:
    """Without the keys' numbers, as keys that are equally near may change places."""
    return lambda *operands, **options: nearest(*operands, **options)[0]


def _moco(q: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """As it is written for a queue whose rows are unit rows already."""
    N = len(q)
    u, own, queue = F.normalize(q), F.normalize(keys[:N]), keys[N:]
    # the keys of the batch are negatives of each other here, as in the op
    logits = torch.cat([u @ own.T, u @ queue.T], 1) / temperature
    return F.cross_entropy(logits.float(), torch.arange(N))


def _cross_entropy(anchor: Tensor, keys: Tensor, temperature: float) -> Tensor:
    logits = F.normalize(anchor) @ F.normalize(keys).T / temperature
    return F.cross_entropy(logits.float(), torch.arange(len(anchor)))


def _both_ways(z0: Tensor, z1: Tensor, temperature: float, symmetric: bool) -> Tensor:
    return (_cross_entropy(z0, z1, temperature) + _cross_entropy(z1, z0, temperature)) / 2


def _max(anchor: Tensor, keys: Tensor, k: int) -> Tensor:
    return (F.normalize(anchor) @ F.normalize(keys).T).max(1, keepdim=True)[0]


def _topk(anchor: Tensor, keys: Tensor, k: int) -> Tensor:
    return (F.normalize(anchor) @ F.normalize(keys).T).topk(k)[0]


def _tied(z: Tensor, temperature: float) -> Tensor:
    leaf = z.detach().requires_grad_()
    u = F.normalize(torch.cat([z, leaf]))
    logits = (u @ u.T / temperature).float().fill_diagonal_(-torch.inf)
    loss = F.cross_entropy(logits, torch.arange(len(u)).roll(len(z)))
    return torch.autograd.grad(loss, leaf)[0]


def _uel(z0: Tensor, z1: Tensor, temperature: float) -> Tensor:
    u = F.normalize(torch.cat([z0, z1]))
    n = len(u)
    diagonal = torch.eye(n, dtype=torch.bool)
    positive = diagonal.roll(n // 2, 0)
    p = (u @ u.detach().T / temperature).float().masked_fill(diagonal, -torch.inf).softmax(1)
    spread = torch.log1p(-p.masked_fill(diagonal | positive, 0)).sum()
    return -(p[positive].log().sum() + spread) / n


def _hcl(z0: Tensor, z1: Tensor, temperature: float) -> Tensor:
    """As released: both sums over the negatives taken out of the matrix."""
    u = F.normalize(torch.cat([z0, z1]))
    n, s = len(u), (u @ u.T / temperature).float()
    others = ~torch.eye(n // 2, dtype=torch.bool).repeat(2, 2)
    positive, negatives = s.diagonal(n // 2).exp().repeat(2), s[others].view(n, -1).exp()
    mean = negatives.square().sum(1) / negatives.sum(1)
    debiased = ((mean - 0.1 * positive) / 0.9).clamp_min(math.exp(-1 / temperature))
    return -(positive / (positive + (n - 2) * debiased)).log().mean()


def _sup_con(z: Tensor, labels: Tensor, temperature: float) -> Tensor:
    u = F.normalize(z)
    itself = torch.eye(len(u), dtype=torch.bool)
    log_p = (u @ u.T / temperature).float().masked_fill(itself, -torch.inf).log_softmax(1)
    positive = (labels[:, None] == labels) & ~itself
    m = positive.sum(1)
    return -(log_p.masked_fill(~positive, 0).sum(1)[m > 0] / m[m > 0]).mean()


def _h_scl(z: Tensor, labels: Tensor, temperature: float) -> Tensor:
    u = F.normalize(z)
    exp = (u @ u.T / temperature).float().exp()
    same = labels[:, None] == labels
    negatives = exp.masked_fill(same, 0)
    mean = negatives.square().sum(1, keepdim=True) / negatives.sum(1, keepdim=True)
    pair = same & ~torch.eye(len(u), dtype=torch.bool)
    return torch.log1p((len(u) - 2) * mean / exp)[pair].mean()
