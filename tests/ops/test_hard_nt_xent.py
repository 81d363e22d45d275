import itertools
import math

import pytest
import torch
from torch.nn import functional as F

import clae_fast
from clae_fast import _native, reference
from clae_fast.ops import _rows
from clae_fast.testing import (
    assert_accurate,
    assert_bitwise_equal,
    implementations,
    projections,
    running,
    value_and_grads,
)

pytestmark = pytest.mark.usefixtures("nan_empty")

# the interpreter's turn is in test_kernels_hard_nt_xent.py
IMPLEMENTATIONS = [name for name in implementations("hard_nt_xent") if name != "triton"]
NATIVE = [name for name in IMPLEMENTATIONS if name.startswith("native")]
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
# plain, DCL, HCL, and harder ones with constant weights
SETTINGS = [
    {"beta": beta, "tau_plus": tau_plus, "detach_weights": detach}
    for beta, tau_plus, detach in ((0, 0, False), (0, 0.1, False), (1, 0.1, False), (2.5, 0, True))
]
every_setting = pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: f"{s['beta']}")


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


def check(implementation, operands, temperature, **setting):
    beta = setting.get("beta", 1.0)
    setting["temperature"] = temperature
    with running(implementation) as impl:
        loss, grads = value_and_grads(clae_fast.hard_nt_xent, *operands, impl=impl, **setting)
        loss_alone = clae_fast.hard_nt_xent(*operands, impl=impl, **setting)
    eager = value_and_grads(reference.hard_nt_xent, *operands, **setting)
    exact = value_and_grads(reference.hard_nt_xent, *(z.double() for z in operands), **setting)
    # the weights' exponents are that much larger
    sharpness = temperature / (1 + beta)
    for value in (loss, loss_alone):
        assert_accurate(value, eager[0], exact[0], temperature=sharpness, what="loss")
    for grad, eager_grad, exact_grad in zip(grads, eager[1], exact[1], strict=True):
        assert_accurate(grad, eager_grad, exact_grad, temperature=sharpness, what="gradient")


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
@every_setting
# 0.04 is above the temperature where exponents leave fp32's range with beta = 0 alone
@pytest.mark.parametrize("temperature", [0.5, 0.1, 0.04, 0.005])
@pytest.mark.parametrize("noise", [None, 0.1], ids=["independent", "near"])
# rows and columns on both sides of vectors' and tiles' ends, and neither a multiple of them
@pytest.mark.parametrize(("N", "D"), [(2, 3), (7, 5), (131, 17)])
def test_against_fp64(implementation, N, D, noise, temperature, setting):
    check(implementation, projections(N, D, noise=noise), temperature, **setting)


@every_implementation
@pytest.mark.parametrize("temperature", [0.5, 0.04, 0.005])
def test_rows_at_the_lower_bound(implementation, temperature):
    z0, z1 = projections(9, 4, noise=0.05)
    z1[0] = -z0[0]
    check(implementation, (z0, z1), temperature, beta=1.0, tau_plus=0.3)

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
    check(implementation, (z0, z1), temperature, beta=beta, tau_plus=tau_plus)


@every_implementation
@every_setting
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs(implementation, dtype, setting):
    check(implementation, projections(37, 25, dtype=dtype), 0.2, **setting)


@every_implementation
@pytest.mark.parametrize("temperature", [0.1, 0.005])
def test_rows_around_the_norm_floor(implementation, temperature):
    z0, z1 = projections(9, 6)
    z0[0], z0[1], z0[2] = 0, 1e-13, z0[2] * 1e-6
    z1[2], z1[3], z1[4] = 0, 1e-13, z1[4] * 1e-6
    check(implementation, (z0, z1), temperature)


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("N", [1, 6])
@every_setting
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


def test_further_negatives_are_taken_by_torch_alone():
    z0, z1 = projections(3, 4)
    with pytest.raises(ValueError, match="impl='native' does not take extra logits"):
        clae_fast.hard_nt_xent(z0, z1, extra=torch.zeros(6, 1), impl="native")


def test_blocks_of_rows(monkeypatch):
    monkeypatch.setattr(_rows, "_BLOCK_ELEMENTS", 4 * 26 + 1)
    for setting in SETTINGS:
        check("torch", projections(13, 6), 0.1, **setting)


@every_implementation
@every_setting
def test_one_pair_has_no_loss(implementation, setting):
    with running(implementation) as impl:
        loss, grads = value_and_grads(
            clae_fast.hard_nt_xent, *projections(1, 5), impl=impl, **setting
        )
    assert loss == 0
    assert not any(grad.any() for grad in grads)


