from functools import partial

import pytest
import torch
from bank_step_cases import assert_stepped, both_methods, problem, step
from op_cases import BadInputs, Case, Grid, Recorder
from torch.nn import functional as F

import clae_fast
from clae_fast import reference
from clae_fast.testing import (
    assert_bitwise_equal,
    implementations,
    running,
)

pytestmark = pytest.mark.usefixtures("nan_empty")

# the interpreter's turn is in tests/kernels
IMPLEMENTATIONS = [name for name in implementations("bank_step") if name != "triton"]
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def bank(method, moving, N, K, D, *, noise=0.5, dtype=torch.float32, seed=0):
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        noise = 0.5 if noise is None else noise
        W, V, anchor, options = problem(method, N, K, D, noise=noise, dtype=dtype)
    options.pop("views")
    return {"bank": W, "velocity": V if moving else 0 * V, "anchor": anchor, **options}


def as_bank_step(tensors, results, options):
    tensors, options = dict(tensors), {**options}
    operands = (tensors.pop(name) for name in ("bank", "velocity", "anchor"))
    options.setdefault("temperature", 0.1)
    assert_stepped(results, *operands, **tensors, **options)


def _bank_step(method, moving, **fields):
    grid = Grid(((1, 1, 2), (2, 3, 3), (7, 97, 5), (33, 130, 17)), (0.5, 0.1, 0.02, 0.005), (0.5,))
    return Case(
        "bank_step",
        partial(bank, method, moving),
        size=lambda N, D: (N, 2 * N, D),
        grids=(grid,),
        large=(210, 1000, 9),
        options={"lr": 0.3, "momentum": 0.9, "weight_decay": 0.01 if moving else 0.0},
        rows=("anchor", "keys") if method == "adco" else ("anchor",),
        in_place=("bank", "velocity"),
        coupled_from=1,
        judge=as_bank_step,
        **fields,
    )


CASES = {
    "bank_step-adco": _bank_step("adco", True),
    "bank_step-caco": _bank_step("caco", True),
    "bank_step-adco-first": _bank_step("adco", False, compiled=False),
    "bank_step-caco-first": _bank_step("caco", False, compiled=False),
}
INDEX = torch.zeros(4, dtype=torch.int64)
BAD_INPUTS = BadInputs(
    {
        "bank": torch.ones(6, 3),
        "velocity": torch.ones(6, 3),
        "anchor": torch.ones(4, 3),
        "positive": INDEX,
        "lr": 0.1,
    },
    own=[
        ({"bank": torch.ones(6)}, ValueError, r"bank must have shape .* got \[6\]"),
        ({"bank": torch.ones(6, 3).half()}, TypeError, "bank must be of dtype fp32 or fp64"),
        ({"bank": torch.ones(3, 6).T}, ValueError, "bank must be contiguous, got strides"),
        ({"velocity": torch.ones(5, 3)}, ValueError, "velocity must have the shape of bank"),
        ({"velocity": torch.ones(3, 6).T}, ValueError, "velocity must be contiguous"),
        ({"anchor": torch.ones(4, 2)}, ValueError, r"anchor must have shape \[N, 3\] as bank has"),
        ({"positive": None}, ValueError, "one of keys and positive must be given, not both"),
        ({"keys": torch.ones(4, 3)}, ValueError, "one of keys and positive must be given"),
        (
            {"positive": None, "keys": torch.ones(5, 3)},
            ValueError,
            "keys must have the shape of anchor",
        ),
        ({"positive": INDEX + 6}, ValueError, "positive must hold columns from 0 to 5, got 6"),
        ({"weight": torch.ones(3)}, ValueError, r"weight must have shape \[4\], got \[3\]"),
        ({"losses": INDEX}, TypeError, "losses must be of dtype"),
        ({"views": 3}, ValueError, "views must divide 4 anchors, got 3"),
        ({"views": 1.0}, TypeError, "views must be an int, got float"),
        ({"momentum": 1.0}, ValueError, r"momentum must be in \[0, 1\), got 1.0"),
        ({"weight_decay": -1}, ValueError, r"weight_decay must be in \[0, inf\), got -1"),
        ({"lr": torch.ones(1)}, ValueError, r"lr must have shape \[\], got \[1\]"),
    ],
    any_dtype=("anchor",),
)


