"""The CUDA C++ kernel of NT-Xent, emulated where there is no GPU, so small sizes."""

import math

import pytest
import torch

import clae_fast
from clae_fast import reference
from clae_fast.testing import assert_bitwise_equal, projections, value_and_grads

pytestmark = pytest.mark.usefixtures("nan_empty")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


op = torch.ops.clae_fast.nt_xent.default


@pytest.fixture
def run(cuda_device):
    def run(z0, z1, temperature):
        """Loss and dz on the CPU, after the loss alone was seen to be the same."""
        z0, z1 = z0.to(cuda_device), z1.to(cuda_device)
        loss, dz = op(z0, z1, temperature, True, False, "cuda")
        assert loss.dtype == dz.dtype == torch.float32
        loss_alone, nothing = op(z0, z1, temperature, False, False, "cuda")
        assert_bitwise_equal(loss_alone, loss)
        assert nothing.numel() == 0
        return loss.cpu(), dz.cpu()

    return run


def exact(z0, z1, temperature):
    loss, grads = value_and_grads(
        reference.nt_xent, z0.double(), z1.double(), temperature=temperature
    )
    return loss, torch.cat(grads)


def error_budget(dtype, temperature):
    # fp32 rows lose bits in fp16, which show where rows are short and temperatures low
    return 5e-4 * (max(1.0, 0.1 / temperature) if dtype == torch.float32 else 1.0)


def check(run, z0, z1, temperature):
    loss, dz = run(z0, z1, temperature)
    exact_loss, exact_dz = exact(z0, z1, temperature)
    budget = error_budget(z0.dtype, temperature)
    tiny = torch.finfo(torch.float32).tiny
    assert (dz - exact_dz).norm() <= budget * exact_dz.norm() + tiny
    assert abs(loss - exact_loss) <= budget * exact_loss + tiny


# 0.02 and 0.005 are below the temperature from which the shift is fixed
@pytest.mark.parametrize("temperature", [0.5, 0.05, 0.02, 0.005])
@pytest.mark.parametrize("noise", [None, 0.3], ids=["independent", "separated"])
# the smallest; parts of 16 rows; one row tile and parts of others; every width, full and cut
@pytest.mark.parametrize(("N", "D"), [(2, 2), (17, 17), (33, 64), (65, 100), (9, 130), (33, 256)])
def test_against_fp64(run, N, D, noise, temperature):
    for dtype in DTYPES:
        check(run, *projections(N, D, noise=noise, dtype=dtype), temperature)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.5, 0.1, 0.07, 0.05])
@pytest.mark.parametrize("noise", [None, 0.3], ids=["independent", "separated"])
def test_gradient_error_of_usual_rows(run, noise, temperature, dtype):
    z0, z1 = projections(128, 128, noise=noise, dtype=dtype)
    _, dz = run(z0, z1, temperature)
    _, exact_dz = exact(z0, z1, temperature)
    assert (dz - exact_dz).norm() <= 5e-4 * exact_dz.norm()


# a multiprocessor for every unit, whose columns stay in shared memory; several units for each; and
# too little memory for the columns, at every width
@pytest.mark.parametrize(("multiprocessors", "memory"), [(16, 232448), (2, 232448), (8, 101376)])
@pytest.mark.parametrize(("D", "temperature"), [(64, 0.1), (65, 0.01), (130, 0.1)])
def test_every_plan(run, monkeypatch, D, temperature, multiprocessors, memory):
    monkeypatch.setenv("CUDA_EMULATOR_MULTIPROCESSORS", str(multiprocessors))
    monkeypatch.setenv("CUDA_EMULATOR_SHARED_MEMORY", str(memory))
    z0, z1 = projections(133, D, noise=0.5, dtype=torch.float16)
    check(run, z0, z1, temperature)
    first = run(z0, z1, temperature)
    monkeypatch.setenv("CUDA_EMULATOR_ORDER", "down")
    for value, again in zip(first, run(z0, z1, temperature), strict=True):
        assert_bitwise_equal(again, value)


