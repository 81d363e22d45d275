import math

import pytest
import torch
from torch.nn import functional as F

import clae_fast
from clae_fast import reference
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

IMPLEMENTATIONS = implementations("h_scl")
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
every_weight = pytest.mark.parametrize(
    ("beta", "detach"), [(0, False), (1, False), (5, True)], ids=["easy", "trained", "constant"]
)


def rows(n, D, classes, *, noise=None, dtype=torch.float32):
    """Projections and labels; with `noise`, those of a class are near one another."""
    labels = torch.randint(classes, (n,), generator=torch.Generator().manual_seed(1))
    centres, z = projections(max(n, classes), D)
    z = z[:n] if noise is None else centres[labels] + noise * z[:n]
    return z.to(dtype), labels


def by_loops(z, labels, temperature, beta):
    u = F.normalize(z)
    s = (u @ u.T / temperature).tolist()
    everyone = range(len(z))
    losses = []
    for i in everyone:
        negatives = [s[i][k] for k in everyone if labels[k] != labels[i]]
        weights = [math.exp(beta * x) for x in negatives]
        weighted = sum(w * math.exp(x) for w, x in zip(weights, negatives, strict=True))
        for j in everyone:
            if j != i and labels[j] == labels[i]:
                mean = weighted / sum(weights) if negatives else 0
                losses.append(math.log1p((len(z) - 2) * mean / math.exp(s[i][j])))
    return sum(losses) / len(losses)


def check(implementation, z, labels, temperature, beta, detach):
    options = {"temperature": temperature, "beta": beta, "detach_weights": detach}
    with running(implementation) as impl:
        loss, grads = value_and_grads(lambda z: clae_fast.h_scl(z, labels, impl=impl, **options), z)
        loss_alone = clae_fast.h_scl(z, labels, impl=impl, **options)
    eager, exact = (
        value_and_grads(lambda z: reference.h_scl(z, labels, **options), operand)
        for operand in (z, z.double())
    )
    # the weights' exponents are that much larger
    sharpness = temperature / (1 + beta)
    for value in (loss, loss_alone):
        assert_accurate(value, eager[0], exact[0], temperature=sharpness, what="loss")
    assert_accurate(grads[0], eager[1][0], exact[1][0], temperature=sharpness, what="gradient")


@pytest.mark.parametrize("beta", [0, 0.5, 3])
@pytest.mark.parametrize(("n", "classes"), [(3, 1), (7, 2), (9, 12)])
def test_reference_is_the_definition(n, classes, beta):
    z, labels = rows(n, 4, classes, dtype=torch.float64)
    value = reference.h_scl(z, labels, temperature=0.3, beta=beta)
    assert value.item() == pytest.approx(by_loops(z, labels, 0.3, beta), rel=1e-12)


@pytest.mark.parametrize("classes", [1, 2, 12])
@pytest.mark.parametrize("beta", [0, 2])
def test_gradient_of_the_reference(classes, beta):
    z, labels = rows(7, 3, classes, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda z: reference.h_scl(z, labels, temperature=0.3, beta=beta), z.requires_grad_()
    )


def test_gradient_with_constant_weights():
    z, labels = rows(7, 3, 2, dtype=torch.float64)
    same = labels[:, None] == labels
    positive = same & ~torch.eye(7, dtype=torch.bool)

    def similarities(z):
        return F.normalize(z) @ F.normalize(z).T / 0.4

    constant = (2 * similarities(z)).exp() * ~same

    def loss(z):
        s = similarities(z)
        mean = (constant * s.exp()).sum(1, keepdim=True) / constant.sum(1, keepdim=True)
        return torch.log1p(5 * mean / s.exp())[positive].mean()

    options = {"temperature": 0.4, "beta": 2, "detach_weights": True}
    actual = value_and_grads(lambda z: reference.h_scl(z, labels, **options), z)
    torch.testing.assert_close(actual, value_and_grads(loss, z), rtol=1e-12, atol=1e-14)


