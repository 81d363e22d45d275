"""The Triton kernels of the bank's step: interpreted where there is no GPU, so small sizes."""

import math
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from bank_step_cases import assert_stepped, both_methods, problem, step
from op_cases import in_fp64

from clae_fast import reference
from clae_fast.kernels import _launch
from clae_fast.kernels import bank_step as module
from clae_fast.kernels._launch import Tiling, Tilings
from clae_fast.testing import assert_bitwise_equal

pytestmark = [
    pytest.mark.usefixtures("nan_empty"),
    # what the interpreter's numpy says of the logarithm of an empty sum
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning"),
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# the least that tensor cores take, so that few rows make many tiles
SMALL = Tiling(16, 16, 256, 4, 1)


def run(bank, velocity, anchor, *, temperature=0.1, exact=False, tiles=SMALL, **options):
    """The bank and the velocity after a step of the kernels, on the CPU."""
    options = {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.01, "views": 1, **options}
    rows = ("keys", "positive", "weight", "losses")
    rows = [None if options.get(n) is None else options[n].to(DEVICE) for n in rows]
    config = None
    if tiles is not None:
        tiles = tiles._replace(depth=min(tiles.depth, _launch.padded(bank.shape[1])))
        config = Tilings(tiles, tiles)
    found = (bank.clone().to(DEVICE), velocity.clone().to(DEVICE))
    module.bank_step(
        *found,
        anchor.to(DEVICE),
        *rows,
        torch.tensor(options["lr"], device=DEVICE),
        options["views"],
        temperature,
        options["momentum"],
        options["weight_decay"],
        exact,
        config,
    )
    return tuple(tensor.cpu() for tensor in found)


def expected(bank, velocity, anchor, **options):
    options = {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.01, **options}
    options = in_fp64(options)
    return step(bank.double(), velocity.double(), anchor.double(), reference.bank_step, **options)


def check_exact(*arguments, tiles=SMALL, **options):
    found = run(*arguments, exact=True, tiles=tiles, **options)
    options = {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.01, "temperature": 0.1, **options}
    assert_stepped(found, *arguments, **options)


@both_methods
@pytest.mark.parametrize("temperature", [0.5, 0.1, 0.02, 0.005])
# less than a tile; several, the last one cut, and both widths cut
@pytest.mark.parametrize(("N", "K", "D"), [(1, 1, 1), (3, 5, 2), (20, 37, 17), (37, 20, 9)])
def test_exact_mode_against_fp64(method, N, K, D, temperature):
    bank, velocity, anchor, options = problem(method, N, K, D)
    check_exact(bank, 0 * velocity, anchor, temperature=temperature, weight_decay=0.0, **options)
    check_exact(bank, velocity, anchor, temperature=temperature, **options)


@both_methods
def test_rows_in_parts(method):
    bank, velocity, anchor, options = problem(method, 9, 30, 130)
    check_exact(bank, velocity, anchor, tiles=Tiling(16, 16, 64, 4, 1), **options)


@both_methods
@pytest.mark.parametrize("splits", [1, 3, 5])
def test_anchors_shared_among_programs(method, splits, monkeypatch):
    monkeypatch.setattr(module, "splits_of", lambda *_: splits)
    bank, velocity, anchor, options = problem(method, 20, 70, 6)
    check_exact(bank, velocity, anchor, temperature=0.02, **options)


@pytest.mark.parametrize("views", [2, 3])
def test_rows_meet_the_keys_of_their_view(views):
    bank, velocity, anchor, options = problem("adco", 42, 20, 7, views=views)
    check_exact(bank, velocity, anchor, **options)


@both_methods
def test_rows_that_count_differently(method):
    bank, velocity, anchor, options = problem(method, 20, 33, 7)
    weight = torch.randn(20) * torch.randn(20).mul(2).exp()
    check_exact(bank, velocity, anchor, weight=weight, **options)


@pytest.mark.parametrize("temperature", [0.5, 0.02])
def test_losses_that_are_known(temperature):
    bank, velocity, anchor, options = problem("caco", 20, 33, 7)
    # a loss of next to nothing
    bank[4], options["positive"][3] = anchor[3], 4
    losses = reference.info_nce(
        anchor, bank, temperature=temperature, positive=options["positive"], reduction="none"
    )
    check_exact(bank, velocity, anchor, temperature=temperature, losses=losses, **options)
    bank, velocity, anchor, options = problem("adco", 20, 33, 7)
    losses = reference.info_nce(
        anchor, torch.cat([options["keys"], bank]), temperature=temperature, reduction="none"
    )
    check_exact(bank, velocity, anchor, temperature=temperature, losses=losses, **options)


def test_several_anchors_share_a_positive():
    bank, velocity, anchor, options = problem("caco", 40, 50, 5)
    options["positive"] = torch.arange(40) % 3 * 20
    check_exact(bank, velocity, anchor, **options)


@both_methods
def test_rows_around_the_norm_floor(method):
    bank, velocity, anchor, options = problem(method, 9, 12, 6)
    anchor[0], anchor[1], anchor[2] = 0, 1e-13, anchor[2] * 1e-6
    bank[3], bank[4], bank[5] = 0, 1e-13, bank[5] * 1e-6
    check_exact(bank, velocity, anchor, **options)


@both_methods
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_error_of_the_gradient(method, dtype):
    # rows in fp32 are rounded to 11 bits, which the temperature magnifies
    bank, velocity, anchor, options = problem(method, 48, 96, 64, dtype=dtype)
    options |= {"temperature": 0.1, "weight_decay": 0.0}
    _, found = run(bank, 0 * velocity, anchor, **options)
    _, exact = expected(bank, 0 * velocity, anchor, **options)
    assert (found - exact).norm() <= 1e-3 * exact.norm()


@both_methods
def test_strided_anchors(method):
    bank, velocity, anchor, options = problem(method, 14, 20, 10)
    dense = run(bank, velocity, anchor, **options)
    for strided in (anchor.T.contiguous().T, torch.cat([anchor, anchor], 1)[:, :10]):
        for found, same in zip(run(bank, velocity, strided, **options), dense, strict=True):
            assert_bitwise_equal(found, same)


@both_methods
@pytest.mark.parametrize("where", ["anchor", "bank"])
def test_nan_reaches_the_bank(method, where):
    bank, velocity, anchor, options = problem(method, 5, 9, 4)
    (anchor if where == "anchor" else bank)[2, 1] = math.nan
    assert all(tensor.isnan().all() for tensor in run(bank, velocity, anchor, **options))


@pytest.mark.parametrize("D", [16, 100, 200, 600])
@pytest.mark.parametrize("exact", [False, True])
def test_default_tilings_take_every_width(D, exact):
    bank, velocity, anchor, options = problem("caco", 4, 6, D)
    options["weight_decay"] = 0.0
    _, found = run(bank, 0 * velocity, anchor, exact=exact, tiles=None, **options)
    _, wanted = expected(bank, 0 * velocity, anchor, **options)
    torch.testing.assert_close(found, wanted.float(), rtol=0, atol=1e-3 * wanted.abs().max())


@both_methods
def test_the_op_runs_them(method):
    bank, velocity, anchor, options = problem(method, 5, 9, 4)
    options = {name: v.to(DEVICE) if torch.is_tensor(v) else v for name, v in options.items()}
    arguments = [tensor.to(DEVICE) for tensor in (bank, velocity, anchor)]
    found = step(*arguments, lr=0.3, exact=True, impl="triton", **options)
    wanted = step(*arguments, lr=0.3, impl="reference", **options)
    torch.testing.assert_close(found, wanted)
