"""The Triton kernels of hard_nt_xent: interpreted where there is no GPU, so small sizes."""

import math
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from clae_fast import reference
from clae_fast.kernels import _launch, _rows, hard_nt_xent, nt_xent
from clae_fast.kernels._launch import Tiling
from clae_fast.testing import assert_accurate, assert_bitwise_equal, projections, value_and_grads

pytestmark = [
    pytest.mark.usefixtures("nan_empty"),
    # what the interpreter's numpy says of rows that are none
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# the least that tensor cores take, so that few rows make many tiles
SMALL = Tiling(16, 16, 256, 4, 1)
# DCL, HCL, and harder ones with constant weights
SETTINGS = [(0.0, 0.1, False), (1.0, 0.1, False), (2.5, 0.0, True)]
every_setting = pytest.mark.parametrize("setting", SETTINGS, ids=["dcl", "hcl", "constant"])


def run(z0, z1, temperature, setting, *, grad=True, exact=True, tiles=SMALL):
    """The kernels' loss, and gradients of both views."""
    z0, z1 = z0.to(DEVICE), z1.to(DEVICE)
    if tiles is not None:
        tiles = tiles._replace(depth=min(tiles.depth, _launch.padded(z0.shape[1])))
    loss, dz = hard_nt_xent.hard_nt_xent(z0, z1, temperature, *setting, grad, exact, tiles)
    assert loss.dtype == dz.dtype == torch.float32
    return loss.cpu(), [part.cpu() for part in dz.split(len(z0))] if grad else dz


def expected(z0, z1, temperature, setting):
    options = dict(zip(("beta", "tau_plus", "detach_weights"), setting, strict=True))
    return value_and_grads(reference.hard_nt_xent, z0, z1, temperature=temperature, **options)


def check(z0, z1, temperature, setting, tiles=SMALL):
    loss, grads = run(z0, z1, temperature, setting, tiles=tiles)
    eager = expected(z0, z1, temperature, setting)
    exact = expected(z0.double(), z1.double(), temperature, setting)
    sharpness = temperature / (1 + setting[0])
    assert_accurate(loss, eager[0], exact[0], temperature=sharpness, what="loss")
    for grad, eager_grad, exact_grad in zip(grads, eager[1], exact[1], strict=True):
        assert_accurate(grad, eager_grad, exact_grad, temperature=sharpness, what="gradient")


@every_setting
@pytest.mark.parametrize(
    ("N", "D", "noise", "temperature"),
    [
        # less than a tile; several, the last one cut, and both widths cut
        (3, 2, None, 0.5),
        (20, 17, None, 0.5),
        (20, 17, 0.5, 0.1),
        # below the temperature from which no shift is needed, with weights or always
        (20, 17, None, 0.04),
        (3, 2, None, 0.02),
        (20, 17, 0.5, 0.005),
    ],
)
def test_exact_mode_against_fp64(N, D, noise, temperature, setting):
    check(*projections(N, D, noise=noise), temperature, setting)


@every_setting
@pytest.mark.parametrize("temperature", [0.1, 0.01])
def test_rows_in_parts(temperature, setting):
    check(*projections(9, 130), temperature, setting, Tiling(16, 16, 64, 4, 1))


def test_tiles_may_be_narrow():
    check(*projections(21, 6), 0.2, SETTINGS[1], SMALL._replace(rows=32))


@pytest.mark.parametrize("temperature", [0.5, 0.04, 0.005])
def test_rows_at_the_lower_bound(temperature):
    z0, z1 = projections(9, 4, noise=0.05)
    z1[0] = -z0[0]
    check(z0, z1, temperature, (1.0, 0.3, False))


@pytest.mark.parametrize("ratio", [0.0235, 0.031])
def test_a_row_opposite_to_all_others(ratio):
    z0, z1 = (0.1 * z - 1 for z in projections(4, 3))
    z0[0] += 2
    check(z0, z1, 6 * ratio, (5.0, 0.9, False))


@every_setting
@pytest.mark.parametrize(
    ("dtype", "temperature", "noise"),
    [
        (torch.float16, 0.5, None),
        (torch.bfloat16, 0.2, 0.5),
        (torch.float16, 0.05, None),
        (torch.bfloat16, 0.01, None),
    ],
    ids=str,
)
def test_gradient_error_of_half_precision_rows(dtype, temperature, noise, setting):
    z0, z1 = projections(24, 64, noise=noise, dtype=dtype)
    loss, grads = run(z0, z1, temperature, setting, tiles=None)
    exact_loss, exact_grads = expected(z0.double(), z1.double(), temperature, setting)
    assert loss.item() == pytest.approx(exact_loss.item(), rel=1e-4)
    for grad, exact in zip(grads, exact_grads, strict=True):
        assert (grad - exact).norm() <= 1e-3 * exact.norm()


@pytest.mark.parametrize("temperature", [0.5, 0.02])
def test_rows_around_the_norm_floor(temperature):
    z0, z1 = projections(12, 10)
    z0[0], z0[1], z0[2] = 0, 1e-13, z0[2] * 1e-6
    z1[2], z1[3], z1[4] = 0, 1e-13, z1[4] * 1e-6
    check(z0, z1, temperature, SETTINGS[1])


@pytest.mark.parametrize("temperature", [0.5, 0.01])
@pytest.mark.parametrize("exact", [False, True])
def test_without_either_it_is_nt_xent(temperature, exact):
    z0, z1 = projections(20, 6)
    loss, grads = run(z0, z1, temperature, (0.0, 0.0, False), exact=exact)
    alone, none = run(z0, z1, temperature, (0.0, 0.0, False), exact=exact, grad=False)
    wanted, dz = nt_xent.nt_xent(z0.to(DEVICE), z1.to(DEVICE), temperature, True, exact)
    assert_bitwise_equal(loss, wanted.cpu())
    assert_bitwise_equal(alone, wanted.cpu())
    assert_bitwise_equal(torch.cat(grads), dz.cpu())
    assert none.shape == (0,)


@every_setting
def test_one_pair_has_no_loss(setting):
    loss, grads = run(*projections(1, 5), 0.5, setting)
    assert not loss
    assert not any(grad.any() for grad in grads)


@every_setting
@pytest.mark.parametrize("temperature", [0.5, 0.01])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_reaches_loss_and_gradients(bad, temperature, setting):
    z0, z1 = projections(5, 6)
    z1[3, 2] = bad
    loss, grads = run(z0, z1, temperature, setting)
    assert loss.isnan()
    assert all(grad.isnan().all() for grad in grads)


@every_setting
@pytest.mark.parametrize("temperature", [0.5, 0.01])
def test_the_loss_alone_is_the_same(temperature, setting):
    z = projections(20, 6)
    alone, none = run(*z, temperature, setting, grad=False)
    assert_bitwise_equal(alone, run(*z, temperature, setting)[0])
    assert none.shape == (0,)


def test_strided_rows():
    z0, z1 = projections(14, 10)
    loss, grads = run(z0, z1, 0.5, SETTINGS[1])
    strided = run(z0.T.contiguous().T, torch.cat([z1, z1], 1)[:, :10], 0.5, SETTINGS[1])
    for value, same in zip((strided[0], *strided[1]), (loss, *grads), strict=True):
        assert_bitwise_equal(value, same)


@pytest.mark.parametrize("D", [16, 100, 256])
@pytest.mark.parametrize("exact", [False, True])
def test_default_tilings_take_every_width(D, exact):
    z0, z1 = projections(4, D)
    _, grads = run(z0, z1, 0.5, SETTINGS[1], exact=exact, tiles=None)
    wanted = expected(z0.double(), z1.double(), 0.5, SETTINGS[1])[1]
    for grad, exact_grad in zip(grads, wanted, strict=True):
        size = exact_grad.abs().max()
        torch.testing.assert_close(grad, exact_grad.float(), rtol=0, atol=2e-3 * size)


def test_three_launches(monkeypatch):
    launched = []

    class Counting:
        def __init__(self, name, kernel):
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid):
            launched.append(self.name)
            return self.kernel[grid]

    for module in (_rows, hard_nt_xent):
        for name, kernel in vars(module).copy().items():
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, Counting(name, kernel))
    for grad in (True, False):
        launched.clear()
        run(*projections(3, 4), 0.5, SETTINGS[1], grad=grad)
        assert len(launched) == 3, launched
