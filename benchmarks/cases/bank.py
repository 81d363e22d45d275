"""Banks of learnable keys: the step of CaCo's bank alone, and a whole batch of CaCo's or AdCo's.

A whole batch is the loss of the queries against the bank, its gradient, and the bank's own step.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import clae_fast
from benchmarks.case import Case, Forms, Operands, Outputs, Peer, rows
from benchmarks.cases.losses import torch_peers
from benchmarks.cases.nt_xent import compile_options
from clae_fast import reference

# of the loss and of the bank's step
TEMPERATURES = {"caco": (0.08, 0.08), "adco": (0.12, 0.02)}


def bank(N: int, K: int, D: int = 128) -> Case:
    """The step of CaCo's bank; the operands are queries, bank and velocity."""

    def step(of: Callable[..., None]) -> Callable[..., Tensor]:
        # without momentum and at a rate of 0, every repetition finds the bank as it was, and the
        # velocity that it leaves is the gradient
        def velocity_of(q: Tensor, bank: Tensor, velocity: Tensor, **options: Any) -> Tensor:
            positive = torch.arange(len(q), device=q.device)
            settings = {"positive": positive, "temperature": 0.08, "momentum": 0.0}
            of(bank, velocity, q, lr=0.0, **settings, **options)
            return velocity

        return velocity_of

    def eager(q: Tensor, bank: Tensor, velocity: Tensor) -> Tensor:
        u, length = F.normalize(q).float(), bank.norm(dim=1, keepdim=True)
        w = bank / length
        p = (u @ w.T / 0.08).softmax(1)
        p = torch.where(torch.eye(len(q), len(w), dtype=torch.bool), 1 - p, p)
        _move(bank, velocity, p.T @ u / len(q), w, length, 0.08, momentum=0.0, lr=0.0)
        return velocity

    op = step(clae_fast.bank_step)
    return Case(
        partial(rows, ((N, D), (K, D), (K, D)), state=2),
        op,
        step(reference.bank_step),
        torch_peers({"": eager}, op),
    )


def batch(method: str, N: int, K: int, D: int = 128) -> Case:
    """A batch of N queries of "caco" or "adco" against a bank of K keys.

    The operands are the query, the columns (for AdCo the keys of the batch stand in front of the
    bank), the bank's velocity, the column of each query's positive and the bank's rate. The rate is
    0, so that every call does the same work. The outputs are the gradient of the query and the
    velocity.
    """
    T, bank_T = TEMPERATURES[method]
    by_keys = method == "adco"

    def inputs(dtype: torch.dtype, device: torch.device, seed: int) -> Operands:
        query, near = rows(((N, D), (N, D)), dtype, device, 2 * seed)
        (columns,) = rows(((K, D),), dtype, device, 2 * seed + 1)
        if by_keys:
            columns = torch.cat([F.normalize(near), columns])
        positive = torch.arange(N, device=device) * (1 if by_keys else K // N)
        velocity = torch.zeros(K, D, device=device)
        return query.requires_grad_(), columns, velocity, positive, torch.zeros((), device=device)

    def step(
        ops: Any, query: Tensor, columns: Tensor, velocity: Tensor, positive: Tensor, lr: Tensor
    ) -> Outputs:
        named = None if by_keys else positive
        losses = ops.info_nce(query, columns, temperature=T, positive=named, reduction="none")
        (gradient,) = torch.autograd.grad(losses.mean(), query)
        # the loss's softmax is that of the bank's step where both temperatures are one
        known = {"losses": losses.detach()} if ops is clae_fast and bank_T == T else {}
        keys = columns[:N] if by_keys else None
        options = {"keys": keys, "positive": named, "temperature": bank_T, **known}
        ops.bank_step(columns[-K:], velocity, query.detach(), lr=lr, **options)
        return gradient, velocity

    peers = {
        f"{form}, {name}": Peer(
            partial(_batch_forms, form != "torch eager", half, T, bank_T),
            gpu_only=True,
            captured=True,
        )
        for form in ("torch eager", "torch.compile")
        for name, half in (("TF32", False), ("16 bit", True))
    }
    return Case(inputs, partial(step, clae_fast), partial(step, reference), peers)


def _batch_forms(
    compiled: bool, half: bool, T: float, bank_T: float, device: torch.device
) -> Forms:
    step: Callable[..., Outputs] = _torch_step
    if compiled:
        step = torch.compile(step, dynamic=False, **compile_options(device.type))
    dtype = torch.float32
    if half:
        dtype = torch.float16 if device.type == "cuda" else torch.bfloat16
    return {"": lambda query, *others: step(query.detach(), *others, T, bank_T, dtype)}


def _torch_step(
    query: Tensor,
    columns: Tensor,
    velocity: Tensor,
    positive: Tensor,
    lr: Tensor,
    T: float,
    bank_T: float,
    dtype: torch.dtype,
) -> Outputs:
    """Both gradients of one matrix of similarities, in closed form."""
    n, first = len(query), len(columns) - len(velocity)
    norm = query.norm(dim=1, keepdim=True)
    u = query / norm
    length = columns.norm(dim=1, keepdim=True)
    v = columns / length
    s = (u.to(dtype) @ v.to(dtype).T).float()
    is_positive = torch.arange(len(v), device=v.device) == positive[:, None]
    p = (s / T).softmax(1)
    du = (p - is_positive.float()).to(dtype) @ v.to(dtype)
    du = du.float() / (n * T)
    dquery = (du - (du * u).sum(1, keepdim=True) * u) / norm
    if bank_T != T:
        p = (s / bank_T).softmax(1)
    p = torch.where(is_positive, 1 - p, p)[:, first:]
    r = (p.to(dtype).T @ u.to(dtype)).float() / n
    _move(columns[first:], velocity, r, v[first:], length[first:], bank_T, momentum=0.9, lr=lr)
    return dquery, velocity


def _move(
    bank: Tensor,
    velocity: Tensor,
    r: Tensor,
    w: Tensor,
    length: Tensor,
    temperature: float,
    *,
    momentum: float,
    lr: float | Tensor,
) -> None:
    """The bank's step: `r` is the gradient of its unit rows `w`, whose lengths were `length`."""
    r = r - (r * w).sum(1, keepdim=True) * w
    velocity.mul_(momentum).sub_(r / (length * temperature))
    bank.sub_(lr * velocity)
