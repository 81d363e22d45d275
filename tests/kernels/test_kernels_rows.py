"""The Triton kernels of the losses on rows: interpreted where there is no GPU, so small sizes."""

import math
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from clae_fast import reference
from clae_fast.kernels import (
    _gradient,
    _launch,
    _rows,
    _sums,
    info_nce,
    nt_xent,
    tied_nt_xent,
    uel,
)
from clae_fast.kernels._launch import Tiling, Tilings
from clae_fast.testing import assert_accurate, assert_bitwise_equal, projections, value_and_grads

pytestmark = [
    pytest.mark.usefixtures("nan_empty"),
    # what the interpreter's numpy says of the logarithm of an empty sum
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning"),
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# the least that tensor cores take, so that few rows make many tiles; whole rows, and parts of them
SMALL = Tiling(16, 16, 256, 4, 1)
LOSSES = ["nt_xent", "tied", "info_nce", "queue", "named", "two_way", "uel"]
every_loss = pytest.mark.parametrize("loss", LOSSES)


def operands(loss, N, D, **options):
    """Rows for a loss; the queue has more keys than anchors, and positives by name other ones."""
    x, y = projections(N + 19 if loss in ("queue", "named") else N, D, **options)
    return (x[:N], y[: N + 19 - 18 * (N % 2)]) if loss == "named" else (x[:N], y)


def named(x, y):
    """A positive for each row of x, of which several share one."""
    return torch.arange(len(x)) * 5 % 7 % len(y)


def run(loss, x, y, temperature, *, exact=False, tiles=None, grads=(True, True)):
    """A kernel's loss and gradients on the CPU."""
    x, y = x.to(DEVICE), y.to(DEVICE)
    if tiles is not None:
        tiles = tiles._replace(depth=min(tiles.depth, _launch.padded(x.shape[1])))
    config = tiles and Tilings(tiles, tiles)
    value = None
    if loss == "nt_xent":
        value, dz = nt_xent.nt_xent(x, y, temperature, any(grads), exact, config)
        found = dz.split(len(x)) if any(grads) else [dz]
    elif loss == "tied":
        found = [tied_nt_xent.tied_nt_xent(x, temperature, exact, config)]
    elif loss == "uel":
        value, dz = uel.uel(x, y, temperature, any(grads), exact, tiles)
        found = dz.split(len(x)) if any(grads) else [dz]
    else:
        options = (temperature, loss == "two_way", grads, exact, config)
        positive = named(x, y).to(DEVICE) if loss == "named" else None
        value, *found = info_nce.info_nce(x, y, *options, positive=positive)
    assert value is None or value.dtype == torch.float32
    assert all(grad.dtype == torch.float32 for grad in found)
    return value if value is None else value.cpu(), [grad.cpu() for grad in found]


def expected(loss, x, y, temperature):
    if loss == "tied":
        return None, [reference.tied_nt_xent(x, temperature=temperature)]
    options = {"symmetric": True} if loss == "two_way" else {}
    if loss == "named":
        options = {"positive": named(x, y)}
    function = getattr(reference, loss if loss in ("nt_xent", "uel") else "info_nce")
    return value_and_grads(function, x, y, temperature=temperature, **options)


def check_exact(loss, x, y, temperature, tiles=SMALL):
    value, grads = run(loss, x, y, temperature, exact=True, tiles=tiles)
    eager_value, eager_grads = expected(loss, x, y, temperature)
    exact_value, exact_grads = expected(loss, x.double(), y.double(), temperature)
    if value is not None:
        assert_accurate(value, eager_value, exact_value, temperature=temperature, what="loss")
    for grad, eager, exact in zip(grads, eager_grads, exact_grads, strict=True):
        assert_accurate(grad, eager, exact, temperature=temperature, what="gradient")


@every_loss
@pytest.mark.parametrize(
    ("N", "D", "noise", "temperature"),
    [
        # less than a tile; several, the last one cut, and both widths cut
        (3, 1, None, 0.5),
        (3, 1, 0.1, 0.05),
        (20, 17, None, 0.5),
        (20, 17, 0.1, 0.05),
        # below the temperature from which no shift is needed
        (3, 1, None, 0.02),
        (20, 17, None, 0.02),
        (20, 17, 0.1, 0.005),
    ],
)
def test_exact_mode_against_fp64(loss, N, D, noise, temperature):
    check_exact(loss, *operands(loss, N, D, noise=noise), temperature)


@pytest.mark.parametrize("positive", [None, "named"])
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(("temperature", "noise"), [(0.5, 0.1), (0.05, None), (0.01, None)])
def test_rows_that_count_differently(positive, exact, temperature, noise):
    x, y = projections(37, 12, noise=noise, dtype=torch.float32 if exact else torch.float16)
    x = x[:21]
    weight = torch.randn(21) * torch.randn(21).mul(3).exp()
    positive = named(x, y) if positive else None
    tiles = SMALL._replace(depth=16)
    losses, *grads = info_nce.info_nce(
        x.to(DEVICE),
        y.to(DEVICE),
        temperature,
        False,
        (True, True),
        exact,
        Tilings(tiles, tiles),
        positive=None if positive is None else positive.to(DEVICE),
        weight=weight.to(DEVICE),
        mean=False,
    )

    def rows(a, k):
        options = {"temperature": temperature, "positive": positive, "reduction": "none"}
        return reference.info_nce(a, k, **options)

    def weighted(a, k):
        return (weight * rows(a, k)).sum()

    truth = rows(x.double(), y.double())
    _, eager = value_and_grads(weighted, x.float(), y.float())
    _, exact_grads = value_and_grads(weighted, x.double(), y.double())
    if exact:
        assert_accurate(losses.cpu(), rows(x, y), truth, temperature=temperature, what="losses")
    else:
        torch.testing.assert_close(losses.cpu().double(), truth, rtol=1e-4, atol=1e-6)
    for grad, other, wanted in zip(grads, eager, exact_grads, strict=True):
        if exact:
            assert_accurate(grad.cpu(), other, wanted, temperature=temperature, what="gradient")
        else:
            assert (grad.cpu() - wanted).norm() <= 1e-3 * wanted.norm()


def test_a_column_that_does_not_exist_makes_its_row_nan():
    x, y = (z.to(DEVICE) for z in projections(5, 6))
    positive = torch.tensor([0, 1, 5, -1, 4], device=DEVICE)
    losses, danchor, _ = info_nce.info_nce(
        x, y, 0.1, False, (True, False), positive=positive, mean=False
    )
    assert losses.isnan().tolist() == [False, False, True, True, False]
    assert danchor[2:4].isnan().all()


@every_loss
@pytest.mark.parametrize("temperature", [0.1, 0.01])
def test_rows_in_parts(loss, temperature):
    check_exact(loss, *operands(loss, 9, 130), temperature, Tiling(16, 16, 64, 4, 1))


# with one block of rows, two, three and so on: even and odd numbers of them make other schedules
@pytest.mark.parametrize("loss", ["nt_xent", "tied"])
@pytest.mark.parametrize("blocks", [1, 2, 3, 4, 5])
def test_every_tile_of_the_symmetric_matrix_counts_once(loss, blocks):
    N = 16 * blocks if loss == "tied" else 8 * blocks
    check_exact(loss, *projections(N, 8), 0.3)


@pytest.mark.parametrize("loss", ["nt_xent", "tied", "two_way", "uel"])
@pytest.mark.parametrize("N", [21, 37])
def test_tiles_may_be_narrow(loss, N):
    check_exact(loss, *projections(N, 6), 0.2, SMALL._replace(rows=32))


@pytest.mark.parametrize("loss", ["nt_xent", "queue"])
@pytest.mark.parametrize("exact", [False, True])
def test_blocks_of_rows_shared_among_programs(loss, exact, monkeypatch):
    x, y = operands(loss, 24, 6, dtype=torch.float16)
    results = []
    for programs in (1, 3):
        monkeypatch.setattr(_gradient, "splits_of", lambda *_, splits=programs: splits)
        results.append(run(loss, x, y, 0.2, exact=exact, tiles=SMALL)[1])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("blocks", "columns", "splits"),
    [
        (1, 128, 1),
        (4, 65536, 60),
        (32, 2048, 8),
        (64, 4096, 4),
        (128, 8192, 2),
        (256, 16384, 1),
        # a second wave for a few blocks would take as long as the first
        (266, 17000, 4),
        (313, 20000, 4),
        (16384, 1 << 20, 1),
    ],
)
def test_splits_fill_the_gpu_evenly(blocks, columns, splits, monkeypatch):
    monkeypatch.setattr(_launch, "resident_programs", lambda device: 132)
    tiles = Tiling(64, 64, 128, 4, 3, resident=2)
    assert _launch.splits_of(blocks, columns, tiles, torch.device("cpu")) == splits


