"""Operands and checks that tests of stem_step share."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.grad import conv2d_input

from clae_fast import reference
from clae_fast.testing import assert_bitwise_equal

# kernel size to stride and padding
STEMS = {3: {"stride": 1, "padding": 1}, 7: {"stride": 2, "padding": 3}}
RANGE = {"alpha": 8 / 255, "eps": 8 / 255, "lo": 0.0, "hi": 1.0}


def operands(
    size: int,
    shape: tuple[int, int, int],  # N, H, W
    C: int = 64,
    *,
    dtype: torch.dtype = torch.float16,
    x_dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """dy, weight and x, in channels_last; some of x near the ends of its range."""
    N, H, W = shape
    stride = STEMS[size]["stride"]
    generator = torch.Generator().manual_seed(seed)
    dy = torch.randn(N, C, (H - 1) // stride + 1, (W - 1) // stride + 1, generator=generator)
    weight = torch.randn(C, 3, size, size, generator=generator)
    x = torch.rand(N, 3, H, W, generator=generator)
    layout = torch.channels_last
    return (
        dy.to(dtype, memory_format=layout),
        weight.contiguous(memory_format=layout),
        x.to(x_dtype, memory_format=layout),
    )


def assert_stepped(
    x_adv: Tensor,
    dy: Tensor,
    weight: Tensor,
    x: Tensor,
    *,
    stride: int,
    padding: int,
    **bounds: object,
) -> None:
    """Raises unless x_adv is the step along the gradient in fp64 of the same rounded numbers."""
    stem = (stride, padding)
    exact_dy, exact_weight = dy.double(), weight.to(dy.dtype).double()
    dx = conv2d_input(list(x.shape), exact_weight, exact_dy, *stem)
    # of a sum in fp32, in any order
    terms = dy.shape[1] * weight.shape[2:].numel()
    error = conv2d_input(list(x.shape), exact_weight.abs(), exact_dy.abs(), *stem)
    sure = dx.abs() > error * terms * torch.finfo(torch.float32).eps
    expected = reference.linf_step(x, dx, **bounds)
    assert x_adv.stride() == torch.empty_like(x).stride()
    assert_bitwise_equal(x_adv[sure], expected[sure])
    # the gradient rounded to 16 bits
    rounded = conv2d_input(list(x.shape), weight.to(dy.dtype), dy, *stem)
    for other in (expected, reference.linf_step(x, rounded, **bounds)):
        assert dx.abs()[x_adv == other].sum() >= 0.999 * dx.abs().sum()
    eps = torch.as_tensor(bounds["eps"], dtype=torch.float64).reshape(-1, 1, 1)
    assert ((x_adv.double() - x.double()).abs() <= eps).all()
