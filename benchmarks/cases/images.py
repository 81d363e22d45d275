"""The sign step, and the gradient of the first convolution's input with the sign step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import clae_fast
from benchmarks.case import Case, Operands, Peer

EPS = 8 / 255


def linf_step(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    eps: float | tuple[float, ...] = EPS,
    layouts: tuple[torch.memory_format, ...] = (torch.contiguous_format, torch.contiguous_format),
) -> Case:
    """The sign step with ball and range, out of place.

    Args:
        shape: Of the images, [N, 3, H, W].
        dtype: Of images and gradient.
        eps: The radius, which is also the step size: one number, or one for each channel.
        layouts: The memory formats of the images and of the gradient.
    """

    def inputs(_: torch.dtype, device: torch.device, seed: int) -> Operands:
        generator = torch.Generator(device).manual_seed(seed)
        x = torch.rand(shape, generator=generator, device=device)
        grad = torch.randn(shape, generator=generator, device=device)
        x, grad = (t.to(dtype, memory_format=f) for t, f in zip((x, grad), layouts, strict=True))
        return x, grad

    def radius(device: torch.device) -> float | Tensor:
        if isinstance(eps, float):
            return eps
        return torch.tensor(eps, device=device, dtype=dtype).view(3, 1, 1)

    def peer(step: Callable[[float | Tensor, Tensor, Tensor], Tensor]) -> Peer:
        return Peer(lambda device: {"": partial(step, radius(device))}, captured=True)

    return Case(
        inputs,
        # ours also rounds into the ball, by a last bit that the formula lets go
        partial(clae_fast.linf_step, alpha=eps, eps=eps, lo=0.0, hi=1.0),
        lambda x, grad: _sign_step(radius(x.device), x, grad),
        {"eager": peer(_sign_step), "in place": peer(_sign_step_in_place)},
    )


def stem(
    N: int,
    side: int,
    kernel: int,
    stride: int,
    padding: int,
    dtype: torch.dtype = torch.float16,
    layout: torch.memory_format = torch.channels_last,
) -> Case:
    """The input gradient of a first convolution with 64 channels, and the sign step.

    The operands are the gradient of the convolution's output and its weight in `dtype`, and the
    images in fp16, as views are never bf16. The peer is cuDNN's input gradient, in this layout,
    with torch's sign step.
    """
    out_side = (side + 2 * padding - kernel) // stride + 1
    options = {"stride": stride, "padding": padding, "alpha": EPS, "eps": EPS}

    def inputs(_: torch.dtype, device: torch.device, seed: int) -> Operands:
        generator = torch.Generator(device).manual_seed(seed)
        normal = partial(torch.randn, generator=generator, device=device)
        dy, weight = normal(N, 64, out_side, out_side), normal(64, 3, kernel, kernel) / kernel
        dy, weight = (t.to(dtype, memory_format=layout) for t in (dy, weight))
        return dy, weight, normal(N, 3, side, side).sigmoid().half().to(memory_format=layout)

    def unfused(dy: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        g = input_gradient(dy, weight, x, stride, padding)
        return _sign_step(EPS, x, g.to(x.dtype))

    return Case(
        inputs,
        partial(clae_fast.stem_step, lo=0.0, hi=1.0, **options),
        unfused,
        {"cuDNN": Peer(lambda device: {"": unfused}, captured=True)},
    )


def input_gradient(dy: Tensor, weight: Tensor, x: Tensor, stride: int, padding: int) -> Tensor:
    """The gradient of a convolution's input, of which only the shape matters."""
    geometry = ([stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1)
    # a view in another type of as many bytes costs nothing
    same = x if x.dtype == dy.dtype else x.view(dy.dtype)
    return torch.ops.aten.convolution_backward(
        dy, same, weight, None, *geometry, [True, False, False]
    )[0]


def _sign_step(radius: float | Tensor, x: Tensor, grad: Tensor) -> Tensor:
    return (x + radius * grad.sign()).clamp(0, 1)


def _sign_step_in_place(radius: float | Tensor, x: Tensor, grad: Tensor) -> Tensor:
    return grad.sign().mul_(radius).add_(x).clamp_(0, 1)