@every_loss
@pytest.mark.parametrize(
    ("dtype", "temperature", "noise"),
    [
        (torch.float16, 0.5, None),
        (torch.bfloat16, 0.07, 0.3),
        (torch.float16, 0.05, 0.3),
        (torch.bfloat16, 0.01, None),
    ],
    ids=str,
)
def test_gradient_error_of_half_precision_rows(loss, dtype, temperature, noise):
    x, y = operands(loss, 96, 64, noise=noise, dtype=dtype)
    value, grads = run(loss, x, y, temperature)
    exact_value, exact_grads = expected(loss, x.double(), y.double(), temperature)
    for grad, exact in zip(grads, exact_grads, strict=True):
        assert (grad - exact).norm() <= 5e-4 * exact.norm()
        # the sign of a small row's gradient is a step as long as that of another
        assert ((grad - exact).norm(dim=1) <= 2e-3 * exact.norm(dim=1)).all()
    if value is not None:
        assert value.item() == pytest.approx(exact_value.item(), rel=1e-4)


@every_loss
@pytest.mark.parametrize("noise", [None, 0.3], ids=["independent", "separated"])
def test_gradient_error_of_fp32_rows(loss, noise):
    # they are rounded to 11 bits for the negatives, which the temperature magnifies
    x, y = operands(loss, 96, 64, noise=noise)
    _, grads = run(loss, x, y, 0.1)
    for grad, exact in zip(grads, expected(loss, x.double(), y.double(), 0.1)[1], strict=True):
        assert (grad - exact).norm() <= 1e-3 * exact.norm()


