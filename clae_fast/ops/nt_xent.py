"""NT-Xent: loss and gradient in one fused call."""

from __future__ import annotations

import torch
from torch import Tensor

from clae_fast import _check, _impl, _native
from clae_fast.ops._loss import fused, uninitialized, wants_grad
from clae_fast.reference.nt_xent import nt_xent as reference

# up to here one launch is assumed to be faster than three; this is not measured yet
_SINGLE_LAUNCH_ROWS = 2048


def _cuda_refuses(z0: Tensor, *_: Tensor, exact: bool = False) -> str:
    if exact:
        return "rounds rows to fp16: exact=True needs impl='triton'"
    n, D = 2 * len(z0), z0.shape[1]
    if not _native.nt_xent_cuda_takes(n, D):
        return f"takes few and narrow rows, got {n} of {D} elements"
    return ""


def _cuda_outgrown(z0: Tensor, *_: Tensor, exact: bool = False) -> bool:
    return 2 * len(z0) > _SINGLE_LAUNCH_ROWS


_impl.declare(
    "nt_xent",
    native=_impl.ANY,
    cuda=_impl.Limits(_cuda_refuses, _cuda_outgrown),
    triton=_impl.rows_of_at_most(1024),
)
torch.library.define(
    "clae_fast::nt_xent",
    "(Tensor z0, Tensor z1, float temperature, bool grad, bool exact, str impl)"
    " -> (Tensor loss, Tensor dz)",
)


@torch.library.register_fake("clae_fast::nt_xent")
def _nt_xent_fake(
    z0: Tensor, z1: Tensor, temperature: float, grad: bool, *_: object
) -> tuple[Tensor, ...]:
    N, D = z0.shape
    return uninitialized(z0, (), (2 * N, D) if grad else 0)


@torch.library.impl("clae_fast::nt_xent", ("cpu", "cuda"))
def _nt_xent_impl(
    z0: Tensor,  # [N, D]
    z1: Tensor,  # [N, D]
    temperature: float,
    grad: bool,
    exact: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    if impl == "triton":
        from clae_fast.kernels.nt_xent import nt_xent

        return nt_xent(z0, z1, temperature, grad, exact)
    loss, dz = _nt_xent_fake(z0, z1, temperature, grad)
    if impl == "native":
        operands = (_native.Rows(z0), _native.Rows(z1), *z0.shape)
        _native.run("nt_xent", *operands, temperature, torch.get_num_threads(), loss, dz)
    else:
        operands = (z0, z1, z0.dtype, *z0.stride(), *z1.stride(), *z0.shape)
        _native.run_cuda("nt_xent_cuda", z0.device, *operands, temperature, loss, dz)
    return loss, dz


_nt_xent = torch.ops.clae_fast.nt_xent.default


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
    normalized inside, as F.normalize with eps=1e-12 does. With gradients enabled, one fused call
    computes loss and gradient, and nothing but the gradient is kept for the backward.

    Args:
        z0: Projections of the first view, [N, D], fp32, fp16, bf16 or fp64; not normalized.
        z1: Projections of the second view, row i belonging to row i of `z0`.
        temperature: T, above 0.
        exact: Keep 22 bits of fp32 rows on a GPU, at a third of the speed. By default they are
            rounded once to the 11 bits of fp16 for the tensor cores. fp16 and bf16 rows are exact.
        impl: "auto", "reference", "native", "triton" or "cuda", which is one launch and takes
            2N <= 4096.

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
    settings = (temperature, wants_grad(z0, z1), exact, impl)
    return fused(_nt_xent, (z0, z1), settings, views=2)
