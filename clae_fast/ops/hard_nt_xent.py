"""NT-Xent with hard and debiased negatives: loss and gradient in one call."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from clae_fast import _check, _impl, _native
from clae_fast.ops._loss import fused, uninitialized, wants_grad
from clae_fast.ops._rows import negative_logits, row_blocks, two_views, unit_rows_backward
from clae_fast.reference.hard_nt_xent import hard_nt_xent as reference


def _refuses_extra(*_: Tensor, extra: bool = False) -> str:
    return "does not take extra logits: impl='torch' does" if extra else ""


def _triton_refuses(z0: Tensor, *_: Tensor, extra: bool = False) -> str:
    return _refuses_extra(extra=extra) or _impl.rows_of_at_most(256).refuses(z0)


_impl.declare(
    "hard_nt_xent",
    native=_impl.Limits(_refuses_extra),
    triton=_impl.Limits(_triton_refuses),
    torch=_impl.ANY,
)
torch.library.define(
    "clae_fast::hard_nt_xent",
    "(Tensor z0, Tensor z1, Tensor? extra, float temperature, float beta, float tau_plus,"
    " bool detach_weights, bool grad, bool exact, str impl)"
    " -> (Tensor loss, Tensor dz, Tensor dextra)",
)


@torch.library.register_fake("clae_fast::hard_nt_xent")
def _hard_nt_xent_fake(
    z0: Tensor,
    z1: Tensor,
    extra: Tensor | None,
    temperature: float,
    beta: float,
    tau_plus: float,
    detach_weights: bool,
    grad: bool,
    *_: object,
) -> tuple[Tensor, ...]:
    N, D = z0.shape
    dextra = 0 if extra is None or not grad else extra.shape
    return uninitialized(z0, (), (2 * N, D) if grad else 0, dextra)


@torch.library.impl("clae_fast::hard_nt_xent", ("cpu", "cuda"))
def _hard_nt_xent_impl(
    z0: Tensor,  # [N, D]
    z1: Tensor,  # [N, D]
    extra: Tensor | None,  # [2N, k]
    *settings: Any,
) -> tuple[Tensor, ...]:
    *numbers, grad, _, impl = settings
    if impl == "torch":
        return _blocks(z0, z1, extra, *numbers, grad=grad)
    if impl == "triton":
        from clae_fast.kernels.hard_nt_xent import hard_nt_xent

        loss, dz = hard_nt_xent(z0, z1, *settings[:-1])
        return loss, dz, loss.new_empty(0)
    loss, dz, dextra = _hard_nt_xent_fake(z0, z1, extra, *numbers, grad)
    operands = (_native.Rows(z0), _native.Rows(z1), *z0.shape)
    _native.run("hard_nt_xent", *operands, *numbers, torch.get_num_threads(), loss, dz)
    return loss, dz, dextra


def _blocks(
    z0: Tensor,  # [N, D]
    z1: Tensor,  # [N, D]
    extra: Tensor | None,  # [2N, k]
    temperature: float,
    beta: float,
    tau_plus: float,
    detach_weights: bool,
    *,
    grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The closed form in torch ops, a block of rows at a time.

    Let w be the weights of a row's n negatives, q = Ng / (Ng + exp(s_pos)) and P = tau_plus. The
    gradient of the row's loss is, by the logit of

        the positive   -c,  c = q + (1 - q) n P / (1 - P)
        a negative k   c ((1 + beta) w_k exp(s_k) / sum of w exp(s) - beta w_k / sum of w)

    With constant weights the latter is c w_k exp(s_k) / sum of w exp(s). Where Ng is at its lower
    bound, the two are -q and 0.
    """
    with torch.autocast(z0.device.type, enabled=False):
        u, norm, positive = two_views(z0, z1, temperature)
        n, N = len(u), len(z0)
        further = 0 if extra is None else extra.shape[1]
        negatives = n - 2 + further
        du = torch.zeros_like(u) if grad else u.new_empty(0)
        dextra = u.new_empty((n, further) if grad and extra is not None else 0)
        if negatives == 0:
            nothing = 0 * positive.sum()
            return nothing, du + nothing, dextra
        losses, dpositive = torch.empty_like(positive), torch.empty_like(positive)
        for start, stop in row_blocks(n, n + further):
            rows = slice(start, stop)
            s = negative_logits(u, start, stop, temperature)
            if extra is not None:
                s = torch.cat([s, extra[rows].float()], 1)
            shift = s.amax(1, keepdim=True)
            s.sub_(shift)
            weights = (beta * s).exp_() if beta else None
            hard = s.exp_() if weights is None else s.exp_().mul_(weights)
            total = hard.sum(1, keepdim=True)
            mass = negatives if weights is None else weights.sum(1, keepdim=True)
            log_mean = (total / mass).log_().add_(shift)
            margin, floored = _margin(log_mean, positive[rows], negatives, temperature, tau_plus)
            losses[rows] = F.softplus(margin)
            if not grad:
                continue
            false = (-margin).sigmoid() * (negatives * tau_plus / (1 - tau_plus))
            dpositive[rows] = margin.sigmoid() + false.masked_fill(floored, 0)
            c = dpositive[rows].masked_fill(floored, 0)
            if weights is None or detach_weights:
                g = hard.mul_(c / total)
            else:
                g = hard.mul_((1 + beta) * c / total).sub_(weights.mul_(beta * c / mass))
            du[rows] += g[:, :n] @ u
            du += g[:, :n].T @ u[rows]
            if extra is not None:
                dextra[rows] = g[:, n:] / n
        if grad:
            du.addcmul_(dpositive + dpositive.roll(N, 0), u.roll(N, 0), value=-1)
            du = unit_rows_backward(du.div_(n * temperature), u, norm)
        return losses.mean(), du, dextra


