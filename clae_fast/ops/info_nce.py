"""InfoNCE of anchors against keys: loss and the wanted gradients in one call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from clae_fast import _check, _impl, _native
from clae_fast.ops._loss import fused, uninitialized, wants_grad
from clae_fast.ops._rows import row_blocks, unit_rows, unit_rows_backward
from clae_fast.reference.info_nce import info_nce as reference

_impl.declare("info_nce", native=_impl.ANY, triton=_impl.rows_of_at_most(1024), torch=_impl.ANY)
torch.library.define(
    "clae_fast::info_nce",
    "(Tensor anchor, Tensor keys, Tensor? positive, Tensor? weight, float temperature,"
    " bool symmetric, bool mean, bool grad_anchor, bool grad_keys, bool exact, str impl)"
    " -> (Tensor loss, Tensor danchor, Tensor dkeys)",
)


@torch.library.register_fake("clae_fast::info_nce")
def _info_nce_fake(
    anchor: Tensor,
    keys: Tensor,
    positive: Tensor | None,
    weight: Tensor | None,
    temperature: float,
    symmetric: bool,
    mean: bool,
    grad_anchor: bool,
    grad_keys: bool,
    *_: object,
) -> tuple[Tensor, ...]:
    return uninitialized(
        anchor,
        () if mean else anchor.shape[:1],
        anchor.shape if grad_anchor else 0,
        keys.shape if grad_keys else 0,
    )


@torch.library.impl("clae_fast::info_nce", ("cpu", "cuda"))
def _info_nce_impl(
    anchor: Tensor,  # [N, D]
    keys: Tensor,  # [M, D]
    positive: Tensor | None,  # [N]
    weight: Tensor | None,  # [N]
    temperature: float,
    symmetric: bool,
    mean: bool,
    grad_anchor: bool,
    grad_keys: bool,
    exact: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The mean loss and its gradients, or the rows' losses and the gradients of their sum.

    The weight, where there is one, says how much each row counts in the gradients.
    """
    _check.in_columns("positive", positive, len(keys))
    wanted = (grad_anchor, grad_keys)
    if impl == "triton":
        from clae_fast.kernels.info_nce import info_nce

        given = (anchor, keys, temperature, symmetric, wanted, exact)
        return info_nce(*given, positive=positive, weight=weight, mean=mean)
    if impl == "native":
        numbers = (temperature, symmetric, mean)
        outputs = _info_nce_fake(anchor, keys, positive, weight, *numbers, *wanted)
        rows = (_native.Rows(anchor), _native.Rows(keys))
        each = _native.in_one_piece(positive, weight)
        sizes = (len(anchor), *keys.shape)
        _native.run("info_nce", *rows, *each, *sizes, *numbers, torch.get_num_threads(), *outputs)
        return outputs
    loss, danchor, dkeys = _one_way(anchor, keys, positive, weight, temperature, mean, wanted)
    if not symmetric:
        return loss, danchor, dkeys
    back = _one_way(keys, anchor, None, None, temperature, mean, (grad_keys, grad_anchor))
    return (loss + back[0]) / 2, (danchor + back[2]) / 2, (dkeys + back[1]) / 2


