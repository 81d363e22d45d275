import math
from dataclasses import replace

import pytest
import torch
from op_cases import NEAR, VIEWS, BadInputs, Case, Grid, assert_right, run, seeded, views
from torch.nn import functional as F

import clae_fast
from clae_fast import reference
from clae_fast.testing import (
    assert_bitwise_equal,
    implementations,
    projections,
    running,
    value_and_grads,
)

pytestmark = pytest.mark.usefixtures("nan_empty")

# the interpreter's turn is in tests/kernels
IMPLEMENTATIONS = [name for name in implementations("hard_nt_xent") if name != "triton"]
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
# plain, DCL, HCL, and harder ones with constant weights
SETTINGS = [
    {"beta": beta, "tau_plus": tau_plus, "detach_weights": detach}
    for beta, tau_plus, detach in ((0, 0, False), (0, 0.1, False), (1, 0.1, False), (2.5, 0, True))
]


def views_and_extra(N, D, *, dtype=torch.float32, **options):
    extra = torch.randn(2 * N, 3, generator=seeded())
    return {**views(N, D, dtype=dtype, **options), "extra": extra.to(dtype)}


def _hard(beta, tau_plus, detach=False, make=views, **fields):
    options = {"beta": beta, "tau_plus": tau_plus, "detach_weights": detach}
    # 0.04 is above the temperature where exponents leave fp32's range with beta = 0 alone
    sizes = ((2, 3), (7, 5), (131, 17)) if make is views else ((1, 5), (6, 5))
    grid = Grid(sizes, (0.5, 0.1, 0.04, 0.005), NEAR)
    return Case(
        "hard_nt_xent",
        make,
        grids=(grid,),
        options=options,
        sharpness=1 + beta,
        **{**VIEWS, **fields},
    )


def _with_extra(beta, tau_plus, detach=False):
    operands = {"make": views_and_extra, "wrt": ("z0", "z1", "extra")}
    return _hard(beta, tau_plus, detach, **operands, only="torch", negatives=False)


CASES = {
    # HCL; plain, DCL, and harder ones with constant weights
    "hard_nt_xent": _hard(1.0, 0.1, searched=True),
    "hard_nt_xent-constant": _hard(2.5, 0.0, True, compiled=False, searched=True),
    "hard_nt_xent-debiased": _hard(0.0, 0.1, compiled=False),
    "hard_nt_xent-plain": _hard(0.0, 0.0, compiled=False),
    "hard_nt_xent-extra": _with_extra(1.0, 0.1),
}
BAD_INPUTS = BadInputs(
    {"z0": torch.ones(4, 3), "z1": torch.ones(4, 3), "extra": torch.ones(8, 2)},
    own=[
        ({"beta": -1}, ValueError, r"beta must be in \[0, "),
        ({"beta": math.inf}, ValueError, r"beta must be in \[0, "),
        ({"beta": "1"}, TypeError, "beta must be a number, got str"),
        ({"tau_plus": 1.0}, ValueError, r"tau_plus must be in \[0, "),
        ({"tau_plus": -0.1}, ValueError, r"tau_plus must be in \[0, "),
        ({"detach_weights": 1}, TypeError, "detach_weights must be True or False"),
        ({"z1": torch.ones(4, 2)}, ValueError, "z1 must have the shape of z0"),
        ({"extra": torch.ones(4, 2)}, ValueError, r"extra must have shape \[8, k\].*got \[4, 2\]"),
        (
            {"impl": "native"},
            ValueError,
            "impl='native' does not take extra logits: impl='torch' does",
        ),
    ],
    any_dtype=("extra",),
)


def by_loops(z0, z1, temperature, beta, tau_plus, extra=None):
    N = len(z0)
    u = F.normalize(torch.cat([z0, z1]))
    total = 0.0
    for i in range(2 * N):
        s = [
            float(u[i] @ u[j]) / temperature
            for j in range(2 * N)
            if j not in (i, (i + N) % (2 * N))
        ]
        s += [] if extra is None else extra[i].tolist()
        positive = math.exp(float(u[i] @ u[(i + N) % (2 * N)]) / temperature)
        weights = [math.exp(beta * x) for x in s]
        mean = sum(w * math.exp(x) for w, x in zip(weights, s, strict=True)) / sum(weights)
        debiased = (mean - tau_plus * positive) / (1 - tau_plus)
        total += math.log1p(len(s) * max(debiased, math.exp(-1 / temperature)) / positive)
    return total / (2 * N)


def check(implementation, z0, z1, temperature, **setting):
    # the weights' exponents are that much larger
    fields = {"options": setting, "sharpness": 1 + setting["beta"]}
    case, tensors = replace(CASES["hard_nt_xent"], **fields), {"z0": z0, "z1": z1}
    with running(implementation) as impl:
        for wrt in (case.wrt, ()):
            results = run(case, tensors, wrt=wrt, temperature=temperature, impl=impl)
            assert_right(case, tensors, results, wrt=wrt, temperature=temperature)