def test_default_mode_keeps_rows_with_small_weights():
    # every weight of the first half is far below fp16's smallest number beside the others'
    x, y = projections(24, 32, noise=0.05, dtype=torch.float16)
    y[12:] = x[12:].roll(1, 0)
    _, grads = run("nt_xent", x, y, 0.05)
    exact = torch.cat(expected("nt_xent", x.double(), y.double(), 0.05)[1])
    error = (torch.cat(grads) - exact).norm(dim=1) / exact.norm(dim=1)
    assert exact.norm(dim=1).max() > 1e5 * exact.norm(dim=1).min()
    assert error.max() < 2e-2


@every_loss
@pytest.mark.parametrize("temperature", [0.5, 0.05])
def test_rows_around_the_norm_floor(loss, temperature):
    x, y = operands(loss, 12, 10)
    x[0], x[1], x[2] = 0, 1e-13, x[2] * 1e-6
    y[2], y[3], y[4] = 0, 1e-13, y[4] * 1e-6
    check_exact(loss, x, y, temperature)


@pytest.mark.parametrize("scale", [2.0**-30, 2.0**60])
def test_rows_of_any_length(scale):
    x, y = projections(12, 10)
    loss, (dx, dy) = run("nt_xent", x, y, 0.2, tiles=SMALL)
    scaled_loss, (scaled_dx, scaled_dy) = run("nt_xent", scale * x, y, 0.2, tiles=SMALL)
    assert_bitwise_equal(scaled_loss, loss)
    assert_bitwise_equal(scaled_dx * scale, dx)
    assert_bitwise_equal(scaled_dy, dy)


