"""MoCHi: synthetic negatives by scalars against explicit vectors, in float64."""

import pytest
import torch
from queries import assert_preset, assert_resumes, batch, options
from queue_cases import MOCO_V2, QUEUE_V2, Plain, assert_steps_equal, build
from synthetic_cases import HARD, PAIRS, WITH_QUERY, hardest, pick, softmax_loss
from torch.nn import functional as F

from clae_fast.methods.mochi import MoCHi
from clae_fast.methods.moco import MoCo


def mochi(**others):
    counts = {"hard": HARD, "pairs": PAIRS, "with_query": WITH_QUERY}
    return build(MoCHi, **{"warmup": 0.0, **counts, **others})


def mochi_loss(z, keys, queue, pairs=PAIRS, with_query=WITH_QUERY):
    """The definition: vectors of unit length, constants, drawn as the method draws them."""
    u = F.normalize(z)
    n = hardest(u, queue)
    i, j, k = (torch.randint(HARD, (len(u), count)) for count in (pairs, pairs, with_query))
    alpha = torch.empty(len(u), pairs, 1, dtype=z.dtype).uniform_(0, 1)
    beta = torch.empty(len(u), with_query, 1, dtype=z.dtype).uniform_(0, 0.5)
    between = F.normalize(alpha * pick(n, i) + (1 - alpha) * pick(n, j), dim=2)
    near = F.normalize(beta * u.detach()[:, None] + (1 - beta) * pick(n, k), dim=2)
    return softmax_loss(u, keys, queue, [between, near])


@pytest.mark.parametrize("kind", ["none", "pair"])
def test_steps_equal_autograd(kind):
    method = mochi()
    assert_steps_equal(method, Plain(method, mochi_loss), kind)


@pytest.mark.parametrize(("pairs", "with_query"), [(0, 6), (6, 0), (7, 2)])
def test_loss_and_gradient(pairs, with_query):
    method = mochi(pairs=pairs, with_query=with_query)
    z = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    (target,) = method.targets(batch(0), options())
    torch.manual_seed(3)
    found = method.loss(z, target)
    torch.manual_seed(3)
    expected = mochi_loss(z, target.rows, method.queue, pairs, with_query)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    (dz,) = torch.autograd.grad(found, z)
    (reference,) = torch.autograd.grad(expected, z)
    torch.testing.assert_close(dz, reference, rtol=1e-9, atol=1e-13)
    u = F.normalize(z)
    assert (method.negatives(u) > MoCo.negatives(method, u)).all()


def test_warm_up():
    method = mochi(warmup=0.25)
    z = torch.randn(6, 8, dtype=torch.float64)
    (target,) = method.targets(batch(0), options())
    phases = []
    for progress in (0.0, 0.24, 0.25, 0.9):
        method.before_step(progress)
        phases.append(method.phase)
        u = F.normalize(z)
        plain = torch.equal(method.negatives(u), MoCo.negatives(method, u))
        assert plain == (method.phase == "")
        assert method.loss(z, target).isfinite()
    assert phases == ["", "", "synthetic", "synthetic"]


def test_resume():
    torch.manual_seed(1)
    method = mochi(warmup=0.4)
    torch.manual_seed(2)
    assert_resumes(method, mochi(warmup=0.4))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"queue_size": 0}, "queue_size must be at least 1, got 0"),
        ({"hard": 0}, "hard must be at least 1, got 0"),
        ({"hard": 21}, r"hard must be at most queue_size \(20\), got 21"),
        ({"pairs": -1}, "pairs must be at least 0, got -1"),
        ({"pairs": 0, "with_query": 0}, r"pairs \+ with_query must be at least 1, got 0"),
        ({"warmup": 2.0}, r"warmup must be in \[0, 1\], got 2.0"),
    ],
)
def test_bad_options(given, message):
    with pytest.raises(ValueError, match=message):
        mochi(**given)


def test_preset():
    own = QUEUE_V2 | {"hard": 32, "pairs": 16, "with_query": 16, "warmup": 0.1}
    assert_preset("mochi-imagenet", MOCO_V2 | {"method": "mochi"}, own)
