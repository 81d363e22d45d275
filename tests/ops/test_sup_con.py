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

IMPLEMENTATIONS = implementations("sup_con")
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
either_columns = pytest.mark.parametrize("detach", [False, True], ids=["trained", "constant"])


def rows(n, D, classes, *, noise=None, dtype=torch.float32):
    """Projections and labels; with `noise`, those of a class are near one another."""
    labels = torch.randint(classes, (n,), generator=torch.Generator().manual_seed(1))
    centres, z = projections(max(n, classes), D)
    z = z[:n] if noise is None else centres[labels] + noise * z[:n]
    return z.to(dtype), labels


def by_loops(z, labels, temperature):
    u = F.normalize(z)
    s = (u @ u.T / temperature).tolist()
    losses = []
    for i in range(len(z)):
        others = [j for j in range(len(z)) if j != i]
        positives = [j for j in others if labels[j] == labels[i]]
        if positives:
            log_sum = math.log(sum(math.exp(s[i][j]) for j in others))
            losses.append(sum(log_sum - s[i][p] for p in positives) / len(positives))
    return sum(losses) / len(losses)


def check(implementation, z, labels, temperature, detach=False):
    options = {"temperature": temperature, "detach_columns": detach}
    with running(implementation) as impl:
        loss, grads = value_and_grads(
            lambda z: clae_fast.sup_con(z, labels, impl=impl, **options), z
        )
        loss_alone = clae_fast.sup_con(z, labels, impl=impl, **options)
    eager, exact = (
        value_and_grads(lambda z: reference.sup_con(z, labels, **options), operand)
        for operand in (z, z.double())
    )
    for value in (loss, loss_alone):
        assert_accurate(value, eager[0], exact[0], temperature=temperature, what="loss")
    assert_accurate(grads[0], eager[1][0], exact[1][0], temperature=temperature, what="gradient")


