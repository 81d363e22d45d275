import math

import pytest
import torch

import clae_fast
from clae_fast import reference
from clae_fast.ops import _rows
from clae_fast.testing import assert_accurate, projections

pytestmark = pytest.mark.usefixtures("nan_empty")


def by_autograd(z, temperature):
    """The definition: the second view's gradient where both views are `z`."""
    z_b = z.clone().requires_grad_()
    loss = reference.nt_xent(z, z_b, temperature=temperature)
    return torch.autograd.grad(loss, z_b)[0]


def check(z, temperature):
    """In the dtype of `z`: with dot products of bf16, the softmax is rounded to it too."""
    dz = clae_fast.tied_nt_xent(z, temperature=temperature)
    assert_accurate(
        dz.to(z.dtype),
        reference.tied_nt_xent(z, temperature=temperature).to(z.dtype),
        by_autograd(z.double(), temperature),
        temperature=temperature,
        what="dz",
    )


@pytest.mark.parametrize("temperature", [0.5, 0.1, 0.07, 0.05, 0.02, 0.005])
@pytest.mark.parametrize(("N", "D"), [(2, 3), (7, 5), (40, 17)])
def test_against_the_definition(N, D, temperature):
    check(projections(N, D)[0], temperature)


@pytest.mark.parametrize("temperature", [0.5, 0.05])
def test_reference_is_the_definition(temperature):
    z = projections(11, 6, dtype=torch.float64)[0]
    z[0], z[1] = 0, 1e-13
    dz = reference.tied_nt_xent(z, temperature=temperature)
    torch.testing.assert_close(dz, by_autograd(z, temperature), rtol=1e-12, atol=1e-14)


def test_rows_around_the_norm_floor():
    z, _ = projections(9, 6)
    z[0], z[1], z[2] = 0, 1e-13, z[2] * 1e-6
    check(z, 0.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_input_gives_fp32(dtype):
    z = projections(23, 12, dtype=dtype)[0]
    assert clae_fast.tied_nt_xent(z).dtype == torch.float32
    check(z, 0.5)


def test_blocks_of_rows(monkeypatch):
    monkeypatch.setattr(_rows, "_BLOCK_ELEMENTS", 4 * 13 + 1)
    check(projections(13, 6)[0], 0.5)


def test_one_row_has_no_gradient():
    assert not clae_fast.tied_nt_xent(torch.randn(1, 5)).any()


def test_gradient_is_a_constant():
    assert not clae_fast.tied_nt_xent(torch.randn(4, 5, requires_grad=True)).requires_grad


def test_nan_reaches_the_gradient():
    z, _ = projections(5, 6)
    z[2, 0] = math.nan
    assert clae_fast.tied_nt_xent(z).isnan().all()


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"z must have shape \[N, D\]"):
        clae_fast.tied_nt_xent(torch.ones(4))
    with pytest.raises(RuntimeError, match="tied_nt_xent has no implementation 'cuda'"):
        clae_fast.tied_nt_xent(torch.ones(4, 3), impl="cuda")