def check(implementation, bank, velocity, anchor, temperature=0.1, **options):
    options = {"lr": 0.3, "momentum": 0.9, "temperature": temperature, **options}
    with running(implementation) as impl:
        found = step(bank, velocity, anchor, impl=impl, **options)
    assert_stepped(found, bank, velocity, anchor, **options)


def gradient(*arguments, function=reference.bank_step, **options):
    """G alone."""
    bank, *others = arguments
    options = {"lr": 0.0, "momentum": 0.0, **options}
    return step(bank, torch.zeros_like(bank), *others, function, **options)[1]


@pytest.mark.parametrize("temperature", [0.5, 0.08, 0.02])
def test_cacos_gradient_is_that_of_the_cross_entropy_with_flipped_signs(temperature):
    bank, _, anchor, options = problem("caco", 9, 23, 5, dtype=torch.float64)
    bank, y = bank.double().requires_grad_(), options["positive"]
    s = F.normalize(anchor) @ F.normalize(bank).T
    logits = (s / temperature).detach().requires_grad_()
    (ds,) = torch.autograd.grad(F.cross_entropy(logits, y), logits)
    flipped = torch.where(F.one_hot(y, 23).bool(), ds, -ds) / temperature
    (expected,) = torch.autograd.grad(s, bank, flipped)
    found = gradient(bank.detach(), anchor, temperature=temperature, **options)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12 * expected.abs().max())


