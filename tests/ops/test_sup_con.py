import math

import pytest
import torch
from op_cases import LABELS, NEAR, BadInputs, Case, Grid, labeled
from torch.nn import functional as F

import clae_fast
from clae_fast import reference
from clae_fast.testing import (
    implementations,
    projections,
    running,
    value_and_grads,
)

pytestmark = pytest.mark.usefixtures("nan_empty")

IMPLEMENTATIONS = implementations("sup_con")


def _sup_con(compiled=True, **options):
    grid = Grid(((2, 1, 1), (9, 5, 2), (67, 17, 30), (131, 7, 4)), (0.5, 0.07, 0.005), NEAR)
    return Case("sup_con", grids=(grid,), options=options, compiled=compiled, **LABELS)


CASES = {
    "sup_con": _sup_con(detach_columns=False),
    "sup_con-constant": _sup_con(detach_columns=True, compiled=False),
}
BAD_INPUTS = BadInputs(
    {"z": torch.ones(4, 3), "labels": torch.arange(4)},
    own=[
        (
            {"labels": torch.arange(4)[:, None]},
            ValueError,
            r"labels must have shape \[4\], got \[4, 1\]",
        ),
        ({"detach_columns": 0}, TypeError, "detach_columns must be True or False"),
    ],
)


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


@pytest.mark.parametrize(("n", "classes"), [(2, 1), (7, 2), (9, 20), (8, 1)])
def test_reference_is_the_definition(n, classes):
    z, labels = labeled(n, 4, classes, dtype=torch.float64).values()
    value = reference.sup_con(z, labels, temperature=0.2)
    assert value.item() == pytest.approx(by_loops(z, labels, 0.2), rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("classes", [1, 3, 20])
def test_gradient_of_the_reference(classes):
    z, labels = labeled(7, 3, classes, dtype=torch.float64).values()
    assert torch.autograd.gradcheck(
        lambda z: reference.sup_con(z, labels, temperature=0.3), z.requires_grad_()
    )


def test_gradient_with_constant_columns():
    z, labels = labeled(7, 3, 2, dtype=torch.float64).values()
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


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
@pytest.mark.parametrize("n", [1, 5])
def test_rows_without_a_partner_have_no_loss(implementation, n):
    with running(implementation) as impl:
        loss, (dz,) = value_and_grads(
            lambda z: clae_fast.sup_con(z, torch.arange(n), impl=impl), projections(n, 5)[0]
        )
    assert loss == 0
    assert not dz.any()
