"""NT-Xent: loss and gradient in one fused call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from clae_fast import _check, _impl, _native
from clae_fast.ops._rows import view_grads
from clae_fast.reference.nt_xent import nt_xent as reference

torch.library.define(
    "clae_fast::nt_xent_fwd",
    "(Tensor z0, Tensor z1, float temperature, bool exact, str impl) -> Tensor",
)
torch.library.define(
    "clae_fast::nt_xent_fwd_bwd",
    "(Tensor z0, Tensor z1, float temperature, bool exact, str impl) -> (Tensor loss, Tensor dz)",
)


@torch.library.impl("clae_fast::nt_xent_fwd", ("cpu", "cuda"))
def _nt_xent_fwd_impl(
    z0: Tensor,  # [N, D]
    z1: Tensor,  # [N, D]
    temperature: float,
    exact: bool,
    impl: str,
) -> Tensor:
    if impl != "triton":
        native = _native.nt_xent_cuda if impl == "cuda" else _native.nt_xent
        return native(z0, z1, temperature, grad=False)[0]
    from clae_fast.kernels.nt_xent import nt_xent

    return nt_xent(z0, z1, temperature, False, exact)[0]


@torch.library.impl("clae_fast::nt_xent_fwd_bwd", ("cpu", "cuda"))
def _nt_xent_fwd_bwd_impl(
    z0: Tensor,  # [N, D]
    z1: Tensor,  # [N, D]
    temperature: float,
    exact: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    if impl != "triton":
        native = _native.nt_xent_cuda if impl == "cuda" else _native.nt_xent
        loss, dz = native(z0, z1, temperature, grad=True)
        assert dz is not None
        return loss, dz
    from clae_fast.kernels.nt_xent import nt_xent

    return nt_xent(z0, z1, temperature, True, exact)


@torch.library.register_fake("clae_fast::nt_xent_fwd")
def _nt_xent_fwd_fake(z0: Tensor, z1: Tensor, temperature: float, exact: bool, impl: str) -> Tensor:
    return z0.new_empty((), dtype=torch.float32)


@torch.library.register_fake("clae_fast::nt_xent_fwd_bwd")
def _nt_xent_fwd_bwd_fake(
    z0: Tensor, z1: Tensor, temperature: float, exact: bool, impl: str
) -> tuple[Tensor, Tensor]:
    N, D = z0.shape
    loss = z0.new_empty((), dtype=torch.float32)
    return loss, z0.new_empty((2 * N, D), dtype=torch.float32)


_nt_xent_fwd = torch.ops.clae_fast.nt_xent_fwd.default
_nt_xent_fwd_bwd = torch.ops.clae_fast.nt_xent_fwd_bwd.default


class _NTXent(torch.autograd.Function):
    """Computes the gradient with the loss and keeps nothing else: dz, [2N, D] in fp32."""

    @staticmethod
    def forward(
        ctx: Any, z0: Tensor, z1: Tensor, temperature: float, exact: bool, impl: str
    ) -> Tensor:
        loss, dz = _nt_xent_fwd_bwd(z0, z1, temperature, exact, impl)
        ctx.save_for_backward(dz)
        ctx.dtype = z0.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        return *view_grads(ctx, dloss), None, None, None


def nt_xent(
    z0: Tensor,  # [N, D]
    z1: Tensor,  # [N, D]
    *,
    temperature: float = 0.5,
    exact: bool = False,
    impl: str = "auto",
) -> Tensor:
    r"""NT-Xent of two views' projections, the loss of SimCLR.

    .. math:: \frac{1}{2N} \sum_i \log \sum_{j \ne i} e^{s_{ij}} - s_{i,\pi(i)},
        \quad s_{ij} = \frac{z_i \cdot z_j}{\|z_i\| \|z_j\| T}

    over the 2N rows of both views, with the positive π(i) of a row in the other view. Rows are
    normalised inside, as F.normalize with eps=1e-12 does. With gradients enabled, one fused call
    computes loss and gradient, and nothing but the gradient is kept for the backward.

    Args:
        z0: Projections of the first view, [N, D], fp32, fp16, bf16 or fp64; not normalised.
        z1: Projections of the second view, row i belonging to row i of `z0`.
        temperature: T, above 0.
        exact: Compute with fp32 rows to 22 bits on a GPU, at a third of the speed. The default
            rounds them to fp16's 11 bits for the tensor cores, once; fp16 and bf16 rows are exact.
        impl: "auto", "reference", "native", "triton" or "cuda", one launch for 2N <= 4096.

    Returns:
        The loss, a scalar of fp32, of fp64 for fp64. NaN where an input is NaN, 0 for N = 1.

    Raises:
        TypeError: An argument of the wrong type, or views of different dtypes.
        ValueError: A shape other than [N, D], N = 0, a temperature that is not above 0, or sizes
            that `impl` does not take.
        RuntimeError: `impl` names an implementation that cannot run here.

    Example:
        >>> z0, z1 = torch.randn(2, 256, 128, requires_grad=True)
        >>> clae_fast.nt_xent(z0, z1, temperature=0.5).backward()

    Source: Chen et al., A Simple Framework for Contrastive Learning of Visual Representations,
    ICML 2020.
    """
    _check.projections("z0", z0)
    _check.like("z1", z1, "z0", z0)
    _check.temperature(temperature)
    _check.flag("exact", exact)
    impl = _impl.resolve("nt_xent", impl, z0, z1, exact=exact)
    if impl == "reference":
        return reference(z0, z1, temperature=temperature)
    if torch.is_grad_enabled() and (z0.requires_grad or z1.requires_grad):
        return _NTXent.apply(z0, z1, temperature, exact, impl)
    return _nt_xent_fwd(z0, z1, temperature, exact, impl)
