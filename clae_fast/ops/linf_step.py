"""One signed-gradient step, projected to a ball in the maximum norm and to a range."""

from __future__ import annotations

import torch
from torch import Tensor

from clae_fast import _check, _impl, _native
from clae_fast.ops import _bounds
from clae_fast.ops._bounds import PerChannel
from clae_fast.reference.linf_step import linf_step as reference

_impl.declare("linf_step", native=_impl.ANY, triton=_impl.ANY, cuda=_impl.ANY)
# bounds has alpha, eps, lo and hi, each as one number or as C; or it is empty, and table has them
torch.library.define(
    "clae_fast::linf_step",
    "(Tensor x, Tensor grad, Tensor? x0, float[] bounds, Tensor? table, str impl) -> Tensor",
)
# the digits of a GPU kernel's layout are enough for images in any strides
_DIGITS = 4


@torch.library.impl("clae_fast::linf_step", ("cpu", "cuda"))
def _linf_step_impl(
    x: Tensor,  # [N, C, ...]
    grad: Tensor,  # as x
    x0: Tensor | None,  # as x
    bounds: list[float],  # [4 * 1] or [4 * C]
    table: Tensor | None,  # [4, C]
    impl: str,
) -> Tensor:
    out = torch.empty_like(x)
    if out.numel() == 0:
        return out
    center = x if x0 is None else x0
    C = len(bounds) // 4
    numbers = _bounds.rounded(bounds) if table is None else table
    if impl == "native":
        x, grad, center = (_laid_out_as(tensor, out) for tensor in (x, grad, center))
        _native.linf_step_cpu(x, grad, center, out, numbers)
        return out
    if C > _native.LINF_CHANNELS:
        numbers = torch.tensor(numbers, dtype=torch.float32).view(4, C).to(x.device)
    layout = _layout(out, x, grad, center)
    if layout is None:
        x, grad, center = (_laid_out_as(tensor, out) for tensor in (x, grad, center))
        layout = _layout(out, x, grad, center)
    assert layout is not None
    if impl == "cuda":
        _native.linf_step_cuda(x, grad, center, out, numbers, layout)
        return out
    from clae_fast.kernels.linf_step import linf_step

    rows: tuple[tuple[float, ...], ...] | Tensor
    if isinstance(numbers, list):
        rows = tuple(tuple(numbers[k * C : (k + 1) * C]) for k in range(4))
    else:
        rows = numbers
    # without an x0 the kernel reads x once
    linf_step(x, grad, None if x0 is None else center, out, rows, layout)
    return out


@torch.library.register_fake("clae_fast::linf_step")
def _linf_step_fake(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x)


_linf_step = torch.ops.clae_fast.linf_step.default


def linf_step(
    x: Tensor,  # [N, C, ...], or any shape where the bounds are scalars
    grad: Tensor,  # as x
    *,
    alpha: PerChannel,
    x0: Tensor | None = None,  # as x
    eps: PerChannel | None = None,
    lo: PerChannel | None = None,
    hi: PerChannel | None = None,
    impl: str = "auto",
) -> Tensor:
    r"""One step of a signed-gradient attack, projected, in one pass over memory.

    .. math:: \mathrm{clip}(\mathrm{clip}(x + \alpha\, \mathrm{sign}(g), x_0 - \epsilon,
        x_0 + \epsilon), lo, hi)

    The sign of NaN is 0 and that of ±inf is ±1; NaN in `x` or `x0` stays NaN. The arithmetic is
    fp32 (fp64 for fp64), with eps rounded towards 0, and the ball's bounds and the result are
    rounded towards `x0`: `|result - x0| <= eps` holds exactly wherever `x0` lies in [lo, hi].

    On a GPU it is one launch, whatever the layouts, and CUDA graphs can capture it. Bounds in
    tensors add a few small launches. A sequence of numbers for more than four channels is copied to
    the GPU at every call, which cannot be captured.

    Args:
        x: The images to step from, [N, C, ...], fp32, fp16, bf16 or fp64, in any memory layout.
        grad: The gradient by `x`, of its shape and of any of these dtypes.
        alpha: Step size, in the units of `x`. This and the other bounds are numbers, or C of them
            for the channels in dimension 1, in a sequence or a tensor.
        x0: The center of the ball, of the shape and dtype of `x`; None is `x` itself.
        eps: Radius of the ball; None is no ball.
        lo: Lower end of the range; None is none.
        hi: Upper end of the range; None is none.
        impl: "auto", "reference", "native", "triton" or "cuda".

    Returns:
        The images after the step, in the dtype and layout of `x`; a constant for autograd.

    Raises:
        TypeError: An argument of the wrong type, or an `x0` of another dtype than `x`.
        ValueError: Shapes or devices that differ, bounds of another length than C, a bound that is
            NaN, a negative eps, or lo above hi. Values inside a tensor are not checked, since one
            would have to wait for a GPU.
        RuntimeError: `impl` names an implementation that cannot run here.

    Example:
        >>> x, grad = torch.rand(8, 3, 32, 32), torch.randn(8, 3, 32, 32)
        >>> x_adv = clae_fast.linf_step(x, grad, alpha=8 / 255, eps=8 / 255, lo=0.0, hi=1.0)

    Source: Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks, ICLR 2018.
    """
    _check.tensor("x", x)
    _check.like("grad", grad, "x", x, dtype=False)
    if x0 is not None:
        _check.like("x0", x0, "x", x)
    _bounds.check(x, alpha, eps, lo, hi)
    x, grad, x0 = x.detach(), grad.detach(), None if x0 is None else x0.detach()
    impl = _impl.resolve("linf_step", impl, x, grad)
    if impl == "reference":
        return reference(x, grad, alpha=alpha, x0=x0, eps=eps, lo=lo, hi=hi)
    return _linf_step(x, grad, x0, *_bounds.pack(x, alpha, eps, lo, hi), impl)


def _layout(out: Tensor, *operands: Tensor) -> tuple[tuple[int, ...], ...] | None:
    """Where the elements of `out`, in the order of its memory, lie in each operand.

    An element's number is written in a mixed base, the last digit fastest, and every digit
    multiplied by a stride. Dimensions that are neighbors in all of memory share a digit.

    Returns:
        The base, and each operand's strides, of _DIGITS digits; None where more are needed.
    """
    sizes: list[int] = []
    strides: list[tuple[int, ...]] = []
    for dim in sorted(range(out.ndim), key=out.stride, reverse=True):
        size, stride = out.shape[dim], tuple(operand.stride(dim) for operand in operands)
        if size == 1:
            continue
        if strides and strides[-1] == tuple(size * inner for inner in stride):
            size, strides[-1] = size * sizes.pop(), stride
        else:
            strides.append(stride)
        sizes.append(size)
    missing = _DIGITS - len(sizes)
    if missing < 0:
        return None
    digits = [(1,) + (0,) * len(operands)] * missing + [
        (size, *stride) for size, stride in zip(sizes, strides, strict=True)
    ]
    return tuple(zip(*digits, strict=True))


def _laid_out_as(tensor: Tensor, other: Tensor) -> Tensor:
    """`tensor` with the strides of `other`, itself where it has them."""
    if tensor.stride() == other.stride():
        return tensor
    return torch.empty_like(other, dtype=tensor.dtype).copy_(tensor)