def test_rows_with_small_weights_keep_their_precision(run):
    # every weight of the first half is far below fp16's smallest number beside the others'
    z0, z1 = projections(24, 32, noise=0.05, dtype=torch.float16)
    z1[12:] = z0[12:].roll(1, 0)
    _, dz = run(z0, z1, 0.05)
    _, exact_dz = exact(z0, z1, 0.05)
    error = (dz - exact_dz).norm(dim=1) / exact_dz.norm(dim=1)
    assert exact_dz.norm(dim=1).max() > 1e5 * exact_dz.norm(dim=1).min()
    assert error.max() < 2e-3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.5, 0.01])
def test_rows_around_the_norm_floor(run, temperature, dtype):
    z0, z1 = projections(12, 10, dtype=dtype)
    z0[0], z0[1], z0[2] = 0, 1e-13, z0[2] * 1e-6
    z1[2], z1[3], z1[4] = 0, 1e-13, z1[4] * 1e-6
    loss, dz = run(z0, z1, temperature)
    exact_loss, exact_dz = exact(z0, z1, temperature)
    assert loss.item() == pytest.approx(exact_loss.item(), rel=5e-4)
    # gradients of short rows are larger by many orders of magnitude
    budget = error_budget(dtype, temperature)
    assert ((dz - exact_dz).norm(dim=1) <= budget * exact_dz.norm(dim=1)).all()


@pytest.mark.parametrize("temperature", [0.5, 0.01])
def test_rows_of_one_element_have_no_gradient(run, temperature):
    z0, z1 = projections(20, 1)
    loss, dz = run(z0, z1, temperature)
    exact_loss, _ = exact(z0, z1, temperature)
    assert loss.item() == pytest.approx(exact_loss.item(), rel=1e-5)
    assert (dz * torch.cat([z0, z1])).abs().max() <= 1e-6 / temperature


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.5, 0.01])
def test_one_pair_has_no_loss(run, temperature, dtype):
    loss, dz = run(*projections(1, 5, dtype=dtype), temperature)
    assert loss == 0
    assert not dz.any()


def test_all_rows_equal(run):
    z = torch.ones(70, 4)
    loss, dz = run(z, z, 0.5)
    assert loss.item() == pytest.approx(math.log(2 * 70 - 1), rel=1e-6)
    assert dz.abs().max() < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.5, 0.01])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_reaches_loss_and_gradient(run, bad, temperature, dtype):
    z0, z1 = projections(70, 6, dtype=dtype)
    z1[3, 2] = bad
    loss, dz = run(z0, z1, temperature)
    assert loss.isnan()
    assert dz.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_through_the_op(run, cuda_device, dtype):
    z0, z1 = projections(7, 5, dtype=dtype)
    loss, dz = run(z0, z1, 0.1)
    options = {"temperature": 0.1, "impl": "cuda"}
    z = z0.to(cuda_device), z1.to(cuda_device)
    value, grads = value_and_grads(clae_fast.nt_xent, *z, scale=2.0, **options)
    assert_bitwise_equal(value.cpu(), loss)
    assert_bitwise_equal(torch.cat(grads).cpu(), (2 * dz).to(dtype))
    assert_bitwise_equal(clae_fast.nt_xent(*z, **options).cpu(), loss)


def test_sizes_that_it_does_not_take(cuda_device):
    for shape in ((2049, 8), (1025, 129), (2, 257)):
        z = torch.ones(shape, device=cuda_device)
        with pytest.raises(ValueError, match="takes few and narrow rows"):
            clae_fast.nt_xent(z, z, impl="cuda")


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_of_different_strides(run, dtype):
    z0, z1 = projections(14, 10, dtype=dtype)
    dense = run(z0, z1, 0.5)
    strided = run(z0.T.contiguous().T, torch.cat([z1, z1], 1)[:, :10], 0.5)
    for value, same in zip(strided, dense, strict=True):
        assert_bitwise_equal(value, same)
