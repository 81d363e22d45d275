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

IMPLEMENTATIONS = implementations("h_scl")
every_weight = pytest.mark.parametrize(
    ("beta", "detach"), [(0, False), (1, False), (5, True)], ids=["easy", "trained", "constant"]
)


def _h_scl(beta, detach, **fields):
    grid = Grid(((3, 1, 1), (9, 5, 2), (67, 17, 30), (131, 7, 4)), (0.5, 0.07, 0.005), NEAR)
    options = {"beta": beta, "detach_weights": detach}
    fields = {"sharpness": 1 + beta, **LABELS, **fields}
    return Case("h_scl", grids=(grid,), options=options, **fields)


CASES = {
    "h_scl": _h_scl(1.0, False),
    "h_scl-easy": _h_scl(0.0, False, compiled=False),
    "h_scl-constant": _h_scl(5.0, True, compiled=False),
}
BAD_INPUTS = BadInputs(
    {"z": torch.ones(4, 3), "labels": torch.arange(4)},
    own=[
        ({"labels": torch.arange(3)}, ValueError, r"labels must have shape \[4\], got \[3\]"),
        ({"beta": -2}, ValueError, r"beta must be in \[0, inf\), got -2"),
        ({"detach_weights": 0}, TypeError, "detach_weights must be True or False"),
    ],
)


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


@pytest.mark.parametrize("beta", [0, 0.5, 3])
@pytest.mark.parametrize(("n", "classes"), [(3, 1), (7, 2), (9, 12)])
def test_reference_is_the_definition(n, classes, beta):
    z, labels = labeled(n, 4, classes, dtype=torch.float64).values()
    value = reference.h_scl(z, labels, temperature=0.3, beta=beta)
    assert value.item() == pytest.approx(by_loops(z, labels, 0.3, beta), rel=1e-12)


@pytest.mark.parametrize("classes", [1, 2, 12])
@pytest.mark.parametrize("beta", [0, 2])
def test_gradient_of_the_reference(classes, beta):
    z, labels = labeled(7, 3, classes, dtype=torch.float64).values()
    assert torch.autograd.gradcheck(
        lambda z: reference.h_scl(z, labels, temperature=0.3, beta=beta), z.requires_grad_()
    )


def test_gradient_with_constant_weights():
    z, labels = labeled(7, 3, 2, dtype=torch.float64).values()
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