@every_implementation
@every_weight
@pytest.mark.parametrize("temperature", [0.5, 0.07, 0.005])
@pytest.mark.parametrize("noise", [None, 0.1], ids=["independent", "near"])
@pytest.mark.parametrize(("n", "D", "classes"), [(3, 1, 1), (9, 5, 2), (67, 17, 30), (131, 7, 4)])
def test_against_fp64(implementation, n, D, classes, noise, temperature, beta, detach):
    check(implementation, *rows(n, D, classes, noise=noise), temperature, beta, detach)


@every_implementation
@every_weight
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs(implementation, dtype, beta, detach):
    check(implementation, *rows(37, 25, 5, dtype=dtype), 0.2, beta, detach)


@every_implementation
def test_rows_around_the_norm_floor(implementation):
    z, labels = rows(18, 6, 4)
    z[0], z[1], z[2] = 0, 1e-13, z[2] * 1e-6
    check(implementation, z, labels, 0.1, 1.0, False)


@every_weight
def test_blocks_of_rows(monkeypatch, beta, detach):
    monkeypatch.setattr(_rows, "_BLOCK_ELEMENTS", 4 * 26 + 1)
    check("torch", *rows(26, 6, 5), 0.1, beta, detach)


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
@pytest.mark.parametrize("labels", [[0], [0, 0], [0, 1], [2, 1, 0], [3, 3, 3]], ids=str)
@every_weight
def test_without_a_positive_or_a_negative_there_is_no_loss(implementation, labels, beta, detach):
    options = {"beta": beta, "detach_weights": detach}
    with running(implementation) as impl:
        loss, (dz,) = value_and_grads(
            lambda z: clae_fast.h_scl(z, torch.tensor(labels), impl=impl, **options),
            projections(len(labels), 5)[0],
        )
    assert loss == 0
    assert not dz.any()


@every_implementation
def test_strided_inputs(implementation):
    z, labels = rows(14, 10, 3)
    with running(implementation) as impl:
        dense = clae_fast.h_scl(z, labels, impl=impl)
        for strided in (z.T.contiguous().T, torch.cat([z, z], 1)[:, :10]):
            assert_bitwise_equal(clae_fast.h_scl(strided, labels, impl=impl), dense)
        assert_bitwise_equal(
            clae_fast.h_scl(z, torch.stack([labels, labels], 1)[:, 0], impl=impl), dense
        )


@every_implementation
@every_weight
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_reaches_loss_and_gradient(implementation, bad, beta, detach):
    z, labels = rows(9, 6, 2)
    z[4, 1] = bad
    options = {"beta": beta, "detach_weights": detach}
    with running(implementation) as impl:
        loss, (dz,) = value_and_grads(lambda z: clae_fast.h_scl(z, labels, impl=impl, **options), z)
    assert loss.isnan()
    assert dz.isnan().all()


@every_implementation
def test_double_backward_raises(implementation):
    z, labels = rows(6, 3, 2)
    z.requires_grad_()
    with running(implementation) as impl:
        loss = clae_fast.h_scl(z, labels, impl=impl)
    (dz,) = torch.autograd.grad(loss, z, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        dz.sum().backward()


@every_implementation
@pytest.mark.parametrize("grad", [True, False])
def test_opcheck(implementation, grad):
    with running(implementation) as impl:
        arguments = (*rows(7, 4, 3), 0.1, 1.0, False, grad, impl)
        torch.library.opcheck(torch.ops.clae_fast.h_scl.default, arguments)


@every_implementation
def test_compile(implementation):
    z, labels = rows(7, 4, 3)
    with running(implementation) as impl:

        def loss(z):
            return clae_fast.h_scl(z, labels, impl=impl)

        compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
        (value, (dz,)), (expected, (expected_dz,)) = (
            value_and_grads(function, z) for function in (compiled, loss)
        )
    assert_bitwise_equal(value, expected)
    assert_bitwise_equal(dz, expected_dz)


def test_bad_arguments():
    z = torch.ones(4, 3)
    with pytest.raises(ValueError, match=r"labels must have shape \[4\], got \[3\]"):
        clae_fast.h_scl(z, torch.arange(3))
    with pytest.raises(ValueError, match=r"beta must be in \[0, inf\), got -2"):
        clae_fast.h_scl(z, torch.arange(4), beta=-2)
    with pytest.raises(TypeError, match="detach_weights must be True or False"):
        clae_fast.h_scl(z, torch.arange(4), detach_weights=0)
