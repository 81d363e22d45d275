"""Hard-negative supervised contrastive loss: loss and gradient in one call."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from clae_fast import _check, _impl
from clae_fast.ops._loss import fused, uninitialized, wants_grad
from clae_fast.ops._rows import row_blocks, unit_rows, unit_rows_backward
from clae_fast.reference.h_scl import h_scl as reference

_impl.declare("h_scl", torch=_impl.ANY)
torch.library.define(
    "clae_fast::h_scl",
    "(Tensor z, Tensor labels, float temperature, float beta, bool detach_weights, bool grad,"
    " str impl) -> (Tensor loss, Tensor dz)",
)


@torch.library.impl("clae_fast::h_scl", ("cpu", "cuda"))
def _h_scl_impl(
    z: Tensor,  # [n, D]
    labels: Tensor,  # [n]
    temperature: float,
    beta: float,
    detach_weights: bool,
    grad: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """The closed form in torch ops, a block of rows at a time.

    Let w be the weights of a row's negatives, q_j the logistic function of the margin between their
    log mean and the logit of the positive j, and Q the sum of q_j. The gradient of the row's losses
    by the logit of a positive j is -q_j, and by that of a negative k it is

        Q ((1 + beta) w_k exp(s_k) / sum of w exp(s) - beta w_k / sum of w)

    or, with constant weights, Q w_k exp(s_k) / sum of w exp(s).
    """
    with torch.autocast(z.device.type, enabled=False):
        u, norm = unit_rows(z)
        n = len(u)
        losses, pairs = u.new_zeros(n), u.new_zeros(n)
        du = torch.zeros_like(u) if grad else u.new_empty(0)
        for start, stop in row_blocks(n, n):
            rows = slice(start, stop)
            s = (u[rows] @ u.T).div_(temperature)
            same = labels[rows, None] == labels[None, :]
            positive = same.clone()
            positive.diagonal(start).fill_(False)
            pairs[rows] = positive.sum(1).to(u.dtype)
            # a row without negatives has no loss
            alone = same.all(1, keepdim=True)
            positive &= ~alone
            below = s.masked_fill(same, -torch.inf)
            shift = below.amax(1, keepdim=True).masked_fill_(alone, 0)
            below.sub_(shift)
            weights = (beta * below).exp_() if beta else (~same).to(u.dtype)
            hard = below.exp_().mul_(weights)
            total = hard.sum(1, keepdim=True).masked_fill_(alone, 1)
            mass = weights.sum(1, keepdim=True).masked_fill_(alone, 1)
            # with n = 2 no row has both a positive and a negative, and the logarithm is not used
            log_mean = (total / mass).log_().add_(shift + math.log(max(1, n - 2)))
            margin = log_mean - s
            losses[rows] = F.softplus(margin).masked_fill_(~positive, 0).sum(1)
            if not grad:
                continue
            q = margin.sigmoid_().masked_fill_(~positive, 0)
            share = q.sum(1, keepdim=True)
            if detach_weights:
                g = hard.mul_(share / total)
            else:
                g = hard.mul_((1 + beta) * share / total).sub_(weights.mul_(beta * share / mass))
            g.sub_(q)
            du[rows] += g @ u
            du += g.T @ u[rows]
        count = pairs.sum().clamp_min_(1)
        if grad:
            du = unit_rows_backward(du.div_(count * temperature), u, norm)
        return losses.sum() / count, du


@torch.library.register_fake("clae_fast::h_scl")
def _h_scl_fake(
    z: Tensor,
    labels: Tensor,
    temperature: float,
    beta: float,
    detach_weights: bool,
    grad: bool,
    impl: str,
) -> tuple[Tensor, ...]:
    return uninitialized(z, (), z.shape if grad else 0)


_h_scl = torch.ops.clae_fast.h_scl.default


def h_scl(
    z: Tensor,  # [n, D]
    labels: Tensor,  # [n]
    *,
    temperature: float = 0.5,
    beta: float = 1.0,
    detach_weights: bool = False,
    impl: str = "auto",
) -> Tensor:
    r"""Supervised contrastive loss with hard negatives, the loss of H-SCL.

    .. math:: \frac{1}{|P|} \sum_{(i, j) \in P}
        \log (e^{s_{ij}} + (n - 2) \mu_i) - s_{ij}, \quad
        \mu_i = \frac{\sum_k e^{(1 + \beta) s_{ik}}}{\sum_k e^{\beta s_{ik}}}

    over the pairs P of different rows of one label, with s the cosine over the temperature T, and
    sums over the rows k of other labels. As in the released code, no denominator has a further
    positive, and the negatives' mean stands for all n - 2 other rows. Where all rows have one
    label, pairs have no loss but count in the mean. Rows are normalized inside, as F.normalize with
    eps=1e-12 does.

    Args:
        z: Projections, [n, D], fp32, fp16, bf16 or fp64; not normalized. The order is free.
        labels: Classes of the rows, int64 [n].
        temperature: T, above 0.
        beta: How much more the nearest negatives weigh than others, at least 0.
        detach_weights: Treat the weights exp(beta s) as constants in the gradient.
        impl: "auto", "reference" or "torch".

    Returns:
        The loss, a scalar of fp32, of fp64 for fp64. NaN where a row that counts is NaN, 0 where no
        label occurs twice.

    Raises:
        TypeError: An argument of the wrong type, or labels other than int64.
        ValueError: A shape other than [n, D] and [n], n = 0, a temperature that is not above 0, or
            a negative beta.
        RuntimeError: `impl` names an implementation that cannot run here.

    Example:
        >>> z = torch.randn(512, 128, requires_grad=True)
        >>> clae_fast.h_scl(z, torch.randint(10, (512,)), beta=5.0).backward()

    Source: Jiang et al., Supervised Contrastive Learning with Hard Negative Samples, 2022
    (arXiv 2209.00078).
    """
    _check.projections("z", z)
    _check.labels(labels, z)
    _check.temperature(temperature)
    _check.in_range("beta", beta, 0)
    _check.flag("detach_weights", detach_weights)
    impl = _impl.resolve("h_scl", impl, z)
    if impl == "reference":
        return reference(
            z, labels, temperature=temperature, beta=beta, detach_weights=detach_weights
        )
    return fused(_h_scl, (z, labels), (temperature, beta, detach_weights, wants_grad(z), impl))