def _margin(
    log_mean: Tensor,  # [rows, 1]
    positive: Tensor,  # [rows, 1]
    negatives: int,
    temperature: float,
    tau_plus: float,
) -> tuple[Tensor, Tensor]:
    """log(Ng) - s_pos, and whether Ng is at its lower bound, which takes a tau_plus above 0."""
    ratio = log_mean - positive
    floor = -1 / temperature - positive
    if tau_plus:
        share = tau_plus * (-ratio).exp()
        debiased = ratio + torch.log1p(-share) - math.log1p(-tau_plus)
        floored = (share >= 1) | (debiased <= floor)
        ratio = torch.where(floored, floor, debiased)
    else:
        floored = torch.zeros_like(ratio, dtype=torch.bool)
    return ratio + math.log(negatives), floored


_hard_nt_xent = torch.ops.clae_fast.hard_nt_xent.default


def hard_nt_xent(
    z0: Tensor,  # [N, D]
    z1: Tensor,  # [N, D]
    *,
    temperature: float = 0.5,
    beta: float = 1.0,
    tau_plus: float = 0.1,
    detach_weights: bool = False,
    extra: Tensor | None = None,  # [2N, k]
    exact: bool = False,
    impl: str = "auto",
) -> Tensor:
    r"""NT-Xent with hard and debiased negatives, the loss of HCL and, with beta=0, of DCL.

    .. math:: \frac{1}{2N} \sum_i \log (e^{s_{i,\pi(i)}} + N_i) - s_{i,\pi(i)}, \quad
        N_i = n \max \Bigl( \frac{M_i - \tau^+ e^{s_{i,\pi(i)}}}{1 - \tau^+}, e^{-1/T} \Bigr), \quad
        M_i = \frac{\sum_j e^{(1 + \beta) s_{ij}}}{\sum_j e^{\beta s_{ij}}}

    over the 2N rows of both views, with s the cosine over the temperature T, the positive π(i) of
    a row in the other view, and sums over its n = 2N - 2 negatives. With beta = tau_plus = 0 it is
    :func:`nt_xent`. Rows are normalized inside, as F.normalize with eps=1e-12 does.

    Args:
        z0: Projections of the first view, [N, D], fp32, fp16, bf16 or fp64; not normalized.
        z1: Projections of the second view, row i belonging to row i of `z0`.
        temperature: T, above 0.
        beta: How much more the nearest negatives weigh than others, at least 0.
        tau_plus: Share of the negatives that are taken to be of the row's own class, in [0, 1).
        detach_weights: Treat the weights exp(beta s) as constants in the gradient.
        extra: Logits of k further negatives of each row, [2N, k], z0's rows above z1's. They are
            cosines over T, of any floating dtype, and n is then 2N - 2 + k. Only "reference" and
            "torch" take them.
        exact: As in :func:`nt_xent`.
        impl: "auto", "reference", "native", "torch" or, for D <= 256, "triton".

    Returns:
        The loss, a scalar of fp32, of fp64 for fp64. NaN where an input is NaN, 0 without
        negatives.

    Raises:
        TypeError: An argument of the wrong type, or views of different dtypes.
        ValueError: A shape other than [N, D] and [2N, k], N = 0, a temperature that is not above 0,
            a negative beta, a tau_plus outside [0, 1), or sizes that `impl` does not take.
        RuntimeError: `impl` names an implementation that cannot run here.

    Example:
        >>> z0, z1 = torch.randn(2, 256, 128, requires_grad=True)
        >>> clae_fast.hard_nt_xent(z0, z1, beta=1.0, tau_plus=0.1).backward()

    Source: Robinson et al., Contrastive Learning with Hard Negative Samples, ICLR 2021; Chuang et
    al., Debiased Contrastive Learning, NeurIPS 2020.
    """
    _check.projections("z0", z0)
    _check.like("z1", z1, "z0", z0)
    _check.temperature(temperature)
    _check.in_range("beta", beta, 0)
    _check.in_range("tau_plus", tau_plus, 0, 1)
    _check.flag("detach_weights", detach_weights)
    _check.flag("exact", exact)
    if extra is not None:
        _check.tensor("extra", extra)
        _check.same_place("extra", extra, "z0", z0, dtype=False)
        _check.shape("extra", extra, 2 * len(z0), "k")
    impl = _impl.resolve("hard_nt_xent", impl, z0, z1, extra=extra is not None)
    numbers: dict[str, Any] = {
        "temperature": temperature,
        "beta": beta,
        "tau_plus": tau_plus,
        "detach_weights": detach_weights,
    }
    if impl == "reference":
        return reference(z0, z1, extra=extra, **numbers)
    operands = (z0, z1, extra)
    settings = (*numbers.values(), wants_grad(*operands), exact, impl)
    return fused(_hard_nt_xent, operands, settings, views=2)
