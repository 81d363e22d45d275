import math

import pytest
import torch

import clae_fast
from clae_fast import reference
from clae_fast.ops import _rows
from clae_fast.testing import assert_accurate, assert_bitwise_equal, projections, value_and_grads

pytestmark = pytest.mark.usefixtures("nan_empty")


def check(z0, z1, temperature):
    loss, grads = value_and_grads(clae_fast.uel, z0, z1, temperature=temperature)
    loss_alone = clae_fast.uel(z0, z1, temperature=temperature)
    eager_loss, eager_grads = value_and_grads(reference.uel, z0, z1, temperature=temperature)
    exact_loss, exact_grads = value_and_grads(
        reference.uel, z0.double(), z1.double(), temperature=temperature
    )
    for value in (loss, loss_alone):
        assert_accurate(value, eager_loss, exact_loss, temperature=temperature, what="loss")
    for name, grad, eager, exact in zip(
        ("dz0", "dz1"), grads, eager_grads, exact_grads, strict=True
    ):
        assert_accurate(grad, eager, exact, temperature=temperature, what=name)


@pytest.mark.parametrize("temperature", [0.5, 0.1, 0.07, 0.05, 0.02, 0.005])
@pytest.mark.parametrize("noise", [None, 0.1, 1e-3], ids=["independent", "near", "equal"])
@pytest.mark.parametrize(("N", "D"), [(2, 3), (7, 5), (40, 17)])
def test_against_fp64(N, D, noise, temperature):
    check(*projections(N, D, noise=noise), temperature)


@pytest.mark.parametrize("temperature", [0.1, 0.05, 0.005])
def test_a_negative_nearer_than_the_positive(temperature):
    # 1 - p of that negative is lost in a softmax that does not set it apart
    z0, z1 = projections(6, 8)
    z0[1] = z0[0] + 1e-4 * z0[1]
    check(z0, z1, temperature)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs(dtype):
    check(*projections(23, 12, dtype=dtype), 0.1)


def test_rows_around_the_norm_floor():
    z0, z1 = projections(9, 6)
    z0[0], z0[1], z0[2] = 0, 1e-13, z0[2] * 1e-6
    z1[2], z1[3], z1[4] = 0, 1e-13, z1[4] * 1e-6
    check(z0, z1, 0.1)


def test_blocks_of_rows(monkeypatch):
    monkeypatch.setattr(_rows, "_BLOCK_ELEMENTS", 4 * 26 + 1)
    check(*projections(13, 6), 0.1)


def test_one_pair_has_no_loss():
    loss, grads = value_and_grads(clae_fast.uel, *projections(1, 5))
    assert loss == 0
    assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("which", [0, 1])
def test_only_the_requested_gradient(which):
    z = list(projections(6, 4))
    both = value_and_grads(clae_fast.uel, *z)[1]
    z[which].requires_grad_()
    clae_fast.uel(*z).backward()
    assert_bitwise_equal(z[which].grad, both[which])
    assert z[1 - which].grad is None


def test_nan_reaches_loss_and_gradients():
    z0, z1 = projections(5, 6)
    z1[4, 1] = math.nan
    loss, grads = value_and_grads(clae_fast.uel, z0, z1)
    assert loss.isnan()
    assert all(grad.isnan().all() for grad in grads)


def test_double_backward_raises():
    z0, z1 = (z.requires_grad_() for z in projections(4, 3))
    (dz0,) = torch.autograd.grad(clae_fast.uel(z0, z1), z0, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        dz0.sum().backward()


def test_bad_arguments():
    with pytest.raises(ValueError, match="z1 must have the shape of z0"):
        clae_fast.uel(torch.ones(4, 3), torch.ones(4, 2))
    with pytest.raises(ValueError, match="temperature must be positive"):
        clae_fast.uel(torch.ones(4, 3), torch.ones(4, 3), temperature=-1)
