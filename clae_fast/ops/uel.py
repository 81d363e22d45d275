"""The instance softmax with a spreading term: loss and gradient in one call."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from clae_fast import _check, _impl, _native
from clae_fast.ops._loss import fused, uninitialized, wants_grad
from clae_fast.ops._rows import negative_logits, row_blocks, two_views, unit_rows_backward
from clae_fast.reference.uel import uel as reference

_impl.declare("uel", native=_impl.ANY, triton=_impl.rows_of_at_most(256), torch=_impl.ANY)
torch.library.define(
    "clae_fast::uel",
    "(Tensor z0, Tensor z1, float temperature, bool grad, bool exact, str impl)"
    " -> (Tensor loss, Tensor dz)",
)


@torch.library.register_fake("clae_fast::uel")
def _uel_fake(
    z0: Tensor, z1: Tensor, temperature: float, grad: bool, *_: object
) -> tuple[Tensor, ...]:
    N, D = z0.shape
    return uninitialized(z0, (), (2 * N, D) if grad else 0)


@torch.library.impl("clae_fast::uel", ("cpu", "cuda"))
def _uel_impl(
    z0: Tensor,  # [N, D]
    z1: Tensor,  # [N, D]
    temperature: float,
    grad: bool,
    exact: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """The closed form in torch ops is computed a block of rows at a time.

    Let top be the most similar negative of a row, p the row's softmax, q its softmax without top,
    and t the sum of p / (1 - p) over the negatives but top. The gradient of the row's loss is, by
    the logit of

        top            p_top (2 - t)
        the positive   -(1 - p_pos) - p_pos t - p_top q_pos
        a negative k   p_k (2 - t + p_k / (1 - p_k)) - p_top q_k

    where p_top / (1 - p_top), which is unbounded, has been multiplied out.
    """
    if impl == "triton":
        from clae_fast.kernels.uel import uel

        return uel(z0, z1, temperature, grad, exact)
    if impl == "native":
        loss, dz = _uel_fake(z0, z1, temperature, grad)
        operands = (_native.Rows(z0), _native.Rows(z1), *z0.shape)
        _native.run("uel", *operands, temperature, torch.get_num_threads(), loss, dz)
        return loss, dz
    with torch.autocast(z0.device.type, enabled=False):
        u, norm, positive = two_views(z0, z1, temperature)
        n, N = len(u), len(z0)
        losses, dpositive = torch.empty_like(positive), torch.empty_like(positive)
        du = torch.empty_like(u) if grad else u.new_empty(0)
        for start, stop in row_blocks(n, n):
            rows = slice(start, stop)
            pos = positive[rows]
            s = negative_logits(u, start, stop, temperature)
            s_top, top = s.max(1, keepdim=True)
            s.scatter_(1, top, -torch.inf)
            shift = torch.maximum(s.amax(1, keepdim=True), pos)
            exp = s.sub_(shift).exp_()
            others, exp_pos = exp.sum(1, keepdim=True), (pos - shift).exp()
            rest = others + exp_pos
            lse_neg = torch.logaddexp(s_top, others.log() + shift)
            top_logit = s_top - shift - rest.log()
            p_top, p_rest = top_logit.sigmoid(), (-top_logit).sigmoid()
            q = exp.div_(rest)
            p = q * p_rest
            spread = F.softplus(top_logit) - torch.log1p(-p).sum(1, keepdim=True)
            losses[rows] = F.softplus(lse_neg - pos) + spread
            if not grad:
                continue
            q_pos = exp_pos / rest
            w = p / (1 - p)
            t = w.sum(1, keepdim=True)
            g = w.add_(2 - t).mul_(p).sub_(q.mul_(p_top))
            g.scatter_(1, top, p_top * (2 - t))
            torch.mm(g, u, out=du[rows])
            dpositive[rows] = (lse_neg - pos).sigmoid() + q_pos * (p_rest * t + p_top)
        if grad:
            du.addcmul_(dpositive, u.roll(N, 0), value=-1)
            du = unit_rows_backward(du.div_(n * temperature), u, norm)
        return losses.mean(), du


_uel = torch.ops.clae_fast.uel.default


def uel(
    z0: Tensor,  # [N, D]
    z1: Tensor,  # [N, D]
    *,
    temperature: float = 0.1,
    exact: bool = False,
    impl: str = "auto",
) -> Tensor:
    r"""Instance softmax with a spreading term: the loss of UEL and of CLAE's "UEL" variant.

    .. math:: -\frac{1}{2N} \sum_i \Bigl[ \log p_{i,\pi(i)}
        + \sum_{j \ne i, \pi(i)} \log (1 - p_{ij}) \Bigr],
        \quad p_{ij} = \frac{e^{s_{ij}}}{\sum_{k \ne i} e^{s_{ik}}}

    over the 2N rows of both views, with s the cosine over the temperature and the positive π(i) of
    a row in the other view. As released, a row's gradient comes from its own term only: the columns
    are detached. Rows are normalized inside, as F.normalize with eps=1e-12 does.

    Args:
        z0: Projections of the first view, [N, D], fp32, fp16, bf16 or fp64; not normalized.
        z1: Projections of the second view, row i belonging to row i of `z0`.
        temperature: T, above 0.
        exact: As in :func:`nt_xent`.
        impl: "auto", "reference", "native", "torch" or, for D <= 256, "triton".

    Returns:
        The loss, a scalar of fp32, of fp64 for fp64. NaN where an input is NaN, 0 for N = 1.

    Raises:
        TypeError: An argument of the wrong type, or views of different dtypes.
        ValueError: A shape other than [N, D], N = 0, a temperature that is not above 0, or sizes
            that `impl` does not take.
        RuntimeError: `impl` names an implementation that cannot run here.

    Example:
        >>> z0, z1 = torch.randn(2, 128, 128, requires_grad=True)
        >>> clae_fast.uel(z0, z1, temperature=0.1).backward()

    Source: Ye et al., Unsupervised Embedding Learning via Invariant and Spreading Instance Feature,
    CVPR 2019.
    """
    _check.projections("z0", z0)
    _check.like("z1", z1, "z0", z0)
    _check.temperature(temperature)
    _check.flag("exact", exact)
    impl = _impl.resolve("uel", impl, z0, z1)
    if impl == "reference":
        return reference(z0, z1, temperature=temperature)
    settings = (temperature, wants_grad(z0, z1), exact, impl)
    return fused(_uel, (z0, z1), settings, views=2)
