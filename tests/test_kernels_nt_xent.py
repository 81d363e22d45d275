"""The Triton kernels of NT-Xent: interpreted where there is no GPU, so small and few sizes."""

import math
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from clae_fast import reference
from clae_fast.kernels import nt_xent as kernels
from clae_fast.testing import assert_accurate, assert_bitwise_equal, projections, value_and_grads

pytestmark = pytest.mark.usefixtures("nan_empty")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def run(z0, z1, temperature):
    """Loss and dz on the CPU, after the loss alone was seen to be the same."""
    z0, z1 = z0.to(DEVICE), z1.to(DEVICE)
    loss, dz = kernels.nt_xent_fwd_bwd(z0, z1, temperature)
    assert loss.dtype == dz.dtype == torch.float32
    assert_bitwise_equal(kernels.nt_xent_fwd(z0, z1, temperature), loss)
    return loss.cpu(), dz.cpu()


def expected(z0, z1, temperature):
    loss, grads = value_and_grads(reference.nt_xent, z0, z1, temperature=temperature)
    return loss, torch.cat(grads)


def check_fp32(z0, z1, temperature):
    loss, dz = run(z0, z1, temperature)
    eager_loss, eager_dz = expected(z0, z1, temperature)
    exact_loss, exact_dz = expected(z0.double(), z1.double(), temperature)
    assert_accurate(loss, eager_loss, exact_loss, temperature=temperature, what="loss")
    assert_accurate(dz, eager_dz, exact_dz, temperature=temperature, what="dz")


# 0.02 and 0.005 are below the temperature from which the shift is fixed
@pytest.mark.parametrize("temperature", [0.5, 0.05, 0.02, 0.005])
@pytest.mark.parametrize("noise", [None, 0.1], ids=["independent", "near"])
# less than a tile; more than one, with rows, columns and both widths of D cut; D over two depths
@pytest.mark.parametrize(("N", "D"), [(3, 1), (66, 17), (9, 130)])
def test_fp32_against_fp64(N, D, noise, temperature):
    check_fp32(*projections(N, D, noise=noise), temperature)


@pytest.mark.parametrize(
    ("dtype", "temperature"),
    [
        (torch.float16, 0.5),
        (torch.bfloat16, 0.1),
        (torch.bfloat16, 0.07),
        (torch.float16, 0.05),
    ],
    ids=str,
)
@pytest.mark.parametrize("noise", [None, 0.3], ids=["independent", "separated"])
def test_half_precision_gradient_error(noise, temperature, dtype):
    z0, z1 = projections(128, 128, noise=noise, dtype=dtype)
    loss, dz = run(z0, z1, temperature)
    exact_loss, exact_dz = expected(z0.double(), z1.double(), temperature)
    assert (dz - exact_dz).norm() <= 5e-4 * exact_dz.norm()
    assert loss.item() == pytest.approx(exact_loss.item(), rel=5e-4)


def test_half_precision_keeps_rows_with_small_weights():
    # every weight of the first half is far below fp16's smallest number beside the others'
    z0, z1 = projections(24, 32, noise=0.05, dtype=torch.float16)
    z1[12:] = z0[12:].roll(1, 0)
    _, dz = run(z0, z1, 0.05)
    _, exact = expected(z0.double(), z1.double(), 0.05)
    error = (dz - exact).norm(dim=1) / exact.norm(dim=1)
    assert exact.norm(dim=1).max() > 1e5 * exact.norm(dim=1).min()
    assert error.max() < 2e-2


@pytest.mark.parametrize("temperature", [0.5, 0.01])
def test_rows_around_the_norm_floor(temperature):
    z0, z1 = projections(12, 10)
    z0[0], z0[1], z0[2] = 0, 1e-13, z0[2] * 1e-6
    z1[2], z1[3], z1[4] = 0, 1e-13, z1[4] * 1e-6
    check_fp32(z0, z1, temperature)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("temperature", [0.5, 0.01])
def test_one_pair_has_no_loss(temperature, dtype):
    loss, dz = run(*projections(1, 5, dtype=dtype), temperature)
    assert loss == 0
    assert not dz.any()


def test_all_rows_equal():
    z = torch.ones(9, 4)
    loss, dz = run(z, z, 0.5)
    assert loss.item() == pytest.approx(math.log(2 * 9 - 1), rel=1e-6)
    assert dz.abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("temperature", [0.5, 0.01])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_reaches_loss_and_gradient(bad, temperature, dtype):
    z0, z1 = projections(5, 6, dtype=dtype)
    z1[3, 2] = bad
    loss, dz = run(z0, z1, temperature)
    assert loss.isnan()
    assert dz.isnan().all()


def test_views_of_different_strides():
    z0, z1 = projections(14, 10)
    dense = run(z0, z1, 0.5)
    strided = run(z0.T.contiguous().T, torch.cat([z1, z1], 1)[:, :10], 0.5)
    for value, same in zip(strided, dense, strict=True):
        assert_bitwise_equal(value, same)


def test_three_launches(monkeypatch):
    launched = []

    class Counting:
        def __init__(self, name, kernel):
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid):
            launched.append(self.name)
            return self.kernel[grid]

    for name, kernel in vars(kernels).copy().items():
        if name.endswith("_kernel"):
            monkeypatch.setattr(kernels, name, Counting(name, kernel))
    z = projections(3, 4)[0].to(DEVICE)
    kernels.nt_xent_fwd(z, z, 0.5)
    assert len(launched) == 3
    kernels.nt_xent_fwd_bwd(z, z, 0.5)
    assert len(launched) == 6
