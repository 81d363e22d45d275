"""ACSSL's reconstruction against its formulas, with every similarity in one matrix, in float64."""

import pytest
import torch
from queries import assert_resumes, batch, options
from queue_cases import QUEUE, Plain, assert_steps_equal, build
from torch.nn import functional as F

from clae_fast.methods.acssl import ACSSL

TEMPERATURE = 0.2


def acssl_loss(form, hard, margin, from_queue):
    """The two forms, with the hard negatives of a row sought among all."""

    def loss(z, keys, queue=None):
        u = F.normalize(z)
        positive = (u * keys).sum(1, keepdim=True)
        s = u @ (queue if from_queue else keys).T
        if not from_queue:
            s = s[~torch.eye(len(s), dtype=torch.bool)].view(len(s), -1)
        s = s.gather(1, s.detach().topk(hard).indices)
        if form == "triplet":
            return (1 + ((s - positive + margin) / TEMPERATURE).exp()).log().mean()
        logits = torch.cat([positive, s], 1) / TEMPERATURE
        return F.cross_entropy(logits, torch.zeros(len(s), dtype=torch.int64))

    return loss


CASES = [
    ("triplet", 1, 0.3, 0),
    ("triplet", 3, 0.0, QUEUE),
    ("softmax", 3, 0.0, 0),
    ("softmax", 2, 0.0, QUEUE),
]


@pytest.mark.parametrize(("form", "hard", "margin", "queue_size"), CASES)
@pytest.mark.parametrize("kind", ["none", "pair"])
def test_steps_equal_autograd(kind, form, hard, margin, queue_size):
    method = build(ACSSL, form=form, hard=hard, margin=margin, queue_size=queue_size)
    loss = acssl_loss(form, hard, margin, queue_size > 0)
    assert_steps_equal(method, Plain(method, loss), kind)


@pytest.mark.parametrize(("form", "hard", "margin", "queue_size"), CASES)
def test_loss_and_gradient(form, hard, margin, queue_size):
    method = build(ACSSL, form=form, hard=hard, margin=margin, queue_size=queue_size)
    z = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    (target,) = method.targets(batch(0), options())
    found = method.loss(z, target)
    expected = acssl_loss(form, hard, margin, queue_size > 0)(z, target.rows, method.queue)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    (dz,) = torch.autograd.grad(found, z)
    (reference,) = torch.autograd.grad(expected, z)
    torch.testing.assert_close(dz, reference, rtol=1e-9, atol=1e-13)


def test_resume():
    torch.manual_seed(1)
    method = build(ACSSL, hard=3)
    torch.manual_seed(2)
    assert_resumes(method, build(ACSSL, hard=3))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"queue_size": -1}, "queue_size must be at least 0, got -1"),
        ({"hard": 0}, "hard must be at least 1, got 0"),
        ({"hard": 21}, r"hard must be at most queue_size \(20\), got 21"),
        ({"form": "hinge"}, "form must be triplet or softmax, got 'hinge'"),
    ],
)
def test_bad_options(given, message):
    with pytest.raises(ValueError, match=message):
        build(ACSSL, **given)


def test_a_batch_too_small_to_mine():
    with pytest.raises(ValueError, match="hard must be below the 6 rows of a step, got 6"):
        build(ACSSL, queue_size=0, hard=6).step(batch(0), options())
