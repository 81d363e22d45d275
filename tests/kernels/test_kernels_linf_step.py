"""The Triton kernel of linf_step: the reference's bits, interpreted where there is no GPU."""

import math
import os
import sys

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from clae_fast import linf_step, reference
from clae_fast.kernels import linf_step as kernels
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
PER_CHANNEL = ((0.01, 0.03, 0.1), (0.02, 0.01, 0.05), (-1.0, -0.5, 0.0), (1.0, 0.5, 2.0))
MIXED = (0.03, [0.02, 0.01, 0.05], -1.0, (1.0, 0.5, 2.0))
TABLE = torch.tensor(PER_CHANNEL)


NAMES = ("alpha", "eps", "lo", "hi")
# the module, whose name in the package is the function's
op = sys.modules["clae_fast.ops.linf_step"]


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
    on_device = [None if tensor is None else tensor.to(DEVICE) for tensor in (x, grad, x0)]
    expected = reference.linf_step(x, grad, x0=x0, **dict(zip(NAMES, bounds, strict=True)))
    if isinstance(bounds, torch.Tensor):
        bounds = bounds.to(DEVICE)
    options = dict(zip(NAMES, bounds, strict=True))
    out = linf_step(*on_device[:2], x0=on_device[2], impl="triton", **options).cpu()
    assert_bitwise_equal(out, expected)
    return out


@pytest.fixture
def launches(monkeypatch):
    """The layouts of the launches so far; a copy of an operand is an error."""
    found = []
    kernel = kernels._linf_step_kernel

    class Recorder:
        def __getitem__(self, grid):
            def launch(*args, **constants):
                found.append(args[-1])
                return kernel[grid](*args, **constants)

            return launch

    monkeypatch.setattr(kernels, "_linf_step_kernel", Recorder())
    monkeypatch.setattr(op, "_laid_out_as", None)
    return found


@pytest.mark.parametrize("bounds", [SCALARS, NO_BALL, NO_RANGE, PER_CHANNEL, MIXED, TABLE], ids=str)
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


def channels_last(tensor):
    return tensor.contiguous(memory_format=torch.channels_last)


def permuted(tensor):
    return tensor.permute(1, 0, 3, 2).contiguous().permute(1, 0, 3, 2)


LAYOUTS = {
    "contiguous": torch.Tensor.contiguous,
    "channels_last": channels_last,
    "permuted": permuted,
    "padded": lambda t: channels_last(torch.cat([t, t], 3))[..., : t.shape[3]],
    "expanded": lambda t: t[:1].expand_as(t),
    "strided": lambda t: torch.stack([t, t], -1)[..., 0],
}


@pytest.mark.parametrize("bounds", [SCALARS, PER_CHANNEL, TABLE], ids=["scalars", "C", "table"])
@pytest.mark.parametrize("other", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_launch_in_every_layout(launches, layout, other, bounds):
    x, grad, x0 = inputs(torch.float16, torch.float32)
    x, grad, x0 = LAYOUTS[layout](x), LAYOUTS[other](grad), LAYOUTS[other](x0)
    out = check(x, grad, x0, bounds)
    assert out.stride() == torch.empty_like(x).stride()
    packed = layout == other and layout in ("contiguous", "channels_last", "permuted")
    assert [found is None for found in launches] == [packed]


def test_offsets_of_64_bits(launches, monkeypatch):
    monkeypatch.setattr(kernels, "_reach", lambda sizes, strides: 2**31)
    x, grad, x0 = inputs(torch.float32, torch.float32)
    check(x, channels_last(grad), x0, PER_CHANNEL)


def test_more_digits_than_a_layout_has():
    x, grad = torch.randn(2, 2, 3, 2, 3, 2, generator=torch.Generator().manual_seed(0))
    check(x, grad.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0), None, SCALARS)


@pytest.mark.parametrize("shape", [(7,), (2, 3), (0, 3, 4, 4), (4, 1, 3, 3), (2, 4, 5), (2, 9, 5)])
def test_shapes(shape):
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.randn(2, *shape, generator=generator)
    check(x, grad, None, SCALARS)
    if len(shape) > 1:
        bounds = torch.rand(4, shape[1], generator=generator) * torch.tensor([[1], [1], [-1], [1]])
        check(x, grad, None, bounds)
        check(x, grad, None, bounds.tolist())