def _one_way(
    anchor: Tensor,  # [N, D]
    keys: Tensor,  # [M, D]
    positive: Tensor | None,  # [N]
    weight: Tensor | None,  # [N]
    temperature: float,
    mean: bool,
    wanted: tuple[bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The closed form in torch ops, a block of rows at a time."""
    with torch.autocast(anchor.device.type, enabled=False):
        (u, u_norm), (v, v_norm) = unit_rows(anchor), unit_rows(keys)
        N, M = len(u), len(v)
        positive_of = torch.arange(N, device=u.device) if positive is None else positive
        partner = v[positive_of]
        s_positive = (u * partner).sum(1, keepdim=True).div_(temperature)  # [N, 1]
        losses, p_neg = torch.empty_like(s_positive), torch.empty_like(s_positive)
        grad_anchor, grad_keys = wanted
        du = torch.empty_like(u) if grad_anchor else u.new_empty(0)
        dv = torch.zeros_like(v) if grad_keys else u.new_empty(0)
        for start, stop in row_blocks(N, M):
            rows = slice(start, stop)
            s = (u[rows] @ v.T).div_(temperature)
            s.scatter_(1, positive_of[rows, None], -torch.inf)
            shift = s.amax(1, keepdim=True).clamp_(min=torch.finfo(s.dtype).min)
            exp = s.sub_(shift).exp_()
            neg = exp.sum(1, keepdim=True)
            losses[rows] = F.softplus(neg.log() + shift - s_positive[rows])
            if not any(wanted):
                continue
            share = (neg + (s_positive[rows] - shift).exp()).reciprocal_()
            if weight is not None:
                share *= weight[rows, None]
            # the positive's gradient p - 1 is minus the negatives' share, so that nothing cancels
            p_neg[rows] = neg * share
            p = exp.mul_(share)
            if grad_anchor:
                torch.mm(p, v, out=du[rows])
            if grad_keys:
                dv.addmm_(p.T, u[rows])
        divisor = N * temperature if mean else temperature
        if grad_anchor:
            du.addcmul_(p_neg, partner, value=-1)
            du = unit_rows_backward(du.div_(divisor), u, u_norm)
        if grad_keys:
            if positive is None:
                dv[:N].addcmul_(p_neg, u, value=-1)
            else:
                # this adds in a fixed order, which index_add_ does not do on a GPU
                dv.index_put_((positive,), -p_neg * u, accumulate=True)
            dv = unit_rows_backward(dv.div_(divisor), v, v_norm)
        return losses.mean() if mean else losses[:, 0], du, dv


_info_nce = torch.ops.clae_fast.info_nce.default


class _RowLosses(torch.autograd.Function):
    """The rows' losses, whose gradients are computed when it is known what each row counts."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        keys: Tensor,
        positive: Tensor | None,
        temperature: float,
        exact: bool,
        impl: str,
    ) -> Tensor:
        ctx.save_for_backward(anchor, keys, positive)
        ctx.settings = (temperature, exact, impl)
        settings = (temperature, False, False, False, False, exact, impl)
        return _info_nce(anchor, keys, positive, None, *settings)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        anchor, keys, positive = ctx.saved_tensors
        temperature, exact, impl = ctx.settings
        wanted = ctx.needs_input_grad[:2]
        settings = (temperature, False, False, *wanted, exact, impl)
        _, danchor, dkeys = _info_nce(anchor, keys, positive, dloss, *settings)
        danchor = danchor.to(anchor.dtype) if wanted[0] else None
        dkeys = dkeys.to(keys.dtype) if wanted[1] else None
        return danchor, dkeys, None, None, None, None


def _row_losses(
    anchor: Tensor,  # [N, D]
    keys: Tensor,  # [M, D]
    positive: Tensor | None,  # [N]
    temperature: float,
    exact: bool,
    impl: str,
) -> Tensor:  # [N]
    """The rows' losses in one direction.

    An anchor's gradient comes from its own row alone, and is computed with the loss. A key's comes
    from all rows, so that it waits for the backward pass.
    """
    if wants_grad(keys):
        return _RowLosses.apply(anchor, keys, positive, temperature, exact, impl)
    settings = (temperature, False, False, wants_grad(anchor), False, exact, impl)
    return fused(_info_nce, (anchor, keys, positive, None), settings)


def _mean_loss(
    anchor: Tensor,  # [N, D]
    keys: Tensor,  # [M, D]
    positive: Tensor | None,  # [N]
    temperature: float,
    symmetric: bool,
    exact: bool,
    impl: str,
) -> Tensor:  # []
    """The mean of the rows' losses, in one direction or in both."""
    wanted = (wants_grad(anchor), wants_grad(keys))
    settings = (temperature, symmetric, True, *wanted, exact, impl)
    return fused(_info_nce, (anchor, keys, positive, None), settings)


def info_nce(
    anchor: Tensor,  # [N, D]
    keys: Tensor,  # [M, D]
    *,
    temperature: float = 0.1,
    positive: Tensor | None = None,  # [N]
    reduction: str = "mean",
    symmetric: bool = False,
    exact: bool = False,
    impl: str = "auto",
) -> Tensor:
    r"""InfoNCE of anchors against keys: the loss of CLAE's "Plain" variant, and of CLIP.

    .. math:: \frac{1}{N} \sum_i \log \sum_j e^{s_{ij}} - s_{i\pi(i)},
        \quad s_{ij} = \frac{a_i \cdot k_j}{\|a_i\| \|k_j\| T}

    over the N anchors and all M keys. The positive of anchor i is key i, and keys past the N-th are
    further negatives. Or `positive` names the key, which several anchors may share. With
    `symmetric` the result is the mean of this loss and of the one in which anchors and keys have
    changed places. Rows are normalized inside, as F.normalize with eps=1e-12 does. Both operands
    have gradients, and those that are wanted are computed with the loss. The keys' alone is
    computed in the backward pass where reduction="none", which repeats the forward's work.

    Args:
        anchor: Projections, [N, D], fp32, fp16, bf16 or fp64; not normalized.
        keys: Projections, [M, D] with M >= N, or with any M where `positive` is given.
        temperature: T, above 0.
        positive: int64 [N], the column of each anchor's positive; None is column i. Not with
            `symmetric`. Columns are checked on the CPU only. On a GPU one that does not exist is an
            error of the device, or makes its row NaN.
        reduction: "mean" over the rows, or "none" for the loss of each.
        symmetric: Take the loss in both directions; needs M = N.
        exact: As in :func:`nt_xent`.
        impl: "auto", "reference", "native", "torch" or "triton".

    Returns:
        The loss, a scalar or [N], of fp32, of fp64 for fp64. NaN where an input is NaN, 0 for
        M = 1.

    Raises:
        TypeError: An argument of the wrong type, or operands of different dtypes.
        ValueError: Shapes other than [N, D] and [M, D] with M >= N >= 1, M = N where `symmetric`, a
            `positive` of another shape, with columns that do not exist or with `symmetric`, a
            temperature that is not above 0, or sizes that `impl` does not take.
        RuntimeError: `impl` names an implementation that cannot run here.

    Example:
        >>> anchor, keys = torch.randn(2, 256, 128, requires_grad=True)
        >>> clae_fast.info_nce(anchor, keys, temperature=0.1).backward()

    Source: Ho & Vasconcelos, Contrastive Learning with Adversarial Examples, NeurIPS 2020.
    """
    _check.projections("anchor", anchor)
    _check.projections("keys", keys)
    _check.same_place("keys", keys, "anchor", anchor)
    fewest = anchor.shape[0] if positive is None else 1
    if keys.shape[0] < fewest or keys.shape[1] != anchor.shape[1]:
        raise ValueError(
            "keys must have shape [M, D] with M >= N for anchor of shape [N, D], "
            f"got {list(keys.shape)} for {list(anchor.shape)}"
        )
    _check.flag("symmetric", symmetric)
    if positive is not None:
        if symmetric:
            raise ValueError("positive must be None where symmetric")
        _check.columns("positive", positive, anchor)
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction must be 'mean' or 'none', got {reduction!r}")
    if symmetric and keys.shape != anchor.shape:
        raise ValueError(
            f"keys must have the shape of anchor, {list(anchor.shape)}, where symmetric, "
            f"got {list(keys.shape)}"
        )
    _check.temperature(temperature)
    _check.flag("exact", exact)
    impl = _impl.resolve("info_nce", impl, anchor, keys)
    if impl == "reference":
        _check.in_columns("positive", positive, len(keys))
        return reference(
            anchor,
            keys,
            temperature=temperature,
            positive=positive,
            reduction=reduction,
            symmetric=symmetric,
        )
    if reduction == "mean":
        return _mean_loss(anchor, keys, positive, temperature, symmetric, exact, impl)
    losses = _row_losses(anchor, keys, positive, temperature, exact, impl)
    if symmetric:
        losses = (losses + _row_losses(keys, anchor, None, temperature, exact, impl)) / 2
    return losses
