"""The references against double loops over their definitions, and autograd of them in fp64."""

import math

import pytest
import torch
from torch.nn import functional as F

from clae_fast import reference
from clae_fast.testing import projections


def similarity(a, b, temperature):
    return (F.normalize(a) @ F.normalize(b).T / temperature).tolist()


def nt_xent_by_loops(z0, z1, temperature):
    N = len(z0)
    z = torch.cat([z0, z1])
    s = similarity(z, z, temperature)
    rows = range(2 * N)
    losses = [
        -math.log(
            math.exp(s[i][(i + N) % (2 * N)]) / sum(math.exp(s[i][j]) for j in rows if j != i)
        )
        for i in rows
    ]
    return sum(losses) / len(losses)


def info_nce_by_loops(anchor, keys, temperature):
    s = similarity(anchor, keys, temperature)
    losses = [-math.log(math.exp(s[i][i]) / sum(map(math.exp, s[i]))) for i in range(len(anchor))]
    return sum(losses) / len(losses)


def uel_by_loops(z0, z1, temperature):
    N = len(z0)
    z = torch.cat([z0, z1])
    s = similarity(z, z, temperature)
    total = 0.0
    for i in range(2 * N):
        positive = (i + N) % (2 * N)
        denominator = sum(math.exp(s[i][j]) for j in range(2 * N) if j != i)
        for j in range(2 * N):
            p = math.exp(s[i][j]) / denominator
            if j == positive:
                total -= math.log(p)
            elif j != i:
                total -= math.log(1 - p)
    return total / (2 * N)


LOSSES = {
    "nt_xent": (reference.nt_xent, nt_xent_by_loops),
    "info_nce": (reference.info_nce, info_nce_by_loops),
    "uel": (reference.uel, uel_by_loops),
}
every_loss = pytest.mark.parametrize(("loss", "by_loops"), LOSSES.values(), ids=LOSSES)


@every_loss
@pytest.mark.parametrize("temperature", [0.5, 0.1])
@pytest.mark.parametrize("N", [2, 5])
def test_definition(loss, by_loops, N, temperature):
    z0, z1 = projections(N, 4, dtype=torch.float64)
    value = loss(z0, z1, temperature=temperature)
    assert value.item() == pytest.approx(by_loops(z0, z1, temperature), rel=1e-12)


def test_further_keys_are_negatives():
    anchor, keys = projections(6, 4, dtype=torch.float64)
    value = reference.info_nce(anchor[:3], keys, temperature=0.1)
    assert value.item() == pytest.approx(info_nce_by_loops(anchor[:3], keys, 0.1), rel=1e-12)


# the detached columns of uel make its gradient that of no function
@pytest.mark.parametrize("loss", [reference.nt_xent, reference.info_nce])
@pytest.mark.parametrize("noise", [None, 0.1])
def test_gradient(loss, noise):
    z0, z1 = (z.requires_grad_() for z in projections(5, 4, noise=noise, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda a, b: loss(a, b, temperature=0.2), (z0, z1))


def test_gradient_of_uel_is_that_of_constant_columns():
    z0, z1 = projections(4, 3, dtype=torch.float64)
    columns = F.normalize(torch.cat([z0, z1]))
    z = torch.cat([z0, z1]).requires_grad_()

    def by_rows(z):
        s = (F.normalize(z) @ columns.T / 0.2).masked_fill(
            torch.eye(8, dtype=torch.bool), -math.inf
        )
        p = s.softmax(1)
        positive = torch.eye(8, dtype=torch.bool).roll(4, 0)
        return -(p[positive].log().sum() + (1 - p[~positive]).log().sum()) / 8

    (expected,) = torch.autograd.grad(by_rows(z), z)
    leaves = [z0.requires_grad_(), z1.requires_grad_()]
    grads = torch.autograd.grad(reference.uel(*leaves, temperature=0.2), leaves)
    torch.testing.assert_close(torch.cat(grads), expected, rtol=1e-12, atol=1e-15)


@every_loss
def test_small_losses_keep_their_digits(loss, by_loops):
    # 1 - p of a well-separated pair is below fp32's spacing near 1
    z0 = torch.eye(6)
    z1 = torch.eye(6)
    value = loss(z0, z1, temperature=0.02)
    # of each row 10 negatives, in info_nce 5, each exp(-50) of the positive; uel counts them twice
    negatives = {"nt_xent": 10, "info_nce": 5, "uel": 20}[loss.__name__]
    assert value.item() == pytest.approx(negatives * math.exp(-50), rel=1e-5)


@every_loss
def test_half_precision_is_computed_in_fp32(loss, by_loops):
    z0, z1 = projections(5, 4, dtype=torch.bfloat16)
    assert loss(z0, z1) == loss(z0.float(), z1.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert loss(z0.float(), z1.float()) == loss(z0.float(), z1.float())