@pytest.mark.parametrize(("n", "classes"), [(2, 1), (7, 2), (9, 20), (8, 1)])
def test_reference_is_the_definition(n, classes):
    z, labels = rows(n, 4, classes, dtype=torch.float64)
    value = reference.sup_con(z, labels, temperature=0.2)
    assert value.item() == pytest.approx(by_loops(z, labels, 0.2), rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("classes", [1, 3, 20])
def test_gradient_of_the_reference(classes):
    z, labels = rows(7, 3, classes, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda z: reference.sup_con(z, labels, temperature=0.3), z.requires_grad_()
    )


def test_gradient_with_constant_columns():
    z, labels = rows(7, 3, 2, dtype=torch.float64)
    columns = F.normalize(z)
    others = ~torch.eye(7, dtype=torch.bool)
    positive = (labels[:, None] == labels) & others

    def loss(z):
        s = F.normalize(z) @ columns.T / 0.2
        log_p = s - s.masked_fill(~others, -math.inf).logsumexp(1, keepdim=True)
        return -((log_p * positive).sum(1) / positive.sum(1)).mean()

    options = {"temperature": 0.2, "detach_columns": True}
    actual = value_and_grads(lambda z: reference.sup_con(z, labels, **options), z)
    torch.testing.assert_close(actual, value_and_grads(loss, z), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("temperature", [0.5, 0.02])
def test_pairs_make_it_nt_xent(temperature):
    z = projections(6, 5, noise=0.2, dtype=torch.float64)

    def pairs(z0, z1, temperature):
        labels = torch.arange(6).repeat(2)
        return reference.sup_con(torch.cat([z0, z1]), labels, temperature=temperature)

    actual = value_and_grads(pairs, *z, temperature=temperature)
    expected = value_and_grads(reference.nt_xent, *z, temperature=temperature)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
def test_well_separated_pairs_keep_their_digits(implementation):
    # 1 - p of the positive is below fp32's spacing near 1
    labels = torch.arange(6).repeat(2)
    with running(implementation) as impl:
        loss, (dz,) = value_and_grads(
            lambda z: clae_fast.sup_con(z, labels, temperature=0.02, impl=impl),
            torch.eye(6).repeat(2, 1),
        )
    exact = value_and_grads(
        lambda z: reference.sup_con(z, labels, temperature=0.02),
        torch.eye(6, dtype=torch.float64).repeat(2, 1),
    )
    assert loss.item() == pytest.approx(10 * math.exp(-50), rel=1e-5)
    torch.testing.assert_close(dz, exact[1][0].float(), rtol=1e-5, atol=1e-30)


@every_implementation
@either_columns
@pytest.mark.parametrize("temperature", [0.5, 0.07, 0.005])
@pytest.mark.parametrize("noise", [None, 0.1], ids=["independent", "near"])
@pytest.mark.parametrize(("n", "D", "classes"), [(2, 1, 1), (9, 5, 2), (67, 17, 30), (131, 7, 4)])
def test_against_fp64(implementation, n, D, classes, noise, temperature, detach):
    check(implementation, *rows(n, D, classes, noise=noise), temperature, detach)


@every_implementation
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs(implementation, dtype):
    check(implementation, *rows(37, 25, 5, dtype=dtype), 0.2)


@every_implementation
def test_rows_around_the_norm_floor(implementation):
    z, labels = rows(18, 6, 4)
    z[0], z[1], z[2] = 0, 1e-13, z[2] * 1e-6
    check(implementation, z, labels, 0.1)


@either_columns
def test_blocks_of_rows(monkeypatch, detach):
    monkeypatch.setattr(_rows, "_BLOCK_ELEMENTS", 4 * 26 + 1)
    check("torch", *rows(26, 6, 5), 0.1, detach)


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
@pytest.mark.parametrize("n", [1, 5])
def test_rows_without_a_partner_have_no_loss(implementation, n):
    with running(implementation) as impl:
        loss, (dz,) = value_and_grads(
            lambda z: clae_fast.sup_con(z, torch.arange(n), impl=impl), projections(n, 5)[0]
        )
    assert loss == 0
    assert not dz.any()


@every_implementation
def test_strided_inputs(implementation):
    z, labels = rows(14, 10, 3)
    with running(implementation) as impl:
        dense = clae_fast.sup_con(z, labels, impl=impl)
        for strided in (z.T.contiguous().T, torch.cat([z, z], 1)[:, :10]):
            value = clae_fast.sup_con(strided, labels.repeat(2)[:14], impl=impl)
            assert_bitwise_equal(value, dense)
        assert_bitwise_equal(
            clae_fast.sup_con(z, torch.stack([labels, labels], 1)[:, 0], impl=impl), dense
        )


@every_implementation
@either_columns
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_reaches_loss_and_gradient(implementation, bad, detach):
    z, labels = rows(9, 6, 2)
    z[4, 1] = bad
    with running(implementation) as impl:
        loss, (dz,) = value_and_grads(
            lambda z: clae_fast.sup_con(z, labels, detach_columns=detach, impl=impl), z
        )
    assert loss.isnan()
    assert dz.isnan().all()


@every_implementation
def test_double_backward_raises(implementation):
    z, labels = rows(6, 3, 2)
    z.requires_grad_()
    with running(implementation) as impl:
        loss = clae_fast.sup_con(z, labels, impl=impl)
    (dz,) = torch.autograd.grad(loss, z, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        dz.sum().backward()


@every_implementation
@pytest.mark.parametrize("grad", [True, False])
def test_opcheck(implementation, grad):
    with running(implementation) as impl:
        arguments = (*rows(7, 4, 3), 0.1, False, grad, impl)
        torch.library.opcheck(torch.ops.clae_fast.sup_con.default, arguments)


@every_implementation
def test_compile(implementation):
    z, labels = rows(7, 4, 3)
    with running(implementation) as impl:

        def loss(z):
            return clae_fast.sup_con(z, labels, impl=impl)

        compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
        (value, (dz,)), (expected, (expected_dz,)) = (
            value_and_grads(function, z) for function in (compiled, loss)
        )
    assert_bitwise_equal(value, expected)
    assert_bitwise_equal(dz, expected_dz)


def test_bad_arguments():
    z = torch.ones(4, 3)
    with pytest.raises(TypeError, match=r"labels must be a torch\.Tensor, got list"):
        clae_fast.sup_con(z, [0, 1, 0, 1])
    with pytest.raises(TypeError, match=r"labels must be of dtype int64, got torch\.int32"):
        clae_fast.sup_con(z, torch.zeros(4, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"labels must have shape \[4\], got \[4, 1\]"):
        clae_fast.sup_con(z, torch.zeros(4, 1, dtype=torch.int64))
    with pytest.raises(TypeError, match="detach_columns must be True or False"):
        clae_fast.sup_con(z, torch.arange(4), detach_columns=0)
    with pytest.raises(RuntimeError, match="sup_con has no implementation 'cuda'"):
        clae_fast.sup_con(z, torch.arange(4), impl="cuda")
