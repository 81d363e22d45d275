"""The sign step along the input gradient of an encoder's first convolution, in one kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from clae_fast import _check, _impl, _native
from clae_fast.ops import _bounds
from clae_fast.ops._bounds import PerChannel
from clae_fast.reference.stem_step import stem_step as reference

# what csrc/stem_step.h takes: kernel size, stride and padding, and channels of dy
_STEMS = ((3, 1, 1), (7, 2, 3))
_CHANNELS = (64, 128, 192)


def kernel_takes(dtype: torch.dtype, weight: Tensor, x: Tensor, stride: int, padding: int) -> bool:
    """Whether the kernel takes a dy of `dtype` and these, which have four dimensions."""
    C_out, C, height, width = weight.shape
    return (
        dtype in (torch.float16, torch.bfloat16)
        and weight.dtype in (torch.float32, dtype)
        and x.dtype in (torch.float32, torch.float16)
        and C_out in _CHANNELS
        and C == 3
        and height == width
        and (height, stride, padding) in _STEMS
        # the kernel counts in 32 bits the numbers of an image, and the rows' pixels of all images
        and C_out * x.shape[2] * (x.shape[3] + 64) < 2**30
        and len(x) * (x.shape[3] + 8) < 2**30
    )


def _cuda_refuses(dy: Tensor, x: Tensor, *, weight: Tensor, stride: int, padding: int) -> str:
    if kernel_takes(dy.dtype, weight, x, stride, padding):
        return ""
    return (
        f"takes 16-bit dy with {_CHANNELS} channels, fp32 or fp16 x with 3, and kernel size, "
        f"stride, padding in {_STEMS}; got {dy.dtype}, {x.dtype}, a weight of "
        f"{list(weight.shape)}, stride {stride}, padding {padding}"
    )


_impl.declare("stem_step", cuda=_impl.Limits(_cuda_refuses))
# bounds has alpha, eps, lo and hi, each as one number or as 3; or it is empty, and table has them
torch.library.define(
    "clae_fast::stem_step",
    "(Tensor dy, Tensor weight, Tensor x, float[] bounds, Tensor? table) -> Tensor",
)


@torch.library.impl("clae_fast::stem_step", ("cpu", "cuda"))
def _stem_step_impl(
    dy: Tensor,  # [N, C_out, dy_H, dy_W]
    weight: Tensor,  # [C_out, 3, size, size]
    x: Tensor,  # [N, 3, H, W]
    bounds: list[float],  # [4 * 1] or [4 * 3]
    table: Tensor | None,  # [4, 3]
) -> Tensor:
    out = torch.empty_like(x)
    if x.stride() != out.stride():
        x = torch.empty_like(out).copy_(x)
    if out.numel():
        dy = dy.contiguous(memory_format=torch.channels_last)
        _native.stem_step(dy, weight, x, out, _bounds.rounded(bounds) if table is None else table)
    return out


@torch.library.register_fake("clae_fast::stem_step")
def _stem_step_fake(dy: Tensor, weight: Tensor, x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x)


_stem_step = torch.ops.clae_fast.stem_step.default


def stem_step(
    dy: Tensor,  # [N, C_out, dy_H, dy_W]
    weight: Tensor,  # [C_out, C, K, K]
    x: Tensor,  # [N, C, H, W]
    *,
    stride: int,
    padding: int,
    alpha: PerChannel,
    eps: PerChannel | None = None,
    lo: PerChannel | None = None,
    hi: PerChannel | None = None,
    impl: str = "auto",
) -> Tensor:
    r"""`linf_step` along the input gradient of a convolution, which is never stored.

    .. math:: \mathrm{clip}(\mathrm{clip}(x + \alpha\, \mathrm{sign}(W^\top dy), x - \epsilon,
        x + \epsilon), lo, hi)

    W is the convolution by `weight`, with zero padding, no groups and no dilation, and dy is the
    loss's gradient at its output. x is its input, or an image of which the input is an increasing
    function, channel by channel. The weight is rounded to the dtype of `dy`, as autocast does for
    the convolution, and sums are fp32 (fp64 for fp64). The step is that of `linf_step`:
    `|result - x| <= eps` holds exactly wherever `x` lies in [lo, hi], and the sign of NaN is 0.

    The kernel of `impl="cuda"` takes fp16 or bf16 `dy` with 64, 128 or 192 channels and fewer than
    about 2^30 numbers an image, fp32 or fp16 `x` with 3 channels, and a `weight` of 3x3 with stride
    and padding 1 or of 7x7 with stride 2 and padding 3. It is fastest for `dy` in channels_last.
    Where a number of `dy` is not finite, the pixels that it reaches, and those next to them, may
    stay where they are.

    Args:
        dy: Gradient at the convolution's output.
        weight: The convolution's weight.
        x: The images to step from, in any memory layout.
        stride: The convolution's stride.
        padding: The convolution's padding.
        alpha: Step size, in the units of `x`. As each of the following, a number, or C of them for
            the channels of `x`, as a sequence or a tensor.
        eps: Radius of the ball around `x`; None is no ball.
        lo: Lower end of the range; None is none.
        hi: Upper end of the range; None is none.
        impl: "auto", "reference" or "cuda".

    Returns:
        The images after the step, in the dtype and layout of `x`; a constant for autograd.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: Shapes that are not those of a convolution, devices that differ, bounds as
            `linf_step` refuses them, or `impl="cuda"` for what its kernel does not take.
        RuntimeError: `impl` names an implementation that cannot run here.

    Example:
        >>> x, weight = torch.rand(8, 3, 32, 32), torch.randn(64, 3, 3, 3)
        >>> dy = torch.randn(8, 64, 32, 32)
        >>> x_adv = clae_fast.stem_step(dy, weight, x, stride=1, padding=1, alpha=0.03, eps=0.03)
    """
    _check_convolution(dy, weight, x, stride, padding)
    _bounds.check(x, alpha, eps, lo, hi)
    dy, weight, x = dy.detach(), weight.detach(), x.detach()
    convolution = {"weight": weight, "stride": stride, "padding": padding}
    impl = _impl.resolve("stem_step", impl, dy, x, **convolution)
    if impl == "reference":
        return reference(
            dy, weight, x, stride=stride, padding=padding, alpha=alpha, eps=eps, lo=lo, hi=hi
        )
    return _stem_step(dy, weight, x, *_bounds.pack(x, alpha, eps, lo, hi))


def has_kernel(impl: str, device: torch.device) -> bool:
    """Whether a request `impl` is for the kernel, which may still refuse the operands."""
    wanted = _impl.requested(impl) in ("auto", "cuda")
    return wanted and "cuda" in _impl.available("stem_step", device.type)


def _check_convolution(dy: Tensor, weight: Tensor, x: Tensor, stride: int, padding: int) -> None:
    """Raises unless a convolution of `x` by `weight` has an output like `dy`."""
    for name, value in (("x", x), ("dy", dy), ("weight", weight)):
        _check.tensor(name, value)
        _check.same_place(name, value, "x", x, dtype=False)
        if value.ndim != 4:
            raise ValueError(f"{name} must have 4 dimensions, got shape {list(value.shape)}")
    _check.integer("stride", stride, 1)
    _check.integer("padding", padding, 0)
    if weight.shape[1] != x.shape[1]:
        raise ValueError(
            f"weight must have the {x.shape[1]} channels of x, got shape {list(weight.shape)}"
        )
    sides = (
        (side + 2 * padding - size) // stride + 1
        for side, size in zip(x.shape[2:], weight.shape[2:], strict=True)
    )
    expected = [x.shape[0], weight.shape[0], *sides]
    if list(dy.shape) != expected:
        raise ValueError(
            f"dy must have the shape of the convolution's output, {expected}, got {list(dy.shape)}"
        )
