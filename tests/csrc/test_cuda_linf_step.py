"""The CUDA C++ kernel of linf_step: the reference's bits, emulated where there is no GPU."""

import pytest
import torch
from linf_cases import DTYPES, LAYOUTS, bounds, images

import clae_fast
from clae_fast import reference
from clae_fast.testing import assert_bitwise_equal

pytestmark = pytest.mark.usefixtures("nan_empty")


def check(device, x, grad, **options):
    on_device = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in options.items()
    }
    actual = clae_fast.linf_step(x.to(device), grad.to(device), impl="cuda", **on_device)
    assert_bitwise_equal(actual.cpu(), reference.linf_step(x, grad, **options))


@pytest.mark.parametrize("kind", ["step", "ball", "range", "sequences", "tensors"])
@pytest.mark.parametrize("grad_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bitwise_equal_to_the_reference(cuda_device, dtype, grad_dtype, kind):
    # one whole block and a part of another
    x = images((3, 5, 19, 23), dtype, special=True)
    x0 = (x.float() + 0.02 * images(x.shape, seed=1)).to(dtype)
    grad = images(x.shape, grad_dtype, special=True, seed=2)
    for center in (None, x0):
        check(cuda_device, x, grad, x0=center, **bounds(kind, 5))


@pytest.mark.parametrize("kind", ["range", "sequences"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("other_layout", ["contiguous", "channels_last"])
def test_layouts(cuda_device, layout, other_layout, kind):
    x = LAYOUTS[layout](images((2, 3, 4, 5)))
    grad = LAYOUTS[other_layout](images(x.shape, seed=1))
    x0 = LAYOUTS[other_layout](x + 0.02)
    check(cuda_device, x, grad, x0=x0, **bounds(kind, 3))