def test_cacos_gradient_by_loops():
    bank, _, anchor, options = problem("caco", 4, 6, 3, dtype=torch.float64)
    bank, T = bank.double(), 0.2
    u, w = F.normalize(anchor), F.normalize(bank)
    p = (u @ w.T / T).softmax(1)
    found = gradient(bank, anchor, temperature=T, **options)
    for k in range(6):
        r = torch.zeros(3, dtype=torch.float64)
        for i in range(4):
            weight = 1 - p[i, k] if options["positive"][i] == k else p[i, k]
            r += weight / 4 * (u[i] - (u[i] @ w[k]) * w[k])
        torch.testing.assert_close(found[k], -r / (bank[k].norm() * T), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("temperature", [0.5, 0.02])
def test_adcos_gradient_by_loops(views, temperature):
    bank, _, anchor, options = problem("adco", 6, 5, 3, dtype=torch.float64, views=views)
    bank, n = bank.double(), 6 // views
    u, w, v = F.normalize(anchor), F.normalize(bank), F.normalize(options["keys"])
    found = gradient(bank, anchor, temperature=temperature, **options)
    expected = torch.zeros_like(bank)
    for i in range(6):
        own_view = v[i // n * n : (i // n + 1) * n]
        p = (u[i] @ torch.cat([own_view, w]).T / temperature).softmax(0)[n:]
        for k in range(5):
            ascent = p[k] / 6 * (u[i] - (u[i] @ w[k]) * w[k])
            expected[k] -= ascent / (bank[k].norm() * temperature)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)


@both_methods
def test_velocity_and_update(method):
    bank, velocity, anchor, options = problem(method, 5, 7, 4, dtype=torch.float64)
    bank, velocity = bank.double(), velocity.double()
    G = gradient(bank, anchor, **options)
    numbers = {"lr": 0.3, "momentum": 0.7, "weight_decay": 0.01}
    new_bank, new_velocity = step(bank, velocity, anchor, reference.bank_step, **numbers, **options)
    expected = 0.7 * velocity + G + 0.01 * bank
    torch.testing.assert_close(new_velocity, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(new_bank, bank - 0.3 * expected, rtol=1e-12, atol=0)


@both_methods
def test_negatives_become_harder(method):
    bank, velocity, anchor, options = problem(method, 30, 50, 8)
    positive = options.get("positive")
    u = F.normalize(anchor)
    before = u @ F.normalize(bank).T
    moved, _ = step(bank, 0 * velocity, anchor, lr=0.1, temperature=0.5, **options)
    nearer = u @ F.normalize(moved).T - before
    if positive is not None:
        # as do its positives, which is what cooperates
        assert nearer[range(30), positive].mean() > 0
    assert nearer.mean() > 0


@every_implementation
@both_methods
# several blocks of anchors, groups of them, and more tiles of the bank than chunks
@pytest.mark.parametrize(("N", "K"), [(7, 3500), (402, 300)])
def test_many_rows(implementation, method, N, K):
    bank, velocity, anchor, options = problem(method, N, K, 6)
    check(implementation, bank, velocity, anchor, 0.05, **options)


@every_implementation
@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("temperature", [0.1, 0.02])
def test_rows_meet_the_keys_of_their_view(implementation, views, temperature):
    for N in (12, 300):
        bank, velocity, anchor, options = problem("adco", N, 61, 7, views=views)
        check(implementation, bank, velocity, anchor, temperature, **options)


@every_implementation
@both_methods
def test_rows_that_count_differently(implementation, method):
    bank, velocity, anchor, options = problem(method, 20, 33, 7)
    weight = torch.randn(20) * torch.randn(20).mul(2).exp()
    check(implementation, bank, velocity, anchor, weight=weight, **options)
    # as many as N rows count 1 / N
    same = torch.full((20,), 1 / 20)
    with running(implementation) as impl:
        plain, weighted = (
            step(bank, velocity, anchor, lr=0.3, weight=w, impl=impl, **options)
            for w in (None, same)
        )
    torch.testing.assert_close(plain, weighted)


@every_implementation
@pytest.mark.parametrize("temperature", [0.5, 0.08, 0.02])
def test_losses_that_are_known(implementation, temperature):
    # two equal rows, the loss of which is next to nothing beside a bank of others
    bank, velocity, anchor, options = problem("caco", 20, 33, 7)
    bank[4], options["positive"][3] = anchor[3], 4
    losses = clae_fast.info_nce(
        anchor, bank, temperature=temperature, positive=options["positive"], reduction="none"
    )
    check(implementation, bank, velocity, anchor, temperature, losses=losses, **options)
    bank, velocity, anchor, options = problem("adco", 20, 33, 7)
    columns = torch.cat([options["keys"], bank])
    losses = clae_fast.info_nce(anchor, columns, temperature=temperature, reduction="none")
    check(implementation, bank, velocity, anchor, temperature, losses=losses, **options)


@every_implementation
def test_several_anchors_share_a_positive(implementation):
    bank, velocity, anchor, options = problem("caco", 120, 200, 5)
    options["positive"] = torch.arange(120) % 3 * 99
    check(implementation, bank, velocity, anchor, **options)


@every_implementation
def test_a_part_of_a_buffer(implementation):
    # as where keys stand in front of the bank
    bank, velocity, anchor, options = problem("adco", 5, 9, 4)
    buffer = torch.cat([options["keys"], bank])
    with running(implementation) as impl:
        expected, _ = step(bank, velocity, anchor, lr=0.3, impl=impl, **options)
        options["keys"] = buffer[:5]
        clae_fast.bank_step(buffer[5:], velocity.clone(), anchor, lr=0.3, impl=impl, **options)
    assert_bitwise_equal(buffer[5:], expected)
    assert_bitwise_equal(buffer[:5], options["keys"])


@every_implementation
def test_rate_in_a_tensor(implementation):
    bank, velocity, anchor, options = problem("caco", 5, 9, 4)
    with running(implementation) as impl:
        options["impl"] = impl
        by_number = step(bank, velocity, anchor, lr=0.25, **options)
        by_tensor = step(bank, velocity, anchor, lr=torch.tensor(0.25), **options)
    for actual, expected in zip(by_tensor, by_number, strict=True):
        assert_bitwise_equal(actual, expected)


@every_implementation
@both_methods
def test_opcheck_of_rows_that_count_differently_and_known_losses(implementation, method):
    bank, velocity, anchor, options = problem(method, 5, 9, 4)
    options |= {"weight": torch.rand(5), "losses": torch.rand(5)}
    with running(implementation) as impl, Recorder() as recorder:
        step(bank, velocity, anchor, lr=torch.tensor(0.3), impl=impl, **options)
    (call,) = recorder.calls
    torch.library.opcheck(call.op, call.arguments, call.keywords)