@every_implementation
@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_strided_inputs(implementation, layout):
    z0, z1 = projections(14, 10)
    strided = {
        "transposed": lambda z: z.T.contiguous().T,
        "sliced": lambda z: torch.cat([z, z], 1)[:, :10],
        "expanded": lambda z: z[:, :1].expand(-1, 10),
    }[layout]
    s0, s1 = strided(z0), strided(z1)
    with running(implementation) as impl:
        loss, grads = value_and_grads(clae_fast.hard_nt_xent, s0, s1, impl=impl)
        dense = value_and_grads(clae_fast.hard_nt_xent, s0.contiguous(), s1.contiguous(), impl=impl)
    assert_bitwise_equal(loss, dense[0])
    for grad, expected in zip(grads, dense[1], strict=True):
        assert_bitwise_equal(grad, expected)


@every_implementation
@pytest.mark.parametrize("which", [0, 1])
def test_only_the_requested_gradient(implementation, which):
    z = list(projections(6, 4))
    with running(implementation) as impl:
        both = value_and_grads(clae_fast.hard_nt_xent, *z, impl=impl)[1]
        z[which].requires_grad_()
        clae_fast.hard_nt_xent(*z, impl=impl).backward()
    assert_bitwise_equal(z[which].grad, both[which])
    assert z[1 - which].grad is None


@every_implementation
@every_setting
@pytest.mark.parametrize(("N", "temperature"), [(1, 0.5), (5, 0.5), (5, 0.01)])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_reaches_loss_and_gradients(implementation, bad, N, temperature, setting):
    z0, z1 = projections(N, 6)
    z1[N - 1, 1] = bad
    options = {"temperature": temperature, **setting}
    with running(implementation) as impl:
        loss, grads = value_and_grads(clae_fast.hard_nt_xent, z0, z1, impl=impl, **options)
        loss_alone = clae_fast.hard_nt_xent(z0, z1, impl=impl, **options)
    assert loss.isnan()
    assert loss_alone.isnan()
    assert all(grad.isnan().all() for grad in grads)


@pytest.mark.parametrize("implementation", NATIVE)
@pytest.mark.parametrize("temperature", [0.5, 0.02])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_do_not_change_a_bit(implementation, dtype, temperature, threads):
    z = projections(131, 17, dtype=dtype)
    results = []
    with running(implementation) as impl:
        for count in (1, 2, 3):
            with threads(count):
                loss, grads = value_and_grads(
                    clae_fast.hard_nt_xent, *z, temperature=temperature, impl=impl
                )
                results.append([loss, *grads])
    for one, other in itertools.pairwise(results):
        for result, expected in zip(other, one, strict=True):
            assert_bitwise_equal(result, expected)


@every_implementation
def test_double_backward_raises(implementation):
    z0, z1 = (z.requires_grad_() for z in projections(4, 3))
    with running(implementation) as impl:
        loss = clae_fast.hard_nt_xent(z0, z1, impl=impl)
    (dz0,) = torch.autograd.grad(loss, z0, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        dz0.sum().backward()


@every_implementation
@pytest.mark.parametrize("grad", [True, False])
def test_opcheck(implementation, grad):
    with running(implementation) as impl:
        arguments = (*projections(5, 4), None, 0.1, 1.0, 0.1, False, grad, False, impl)
        torch.library.opcheck(torch.ops.clae_fast.hard_nt_xent.default, arguments)


def test_opcheck_of_further_negatives():
    arguments = (*projections(5, 4), torch.randn(10, 2), 0.1, 1.0, 0.1, False, True, False, "torch")
    torch.library.opcheck(torch.ops.clae_fast.hard_nt_xent.default, arguments)


@pytest.mark.parametrize("impl", ["native", "torch"])
def test_compile(impl):
    if impl == "native" and not _native.has_cpu():
        pytest.skip("built with CLAE_FAST_BUILD=none")
    z = projections(5, 4)

    def loss(z0, z1):
        return clae_fast.hard_nt_xent(z0, z1, temperature=0.2, impl=impl)

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    value, grads = value_and_grads(compiled, *z)
    expected, expected_grads = value_and_grads(loss, *z)
    for actual, wanted in zip((value, *grads), (expected, *expected_grads), strict=True):
        assert_bitwise_equal(actual, wanted)


def test_bad_arguments():
    z = torch.ones(4, 3)
    for name, value in (("beta", -1), ("beta", math.inf), ("tau_plus", 1.0), ("tau_plus", -0.1)):
        with pytest.raises(ValueError, match=rf"{name} must be in \[0, "):
            clae_fast.hard_nt_xent(z, z, **{name: value})
    with pytest.raises(TypeError, match="beta must be a number, got str"):
        clae_fast.hard_nt_xent(z, z, beta="1")
    with pytest.raises(TypeError, match="detach_weights must be True or False"):
        clae_fast.hard_nt_xent(z, z, detach_weights=1)
    with pytest.raises(ValueError, match="z1 must have the shape of z0"):
        clae_fast.hard_nt_xent(z, z[:, :2])
    with pytest.raises(ValueError, match=r"extra must have shape \[8, k\].*got \[4, 2\]"):
        clae_fast.hard_nt_xent(z, z, extra=torch.ones(4, 2))
    with pytest.raises(TypeError, match="extra must be of dtype"):
        clae_fast.hard_nt_xent(z, z, extra=torch.ones(8, 2, dtype=torch.int64))
