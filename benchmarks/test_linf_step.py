"""The sign step with ball and range, out of place, grouped by the shape of the view."""

from typing import Any

import pytest
import torch
from torch import Tensor

import clae_fast

SMALL = ((64, 3, 32, 32),)
LARGE = ((256, 3, 32, 32), (256, 3, 224, 224))
EPS = 8 / 255


def torch_eager(x: Tensor, grad: Tensor) -> Tensor:
    return (x + EPS * grad.sign()).clamp(0, 1)


def torch_in_place(x: Tensor, grad: Tensor) -> Tensor:
    return grad.sign().mul_(EPS).add_(x).clamp_(0, 1)


def ours(x: Tensor, grad: Tensor) -> Tensor:
    return clae_fast.linf_step(x, grad, alpha=EPS, eps=EPS, lo=0.0, hi=1.0)


@pytest.mark.parametrize(
    "step", [ours, torch_eager, torch_in_place], ids=lambda step: step.__name__
)
def test_linf_step(benchmark: Any, step: Any, size: tuple[int, ...]) -> None:
    benchmark.group = f"linf_step {'x'.join(map(str, size))}"
    x, grad = torch.rand(size), torch.randn(size)
    # ours also rounds into the ball, by a last bit that the peers let go
    torch.testing.assert_close(step(x, grad), torch_eager(x, grad), atol=1e-6, rtol=0)
    benchmark(step, x, grad)
