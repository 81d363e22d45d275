"""InfoNCE of anchors against keys: loss and the wanted gradients in one call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from clae_fast import _check, _impl, _native
from clae_fast.ops._rows import row_blocks, unit_rows, unit_rows_backward
from clae_fast.reference.info_nce import info_nce as reference

torch.library.define(
    "clae_fast::info_nce",
    "(Tensor anchor, Tensor keys, float temperature, bool symmetric, bool grad_anchor,"
    " bool grad_keys, bool exact, str impl)"
    " -> (Tensor loss, Tensor danchor, Tensor dkeys)",
)


@torch.library.impl("clae_fast::info_nce", ("cpu", "cuda"))
def _info_nce_impl(
    anchor: Tensor,  # [N, D]
    keys: Tensor,  # [M, D]
    temperature: float,
    symmetric: bool,
    grad_anchor: bool,
    grad_keys: bool,
    exact: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """A gradient that is not wanted comes back with no elements."""
    if impl == "triton":
        from clae_fast.kernels.info_nce import info_nce

        return info_nce(anchor, keys, temperature, symmetric, (grad_anchor, grad_keys), exact)
    if impl == "native":
        return _native.info_nce(anchor, keys, temperature, symmetric, grad_anchor, grad_keys)
    loss, danchor, dkeys = _one_way(anchor, keys, temperature, grad_anchor, grad_keys)
    if not symmetric:
        return loss, danchor, dkeys
    back, dkeys_back, danchor_back = _one_way(keys, anchor, temperature, grad_keys, grad_anchor)
    return (loss + back) / 2, (danchor + danchor_back) / 2, (dkeys + dkeys_back) / 2


def _one_way(
    anchor: Tensor,  # [N, D]
    keys: Tensor,  # [M, D]
    temperature: float,
    grad_anchor: bool,
    grad_keys: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The closed form in torch ops, a block of rows at a time."""
    with torch.autocast(anchor.device.type, enabled=False):
        (u, u_norm), (v, v_norm) = unit_rows(anchor), unit_rows(keys)
        N, M = len(u), len(v)
        positive = (u * v[:N]).sum(1, keepdim=True).div_(temperature)  # [N, 1]
        losses, p_neg = torch.empty_like(positive), torch.empty_like(positive)
        du = torch.empty_like(u) if grad_anchor else u.new_empty(0)
        dv = torch.zeros_like(v) if grad_keys else u.new_empty(0)
        for start, stop in row_blocks(N, M):
            rows = slice(start, stop)
            s = (u[rows] @ v.T).div_(temperature)
            s.diagonal(start).fill_(-torch.inf)
            shift = s.amax(1, keepdim=True).clamp_(min=torch.finfo(s.dtype).min)
            exp = s.sub_(shift).exp_()
            neg = exp.sum(1, keepdim=True)
            losses[rows] = F.softplus(neg.log() + shift - positive[rows])
            if not (grad_anchor or grad_keys):
                continue
            weight = (neg + (positive[rows] - shift).exp()).reciprocal_()
            # the positive's gradient p - 1 is minus the negatives' share: nothing cancels
            p_neg[rows] = neg * weight
            p = exp.mul_(weight)
            if grad_anchor:
                torch.mm(p, v, out=du[rows])
            if grad_keys:
                dv.addmm_(p.T, u[rows])
        if grad_anchor:
            du.addcmul_(p_neg, v[:N], value=-1)
            du = unit_rows_backward(du.div_(N * temperature), u, u_norm)
        if grad_keys:
            dv[:N].addcmul_(p_neg, u, value=-1)
            dv = unit_rows_backward(dv.div_(N * temperature), v, v_norm)
        return losses.mean(), du, dv


@torch.library.register_fake("clae_fast::info_nce")
def _info_nce_fake(
    anchor: Tensor,
    keys: Tensor,
    temperature: float,
    symmetric: bool,
    grad_anchor: bool,
    grad_keys: bool,
    exact: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        anchor.new_empty((), dtype=torch.float32),
        anchor.new_empty(anchor.shape if grad_anchor else (0,), dtype=torch.float32),
        anchor.new_empty(keys.shape if grad_keys else (0,), dtype=torch.float32),
    )


_info_nce = torch.ops.clae_fast.info_nce.default


class _InfoNCE(torch.autograd.Function):
    """Computes the wanted gradients with the loss and keeps nothing else."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        keys: Tensor,
        temperature: float,
        symmetric: bool,
        exact: bool,
        impl: str,
    ) -> Tensor:
        loss, danchor, dkeys = _info_nce(
            anchor, keys, temperature, symmetric, *ctx.needs_input_grad[:2], exact, impl
        )
        ctx.save_for_backward(danchor, dkeys)
        ctx.dtype = anchor.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        danchor, dkeys = ctx.saved_tensors
        danchor = (danchor * dloss).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        dkeys = (dkeys * dloss).to(ctx.dtype) if ctx.needs_input_grad[1] else None
        return danchor, dkeys, None, None, None, None


def info_nce(
    anchor: Tensor,  # [N, D]
    keys: Tensor,  # [M, D]
    *,
    temperature: float = 0.1,
    symmetric: bool = False,
    exact: bool = False,
    impl: str = "auto",
) -> Tensor:
    r"""InfoNCE of anchors against keys: the loss of CLAE's "Plain" variant, and of CLIP.

    .. math:: \frac{1}{N} \sum_i \log \sum_j e^{s_{ij}} - s_{ii},
        \quad s_{ij} = \frac{a_i \cdot k_j}{\|a_i\| \|k_j\| T}

    over the N anchors and all M keys. Key i is the positive of anchor i; keys past the N-th are
    further negatives. With `symmetric` it is the mean of this and of the loss in which anchors and
    keys have changed places. Rows are normalised inside, as F.normalize with eps=1e-12 does.
    Gradients reach both operands; only those that are wanted are computed, together with the loss.

    Args:
        anchor: Projections, [N, D], fp32, fp16, bf16 or fp64; not normalised.
        keys: Projections, [M, D] with M >= N.
        temperature: T, above 0.
        symmetric: Take the loss in both directions; needs M = N.
        exact: As in :func:`nt_xent`.
        impl: "auto", "reference", "native", "torch" or "triton".

    Returns:
        The loss, a scalar of fp32, of fp64 for fp64. NaN where an input is NaN, 0 for M = 1.

    Raises:
        TypeError: An argument of the wrong type, or operands of different dtypes.
        ValueError: Shapes other than [N, D] and [M, D] with M >= N >= 1, M = N where `symmetric`, a
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
    if keys.shape[0] < anchor.shape[0] or keys.shape[1] != anchor.shape[1]:
        raise ValueError(
            "keys must have shape [M, D] with M >= N for anchor of shape [N, D], "
            f"got {list(keys.shape)} for {list(anchor.shape)}"
        )
    _check.flag("symmetric", symmetric)
    if symmetric and keys.shape != anchor.shape:
        raise ValueError(
            f"keys must have the shape of anchor, {list(anchor.shape)}, where symmetric, "
            f"got {list(keys.shape)}"
        )
    _check.temperature(temperature)
    _check.flag("exact", exact)
    impl = _impl.resolve("info_nce", impl, anchor, keys)
    if impl == "reference":
        return reference(anchor, keys, temperature=temperature, symmetric=symmetric)
    if torch.is_grad_enabled() and (anchor.requires_grad or keys.requires_grad):
        return _InfoNCE.apply(anchor, keys, temperature, symmetric, exact, impl)
    return _info_nce(anchor, keys, temperature, symmetric, False, False, exact, impl)[0]