@pytest.mark.parametrize("loss", ["nt_xent", "tied", "info_nce", "two_way", "uel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("temperature", [0.5, 0.01])
def test_one_pair_has_no_loss(loss, temperature, dtype):
    value, grads = run(loss, *projections(1, 5, dtype=dtype), temperature, tiles=SMALL)
    assert not value
    assert not any(grad.any() for grad in grads)


@every_loss
@pytest.mark.parametrize("temperature", [0.5, 0.01])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_nan_reaches_loss_and_gradients(loss, dtype, bad, temperature):
    x, y = operands(loss, 5, 6, dtype=dtype)
    (x if loss == "tied" else y)[3, 2] = bad
    value, grads = run(loss, x, y, temperature, exact=dtype == torch.float32, tiles=SMALL)
    assert value is None or value.isnan()
    assert grads[0].isnan().all()
    # a key that no anchor's sum has a part of is the queue's alone
    assert grads[-1].isnan().all()


@pytest.mark.parametrize("loss", ["nt_xent", "info_nce", "queue", "two_way", "uel"])
@pytest.mark.parametrize("temperature", [0.5, 0.01])
def test_what_is_not_wanted_changes_nothing(loss, temperature):
    x, y = operands(loss, 20, 6)
    value, grads = run(loss, x, y, temperature, tiles=SMALL)
    alone, none = run(loss, x, y, temperature, tiles=SMALL, grads=(False, False))
    assert_bitwise_equal(alone, value)
    assert not any(grad.numel() for grad in none)
    if loss in ("info_nce", "queue", "two_way"):
        for i in (0, 1):
            wanted = (i == 0, i == 1)
            value_again, one = run(loss, x, y, temperature, tiles=SMALL, grads=wanted)
            assert_bitwise_equal(value_again, value)
            assert_bitwise_equal(one[i], grads[i])
            assert one[1 - i].numel() == 0


@every_loss
def test_strided_rows(loss):
    x, y = operands(loss, 14, 10)
    dense = run(loss, x, y, 0.5, tiles=SMALL)
    strided = run(loss, x.T.contiguous().T, torch.cat([y, y], 1)[:, :10], 0.5, tiles=SMALL)
    for value, same in zip((strided[0], *strided[1]), (dense[0], *dense[1]), strict=True):
        if same is not None:
            assert_bitwise_equal(value, same)


@pytest.mark.parametrize("D", [16, 100, 200, 600, 1024])
@pytest.mark.parametrize("exact", [False, True])
def test_default_tilings_take_every_width(D, exact):
    x, y = projections(4, D)
    for loss in ("nt_xent", "uel") if D <= 256 else ("nt_xent",):
        _, grads = run(loss, x, y, 0.5, exact=exact)
        _, exact_grads = expected(loss, x.double(), y.double(), 0.5)
        for grad, wanted in zip(grads, exact_grads, strict=True):
            torch.testing.assert_close(grad, wanted.float(), rtol=0, atol=1e-3 * wanted.abs().max())


@every_loss
def test_at_most_three_launches(loss, monkeypatch):
    launched = []

    class Counting:
        def __init__(self, name, kernel):
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid):
            launched.append(self.name)
            return self.kernel[grid]

    for module in (_rows, _sums, _gradient, uel):
        for name, kernel in vars(module).copy().items():
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, Counting(name, kernel))
    x, y = (z.to(DEVICE) for z in operands(loss, 3, 4))
    calls = {
        "nt_xent": [lambda grad=grad: nt_xent.nt_xent(x, y, 0.5, grad) for grad in (True, False)],
        "tied": [lambda: tied_nt_xent.tied_nt_xent(x, 0.5)],
        "uel": [lambda: uel.uel(x, y, 0.5, True), lambda: uel.uel(x, y, 0.5, False)],
    }.get(loss, [lambda: info_nce.info_nce(x, y, 0.5, loss == "two_way", (True, True))])
    for call in calls:
        launched.clear()
        call()
        # interpreted programs cannot wait for one another, which takes a launch more
        if _launch.INTERPRETED and "_add_up_kernel" in launched:
            launched.remove("_add_up_kernel")
        assert len(launched) == 3, launched
