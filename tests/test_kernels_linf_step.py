"""The Triton kernel of linf_step: the reference's bits, interpreted where there is no GPU."""

import math
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from clae_fast import reference
from clae_fast.kernels.linf_step import linf_step
from clae_fast.testing import assert_bitwise_equal

pytestmark = pytest.mark.usefixtures("nan_empty")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# two blocks and a part of one, which begin in the middle of a channel
SHAPE = (5, 3, 11, 13)
EPS = torch.tensor(8 / 255).nextafter(torch.tensor(0.0)).item()
SCALARS = (0.03, EPS, -0.5, 0.7)
NO_BALL = (0.03, math.inf, -0.5, 0.7)
NO_RANGE = (0.03, EPS, -math.inf, math.inf)
PER_CHANNEL = torch.tensor(
    [[0.01, 0.03, 0.1], [0.02, 0.01, 0.05], [-1.0, -0.5, 0.0], [1.0, 0.5, 2.0]]
)


def inputs(dtype, grad_dtype, shape=SHAPE):
    """Images, a gradient and a center, with every special value somewhere."""
    generator = torch.Generator().manual_seed(0)
    x, grad, noise = torch.randn(3, *shape, generator=generator)
    x, grad = x.to(dtype), grad.to(grad_dtype)
    x0 = (x.float() + 0.02 * noise).to(dtype)
    special = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-7, -1e-7])
    x.flatten()[:7], grad.flatten()[7:14], x0.flatten()[14:21] = special, special, special
    return x, grad, x0


def check(x, grad, x0, bounds):
    on_device = (None if tensor is None else tensor.to(DEVICE) for tensor in (x, grad, x0))
    if isinstance(bounds, torch.Tensor):
        bounds = bounds.to(DEVICE)
    out = linf_step(*on_device, *bounds).cpu()
    alpha, eps, lo, hi = (
        bound.cpu() if isinstance(bound, torch.Tensor) else bound for bound in bounds
    )
    assert_bitwise_equal(
        out, reference.linf_step(x, grad, alpha=alpha, x0=x0, eps=eps, lo=lo, hi=hi)
    )
    return out


@pytest.mark.parametrize("bounds", [SCALARS, NO_BALL, NO_RANGE, PER_CHANNEL], ids=str)
@pytest.mark.parametrize("from_x", [True, False], ids=["from-x", "from-x0"])
@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_the_reference(dtype, grad_dtype, from_x, bounds):
    x, grad, x0 = inputs(dtype, grad_dtype)
    check(x, grad, None if from_x else x0, bounds)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_ball_holds_in_the_output_dtype(dtype):
    generator = torch.Generator().manual_seed(0)
    x, grad, noise = torch.randn(3, *SHAPE, generator=generator)
    x, x0 = (x + 0.1 * noise).to(dtype), x.to(dtype)
    out = check(x, grad, x0, NO_RANGE)
    distance = (out.double() - x0.double()).abs()
    assert distance.max() <= EPS
    assert (distance > 0.9 * EPS).float().mean() > 0.3


@pytest.mark.parametrize(
    "layout",
    [
        lambda t: t.contiguous(memory_format=torch.channels_last),
        lambda t: t.permute(1, 0, 3, 2).contiguous().permute(1, 0, 3, 2),
        lambda t: torch.cat([t, t], 3)[..., : t.shape[3]],
        lambda t: t[:, :, ::2],
    ],
    ids=["channels_last", "permuted", "padded", "strided"],
)
def test_layouts(layout):
    x, grad, x0 = map(layout, inputs(torch.float16, torch.float32))
    out = check(x, grad, x0, PER_CHANNEL)
    assert out.stride() == torch.empty_like(x).stride()


def test_operands_in_other_layouts_than_x():
    x, grad, x0 = inputs(torch.float32, torch.float32)
    check(x, grad.contiguous(memory_format=torch.channels_last), x0[:1].expand_as(x0), PER_CHANNEL)


@pytest.mark.parametrize("shape", [(7,), (2, 3), (0, 3, 4, 4), (4, 1, 3, 3)], ids=str)
def test_shapes(shape):
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.randn(2, *shape, generator=generator)
    check(x, grad, None, SCALARS)
    if len(shape) > 1:
        check(x, grad, None, PER_CHANNEL[:, : shape[1]])
