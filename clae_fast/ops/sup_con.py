"""Supervised contrastive loss: loss and gradient in one call."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from clae_fast import _check, _impl
from clae_fast.ops._loss import fused, uninitialized, wants_grad
from clae_fast.ops._rows import row_blocks, unit_rows, unit_rows_backward
from clae_fast.reference.sup_con import sup_con as reference

_impl.declare("sup_con", torch=_impl.ANY)
torch.library.define(
    "clae_fast::sup_con",
    "(Tensor z, Tensor labels, float temperature, bool detach_columns, bool grad, str impl)"
    " -> (Tensor loss, Tensor dz)",
)


@torch.library.impl("clae_fast::sup_con", ("cpu", "cuda"))
def _sup_con_impl(
    z: Tensor,  # [n, D]
    labels: Tensor,  # [n]
    temperature: float,
    detach_columns: bool,
    grad: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """The closed form in torch ops, a block of rows at a time.

    Let p be a row's softmax, q the negatives' share of it, and r the softmax over the row's m
    positives alone. The gradient of the row's loss by the logit of a negative k is p_k, and by that
    of a positive k it is (r_k - 1 / m) - q r_k, where nothing cancels for m = 1.
    """
    with torch.autocast(z.device.type, enabled=False):
        u, norm = unit_rows(z)
        n = len(u)
        losses, counted = u.new_zeros(n, 1), u.new_zeros(n, 1)
        du = torch.zeros_like(u) if grad else u.new_empty(0)
        for start, stop in row_blocks(n, n):
            rows = slice(start, stop)
            s = (u[rows] @ u.T).div_(temperature)
            same = labels[rows, None] == labels[None, :]
            positive = same.clone()
            positive.diagonal(start).fill_(False)
            m = positive.sum(1, keepdim=True)
            s_pos = s.masked_fill(~positive, -torch.inf)
            lse_pos = s_pos.logsumexp(1, keepdim=True)
            mean_pos = s.masked_fill(~positive, 0).sum(1, keepdim=True) / m
            s_neg = s.masked_fill_(same, -torch.inf)
            lse_neg = s_neg.logsumexp(1, keepdim=True)
            margin = lse_neg - lse_pos
            apart = F.softplus(margin)
            loss = torch.where(m > 1, apart + (lse_pos - mean_pos), apart)
            losses[rows] = loss.masked_fill(m == 0, 0)
            counted[rows] = (m > 0).to(u.dtype)
            if not grad:
                continue
            q = margin.sigmoid()
            r = s_pos.sub_(lse_pos).exp_()
            # a row without negatives would subtract inf from inf
            p = s_neg.sub_(lse_neg.masked_fill(same.all(1, keepdim=True), 0)).exp_().mul_(q)
            g = torch.where(positive, (r - 1 / m) - q * r, p).masked_fill_(m == 0, 0)
            du[rows] += g @ u
            if not detach_columns:
                du += g.T @ u[rows]
        count = counted.sum().clamp_min_(1)
        if grad:
            du = unit_rows_backward(du.div_(count * temperature), u, norm)
        return losses.sum() / count, du


@torch.library.register_fake("clae_fast::sup_con")
def _sup_con_fake(
    z: Tensor, labels: Tensor, temperature: float, detach_columns: bool, grad: bool, *_: object
) -> tuple[Tensor, ...]:
    return uninitialized(z, (), z.shape if grad else 0)


_sup_con = torch.ops.clae_fast.sup_con.default


def sup_con(
    z: Tensor,  # [n, D]
    labels: Tensor,  # [n]
    *,
    temperature: float = 0.5,
    detach_columns: bool = False,
    impl: str = "auto",
) -> Tensor:
    r"""Supervised contrastive loss, whose positives are all rows of one label.

    .. math:: \frac{1}{|R|} \sum_{i \in R} \log \sum_{j \ne i} e^{s_{ij}}
        - \frac{1}{|P_i|} \sum_{p \in P_i} s_{ip}, \quad
        s_{ij} = \frac{z_i \cdot z_j}{\|z_i\| \|z_j\| T}

    where P_i are the other rows of i's label: this is the paper's L_out. R are the rows that have
    such others. A row that is alone with its label is a negative of the others and has no loss of
    its own. With two views of N images and the labels 0 to N - 1 it is :func:`nt_xent`; with three
    views and `detach_columns` it is half of RoCL's loss. Rows are normalized inside, as F.normalize
    with eps=1e-12 does.

    Args:
        z: Projections, [n, D], fp32, fp16, bf16 or fp64; not normalized. The order is free.
        labels: Rows of the same label are positives of one another, int64 [n].
        temperature: T, above 0.
        detach_columns: Treat the columns as constants, so that a row's gradient comes from its own
            term alone.
        impl: "auto", "reference" or "torch".

    Returns:
        The loss, a scalar of fp32, of fp64 for fp64. NaN where a row that counts is NaN, 0 where no
        label occurs twice.

    Raises:
        TypeError: An argument of the wrong type, or labels other than int64.
        ValueError: A shape other than [n, D] and [n], n = 0, or a temperature that is not above 0.
        RuntimeError: `impl` names an implementation that cannot run here.

    Example:
        >>> z = torch.randn(512, 128, requires_grad=True)
        >>> clae_fast.sup_con(z, torch.randint(10, (512,)), temperature=0.1).backward()

    Source: Khosla et al., Supervised Contrastive Learning, NeurIPS 2020.
    """
    _check.projections("z", z)
    _check.labels(labels, z)
    _check.temperature(temperature)
    _check.flag("detach_columns", detach_columns)
    impl = _impl.resolve("sup_con", impl, z)
    if impl == "reference":
        return reference(z, labels, temperature=temperature, detach_columns=detach_columns)
    return fused(_sup_con, (z, labels), (temperature, detach_columns, wants_grad(z), impl))
