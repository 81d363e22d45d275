"""A step of a bank of learnable keys: gradient, momentum and update in one pass over it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from clae_fast import _check, _impl, _native
from clae_fast.ops._rows import row_blocks, unit_rows, unit_rows_backward
from clae_fast.reference.bank_step import bank_step as reference

_impl.declare("bank_step", native=_impl.ANY, triton=_impl.rows_of_at_most(1024), torch=_impl.ANY)
torch.library.define(
    "clae_fast::bank_step",
    "(Tensor(a!) bank, Tensor(b!) velocity, Tensor anchor, Tensor? keys, Tensor? positive,"
    " Tensor? weight, Tensor? losses, Tensor lr, int views, float temperature, float momentum,"
    " float weight_decay, bool exact, str impl) -> ()",
)


@torch.library.impl("clae_fast::bank_step", ("cpu", "cuda"))
def _bank_step_impl(*arguments: Any) -> None:
    *given, impl = arguments
    bank, positive = given[0], given[4]
    _check.in_columns("positive", positive, len(bank))
    if impl == "triton":
        from clae_fast.kernels.bank_step import bank_step

        bank_step(*given)
    elif impl == "native":
        _native_step(*given[:-1])
    else:
        _in_blocks(*given[:-1])


def _native_step(
    bank: Tensor, velocity: Tensor, anchor: Tensor, keys: Tensor | None, *others: Any
) -> None:
    *each, lr, views, temperature, momentum, weight_decay = others
    rows = (_native.Rows(anchor), _native.Rows(anchor if keys is None else keys))
    sizes = (len(bank), *anchor.shape, views)
    numbers = (temperature, float(lr), momentum, weight_decay, torch.get_num_threads())
    given = (bank, velocity, *rows, *_native.in_one_piece(*each))
    _native.run("bank_step", *given, *sizes, *numbers)


def _in_blocks(
    bank: Tensor,  # [K, D]
    velocity: Tensor,  # [K, D]
    anchor: Tensor,  # [N, D]
    keys: Tensor | None,  # [N, D]
    positive: Tensor | None,  # [N]
    weight: Tensor | None,  # [N]
    losses: Tensor | None,  # [N]
    lr: Tensor,  # []
    views: int,
    temperature: float,
    momentum: float,
    weight_decay: float,
) -> None:
    """The closed form in torch ops, a block of the bank at a time."""
    with torch.autocast(anchor.device.type, enabled=False):
        u, _ = unit_rows(anchor)
        N, blocks = len(u), row_blocks(len(bank), len(u))
        if keys is None:
            assert positive is not None
            partner = unit_rows(bank[positive])[0]
        else:
            partner, _ = unit_rows(keys)
        s_positive = (u * partner).sum(1).div_(temperature)
        row = torch.arange(N, device=u.device)

        def similarities(start: int, stop: int, at_positive: float) -> Tensor:
            """A block of the bank against all anchors: [stop - start, N]."""
            s = (unit_rows(bank[start:stop])[0] @ u.T).div_(temperature)
            if positive is None:
                return s
            here = (positive >= start) & (positive < stop)
            columns = torch.where(here, positive - start, 0)
            s[columns, row] = torch.where(here, at_positive, s[columns, row])
            return s

        if losses is None:
            neg = torch.full_like(s_positive, -torch.inf)
            for start, stop in blocks:
                neg = torch.logaddexp(neg, similarities(start, stop, -torch.inf).logsumexp(0))
            if keys is not None:
                n = N // views
                s = (u.view(views, n, -1) @ partner.view(views, n, -1).mT).div_(temperature)
                s.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
                neg = torch.logaddexp(neg, s.logsumexp(2).flatten())
            losses = F.softplus(neg - s_positive)
        if weight is None:
            weight = torch.full_like(losses, 1 / N)
        lse = s_positive + losses
        for start, stop in blocks:
            s = similarities(start, stop, -torch.inf)
            du = s.sub_(lse).exp_().mul_(weight) @ u
            if positive is not None:
                # 1 - p of a positive is the share of the negatives, so that nothing cancels
                here = (positive >= start) & (positive < stop)
                share = torch.where(here, -torch.expm1(-losses) * weight, 0)
                columns = torch.where(here, positive - start, 0)
                du.index_put_((columns,), share[:, None] * u, accumulate=True)
            w, norm = unit_rows(bank[start:stop])
            ascent = unit_rows_backward(du.div_(temperature), w, norm)
            v = velocity[start:stop].mul_(momentum).sub_(ascent)
            v.add_(bank[start:stop], alpha=weight_decay)
            bank[start:stop].sub_(lr * v)


@torch.library.register_fake("clae_fast::bank_step")
def _bank_step_fake(*_: object) -> None:
    return None


_bank_step = torch.ops.clae_fast.bank_step.default


def bank_step(
    bank: Tensor,  # [K, D]
    velocity: Tensor,  # [K, D]
    anchor: Tensor,  # [N, D]
    *,
    lr: float | Tensor,
    keys: Tensor | None = None,  # [N, D]
    positive: Tensor | None = None,  # [N]
    weight: Tensor | None = None,  # [N]
    losses: Tensor | None = None,  # [N]
    views: int = 1,
    temperature: float = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    exact: bool = False,
    impl: str = "auto",
) -> None:
    r"""A step of a bank of learnable keys against its anchors, in place: AdCo's, or CaCo's.

    With :math:`w_k` the unit row of :math:`W_k`, :math:`p_{ik}` the softmax of the cosines over T
    of anchor i, and :math:`c_i` what it counts, 1/N by default,

    .. math:: r_k = \sum_i c_i p'_{ik} (u_i - (u_i \cdot w_k) w_k),
        \quad V_k \leftarrow \mu V_k - \frac{r_k}{\|W_k\| T} + \lambda W_k,
        \quad W_k \leftarrow W_k - \eta V_k

    where :math:`p'` is 1 - p at a positive and p elsewhere. This is the gradient of the anchors'
    cross-entropy with the sign of every entry flipped that is no positive: negatives ascend on the
    loss, towards the anchors that find them hard, and positives descend. An entry that is one
    anchor's positive and another's negative does both.

    - AdCo: row i of `keys` is anchor i's positive. The other keys of its view are negatives beside
      the bank, in the denominator alone.
    - CaCo: `positive` names the bank entry that is each row's positive. There are no other columns.

    No implementation stores an N x K matrix. Each row of the bank and of the velocity is read and
    written once, by one thread, so that the number of threads does not change the result. The step
    takes 6 N K D FLOPs: 2 for the denominators of the rows, 2 to compute the similarities again,
    and 2 for the gradient. Where both temperatures are equal, `info_nce` has computed the
    denominators already; its `losses` tell them, and 4 N K D are left. Together with the 4 N K D of
    `info_nce` over constant keys that is as much as a single kernel for both gradients would need.

    Args:
        bank: W, [K, D] in fp32, or in fp64, contiguous; not normalized.
        velocity: V, as the bank.
        anchor: Projections, [N, D], fp32, fp16, bf16 or fp64; not normalized. Constants, as all.
        lr: The learning rate, as a number or as a tensor [], which a CUDA graph reads at every
            replay.
        keys: Projections of the anchors' own positives, of their shape and dtype. Either these or
            `positive`.
        positive: int64 [N], the bank entry that is each anchor's positive, as in :func:`info_nce`.
        weight: [N], how much each anchor counts; None is 1/N.
        losses: [N], the rows' losses at this temperature over the same columns, where they are
            known: those of :func:`info_nce` with reduction="none".
        views: How many views the anchors and the keys are of, whose rows lie below one another. A
            row meets the keys of its own view alone.
        temperature: T, above 0. It may be small: AdCo's is 0.02.
        momentum: mu, in [0, 1).
        weight_decay: lambda, at least 0.
        exact: As in :func:`nt_xent`.
        impl: "auto", "reference", "native", "torch" or "triton".

    Raises:
        TypeError: An argument of the wrong type, or a bank that is neither fp32 nor fp64.
        ValueError: Shapes or devices that do not fit, a bank or velocity that is not contiguous,
            both or neither of `keys` and `positive`, columns that do not exist, or a number out of
            its range.
        RuntimeError: `impl` names an implementation that cannot run here.

    Example:
        >>> bank = torch.nn.functional.normalize(torch.randn(65536, 128))
        >>> velocity = torch.zeros_like(bank)
        >>> query, key = torch.randn(2, 256, 128)
        >>> clae_fast.bank_step(bank, velocity, query, keys=key, lr=3.0, temperature=0.02)

    Source: Hu et al., AdCo: Adversarial Contrast for Efficient Learning of Unsupervised
    Representations from Self-Trained Negative Adversaries, CVPR 2021; Wang et al., CaCo: Both
    Positive and Negative Samples are Directly Learnable via Cooperative-adversarial Contrastive
    Learning, TPAMI 2023.
    """
    _check.projections("bank", bank)
    if bank.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"bank must be of dtype fp32 or fp64, got {bank.dtype}")
    _check.like("velocity", velocity, "bank", bank)
    for name, rows in (("bank", bank), ("velocity", velocity)):
        if not rows.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {list(rows.stride())}")
    _check.projections("anchor", anchor)
    _check.same_place("anchor", anchor, "bank", bank, dtype=False)
    if anchor.shape[1] != bank.shape[1]:
        raise ValueError(
            f"anchor must have shape [N, {bank.shape[1]}] as bank has, got {list(anchor.shape)}"
        )
    if (keys is None) == (positive is None):
        raise ValueError("one of keys and positive must be given, not both")
    if keys is not None:
        _check.like("keys", keys, "anchor", anchor)
    if positive is not None:
        _check.columns("positive", positive, anchor)
    for name, numbers in (("weight", weight), ("losses", losses)):
        if numbers is not None:
            _check.tensor(name, numbers)
            _check.same_place(name, numbers, "bank", bank, dtype=False)
            _check.shape(name, numbers, len(anchor))
    if isinstance(views, bool) or not isinstance(views, int):
        raise TypeError(f"views must be an int, got {type(views).__name__}")
    if views < 1 or anchor.shape[0] % views:
        raise ValueError(f"views must divide {anchor.shape[0]} anchors, got {views}")
    _check.temperature(temperature)
    _check.in_range("momentum", momentum, 0, 1)
    _check.in_range("weight_decay", weight_decay, 0)
    _check.flag("exact", exact)
    if isinstance(lr, Tensor):
        _check.same_place("lr", lr, "bank", bank, dtype=False)
        _check.shape("lr", lr)
    else:
        lr = torch.full((), lr, dtype=bank.dtype, device=bank.device)
    impl = _impl.resolve("bank_step", impl, anchor, bank)
    settings: dict[str, Any] = {
        "views": views,
        "temperature": temperature,
        "momentum": momentum,
        "weight_decay": weight_decay,
    }
    if impl == "reference":
        _check.in_columns("positive", positive, len(bank))
        named: dict[str, Any] = {"keys": keys, "positive": positive, "weight": weight}
        return reference(bank, velocity, anchor, lr=lr, **named, **settings)
    _bank_step(
        bank.detach(),
        velocity,
        anchor.detach(),
        None if keys is None else keys.detach(),
        positive,
        None if weight is None else weight.detach().float(),
        None if losses is None else losses.detach().float(),
        lr.detach().float(),
        *settings.values(),
        exact,
        impl,
    )
