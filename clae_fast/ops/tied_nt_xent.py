"""The gradient of NT-Xent where both views are the same point, in closed form."""

from __future__ import annotations

import torch
from torch import Tensor

from clae_fast import _check, _impl, _native
from clae_fast.ops._rows import row_blocks, unit_rows, unit_rows_backward
from clae_fast.reference.tied_nt_xent import tied_nt_xent as reference

_impl.declare("tied_nt_xent", native=_impl.ANY, triton=_impl.rows_of_at_most(1024), torch=_impl.ANY)
torch.library.define(
    "clae_fast::tied_nt_xent", "(Tensor z, float temperature, bool exact, str impl) -> Tensor"
)


@torch.library.register_fake("clae_fast::tied_nt_xent")
def _tied_nt_xent_fake(z: Tensor, *_: object) -> Tensor:
    return z.new_empty(z.shape, dtype=torch.float32)


@torch.library.impl("clae_fast::tied_nt_xent", ("cpu", "cuda"))
def _tied_nt_xent_impl(
    z: Tensor,  # [N, D]
    temperature: float,
    exact: bool,
    impl: str,
) -> Tensor:
    if impl == "triton":
        from clae_fast.kernels.tied_nt_xent import tied_nt_xent

        return tied_nt_xent(z, temperature, exact)
    if impl == "native":
        dz = _tied_nt_xent_fake(z)
        operands = (_native.Rows(z), *z.shape)
        _native.run("tied_nt_xent", *operands, temperature, torch.get_num_threads(), dz)
        return dz
    with torch.autocast(z.device.type, enabled=False):
        u, norm = unit_rows(z)
        N = len(u)
        positive = u.square().sum(1, keepdim=True).div_(temperature)  # [N, 1]
        du, p_neg = torch.zeros_like(u), torch.empty_like(positive)
        for start, stop in row_blocks(N, N):
            rows = slice(start, stop)
            s = (u[rows] @ u.T).div_(temperature)
            s.diagonal(start).fill_(-torch.inf)
            shift = s.amax(1, keepdim=True).clamp_(min=torch.finfo(s.dtype).min)
            exp = s.sub_(shift).exp_()
            # every negative counts twice, once for each view
            neg = exp.sum(1, keepdim=True).mul_(2)
            weight = (neg + (positive[rows] - shift).exp()).reciprocal_()
            p_neg[rows] = neg * weight
            p = exp.mul_(weight)
            du[rows].addmm_(p, u)
            du.addmm_(p.T, u[rows])
        du.addcmul_(p_neg, u, value=-1)
        return unit_rows_backward(du.div_(N * temperature), u, norm)


_tied_nt_xent = torch.ops.clae_fast.tied_nt_xent.default


def tied_nt_xent(
    z: Tensor,  # [N, D]
    *,
    temperature: float = 0.5,
    exact: bool = False,
    impl: str = "auto",
) -> Tensor:
    r"""Gradient of :func:`nt_xent` by its second view where both views are `z`.

    It equals d nt_xent(z.detach(), z_b) / d z_b at z_b = z, and is computed by its closed form on N
    rows instead of 2N, without autograd. With :math:`p_{jk}` the softmax of row j at the negative
    k, it is

    .. math:: \frac{1}{N T \|z_j\|} (I - u_j u_j^\top) \sum_{k \ne j} (p_{jk} + p_{kj}) u_k.

    The released attack of CLAE follows this gradient: it starts at the clean view, where the
    positive has no gradient.

    Args:
        z: Projections, [N, D], fp32, fp16, bf16 or fp64; not normalized. A constant here.
        temperature: T, above 0.
        exact: As in :func:`nt_xent`.
        impl: "auto", "reference", "native", "torch" or "triton".

    Returns:
        The gradient, [N, D], in fp32, in fp64 for fp64, so that it can be scaled before a cast to
        half precision. Processors with AVX-512 BF16 multiply bf16 rows as they are, and the
        gradient then has the digits of bf16. NaN where an input is NaN, 0 for N = 1.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: A shape other than [N, D], N = 0, a temperature that is not above 0, or sizes
            that `impl` does not take.
        RuntimeError: `impl` names an implementation that cannot run here.

    Example:
        >>> z = torch.randn(256, 128)
        >>> dz = clae_fast.tied_nt_xent(z, temperature=0.5)

    Source: derived from Ho & Vasconcelos, Contrastive Learning with Adversarial Examples, NeurIPS
    2020, and its released code.
    """
    _check.projections("z", z)
    _check.temperature(temperature)
    _check.flag("exact", exact)
    z = z.detach()
    impl = _impl.resolve("tied_nt_xent", impl, z)
    if impl == "reference":
        return reference(z, temperature=temperature)
    return _tied_nt_xent(z, temperature, exact, impl)