@pytest.mark.parametrize("temperature", [0.5, 0.1])
@pytest.mark.parametrize(("beta", "tau_plus"), [(0, 0), (0, 0.1), (1, 0.1), (2, 0.3), (0.5, 0)])
@pytest.mark.parametrize("further", [0, 3])
def test_reference_is_the_definition(temperature, beta, tau_plus, further):
    z0, z1 = projections(4, 3, noise=0.5, dtype=torch.float64)
    extra = torch.randn(8, further, dtype=torch.float64) if further else None
    value = reference.hard_nt_xent(
        z0, z1, temperature=temperature, beta=beta, tau_plus=tau_plus, extra=extra
    )
    expected = by_loops(z0, z1, temperature, beta, tau_plus, extra)
    assert value.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("setting", SETTINGS[:3], ids=str)
def test_gradient_of_the_reference(setting):
    z0, z1 = projections(4, 3, noise=0.5, dtype=torch.float64)
    extra = torch.randn(8, 2, dtype=torch.float64)

    def loss(z0, z1, extra):
        return reference.hard_nt_xent(z0, z1, temperature=0.3, extra=extra, **setting)

    operands = [z.requires_grad_() for z in (z0, z1, extra)]
    assert torch.autograd.gradcheck(loss, operands)


def test_gradient_with_constant_weights():
    z0, z1 = projections(4, 3, dtype=torch.float64)
    others = ~torch.eye(4, dtype=torch.bool).repeat(2, 2)

    def similarities(z):
        u = F.normalize(z)
        return u @ u.T / 0.3

    constant = (2 * similarities(torch.cat([z0, z1]))).exp()

    def loss(z0, z1):
        s = similarities(torch.cat([z0, z1]))
        positive = s.diagonal(4).repeat(2)
        mean = (constant * s.exp() * others).sum(1) / (constant * others).sum(1)
        return torch.log1p(6 * (mean / positive.exp() - 0.05) / 0.95).mean()

    setting = {"beta": 2, "tau_plus": 0.05, "detach_weights": True, "temperature": 0.3}
    value, grads = value_and_grads(reference.hard_nt_xent, z0, z1, **setting)
    expected, expected_grads = value_and_grads(loss, z0, z1)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
@pytest.mark.parametrize("temperature", [0.5, 0.02])
def test_without_either_it_is_nt_xent(implementation, temperature):
    z = projections(13, 6)
    setting = {"temperature": temperature, "beta": 0, "tau_plus": 0}
    with running(implementation) as impl:
        loss, grads = value_and_grads(clae_fast.hard_nt_xent, *z, impl=impl, **setting)
        # nt_xent has no implementation in torch ops
        same = "auto" if impl == "torch" else impl
        expected, expected_grads = value_and_grads(
            clae_fast.nt_xent, *z, temperature=temperature, impl=same
        )
    if implementation == "torch":
        torch.testing.assert_close([loss, *grads], [expected, *expected_grads])
        return
    for actual, wanted in zip((loss, *grads), (expected, *expected_grads), strict=True):
        assert_bitwise_equal(actual, wanted)


@every_implementation
@pytest.mark.parametrize("temperature", [0.5, 0.04, 0.005])
def test_rows_at_the_lower_bound(implementation, temperature):
    z0, z1 = projections(9, 4, noise=0.05)
    z1[0] = -z0[0]
    check(implementation, z0, z1, temperature, beta=1.0, tau_plus=0.3)

    u = F.normalize(torch.cat([z0, z1]).double())
    s = (u @ u.T / temperature).masked_fill(torch.eye(9, dtype=torch.bool).repeat(2, 2), -math.inf)
    log_mean = (2 * s).logsumexp(1) - s.logsumexp(1)
    positive = (u[:9] * u[9:]).sum(1).repeat(2) / temperature
    floored = (log_mean - positive).exp() - 0.3 <= 0.7 * (-1 / temperature - positive).exp()
    assert floored.any()
    assert not floored.all()


@every_implementation
@pytest.mark.parametrize(("beta", "tau_plus"), [(0, 0.9), (1, 0), (5, 0.9), (50, 0)])
# both sides of where the shift changes
@pytest.mark.parametrize("ratio", [0.0235, 0.029, 0.031])
def test_a_row_opposite_to_all_others(implementation, beta, tau_plus, ratio):
    z0, z1 = (0.1 * z - 1 for z in projections(4, 3))
    z0[0] += 2
    temperature = ratio * (1 + beta)
    check(implementation, z0, z1, temperature, beta=beta, tau_plus=tau_plus)


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("N", [1, 6])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_further_negatives(impl, N, setting):
    z0, z1 = projections(N, 5)
    extra = torch.randn(2 * N, 3)
    options = {"temperature": 0.2, **setting}

    def loss(z0, z1, extra, impl):
        return clae_fast.hard_nt_xent(z0, z1, extra=extra, impl=impl, **options)

    value, grads = value_and_grads(loss, z0, z1, extra, impl=impl)
    exact, exact_grads = value_and_grads(
        loss, z0.double(), z1.double(), extra.double(), impl="reference"
    )
    torch.testing.assert_close(value, exact.float())
    torch.testing.assert_close(grads, [grad.float() for grad in exact_grads])
    assert loss(z0, z1, extra, impl) == value
    assert loss(z0, z1, extra.half(), impl).dtype == torch.float32
