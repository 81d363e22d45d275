"""SynCo: six kinds of synthetic negatives by scalars against explicit vectors, in float64."""

import pytest
import torch
from queries import assert_preset, assert_resumes, batch, options
from queue_cases import MOCO_V2, QUEUE_V2, Plain, assert_steps_equal, build
from synthetic_cases import HARD, hardest, pick, softmax_loss
from torch.nn import functional as F

from clae_fast.methods.synco import SynCo

COUNTS = {
    "interpolated": 4,
    "extrapolated": 3,
    "pairs": 5,
    "noised": 2,
    "moved": 3,
    "signed": 2,
}
# large, so that each matters
LENGTHS = {"sigma": 0.2, "delta": 0.3, "eta": 0.1}


def synco(**others):
    return build(SynCo, **{"warmup": 0.0, "hard": HARD, **COUNTS, **LENGTHS, **others})


def synco_loss(z, keys, queue, **given):
    """The definition: vectors of unit length, constants, drawn as the method draws them."""
    counts = {**COUNTS, **given}
    u = F.normalize(z)
    n, q = hardest(u, queue), u.detach()[:, None]
    of = {kind: pick(n, torch.randint(HARD, (len(u), count))) for kind, count in counts.items()}

    def uniform(kind, low, high):
        return torch.empty(len(u), counts[kind], 1, dtype=z.dtype).uniform_(low, high)

    a = uniform("interpolated", 0, 0.5)
    b = 1 - uniform("extrapolated", -0.5, 0)
    c = uniform("pairs", 0, 1)
    other = pick(n, torch.randint(HARD, (len(u), counts["pairs"])))
    noise = LENGTHS["sigma"] * torch.randn(of["noised"].shape, dtype=z.dtype)
    synthetic = [
        a * q + (1 - a) * of["interpolated"],
        q + b * (of["extrapolated"] - q),
        c * of["pairs"] + (1 - c) * other,
        of["noised"] + noise,
        of["moved"] + LENGTHS["delta"] * q,
        of["signed"] + LENGTHS["eta"] * q.sign(),
    ]
    return softmax_loss(u, keys, queue, [F.normalize(h, dim=2) for h in synthetic])


@pytest.mark.parametrize("kind", ["none", "pair"])
def test_steps_equal_autograd(kind):
    method = synco()
    assert_steps_equal(method, Plain(method, synco_loss), kind)


@pytest.mark.parametrize("only", COUNTS)
def test_loss_and_gradient_of_each_kind(only):
    counts = {kind: 6 if kind == only else 0 for kind in COUNTS}
    method = synco(**counts)
    z = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    (target,) = method.targets(batch(0), options())
    torch.manual_seed(3)
    found = method.loss(z, target)
    torch.manual_seed(3)
    expected = synco_loss(z, target.rows, method.queue, **counts)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    (dz,) = torch.autograd.grad(found, z)
    (reference,) = torch.autograd.grad(expected, z)
    torch.testing.assert_close(dz, reference, rtol=1e-9, atol=1e-13)


def test_resume():
    torch.manual_seed(1)
    method = synco(warmup=0.4)
    torch.manual_seed(2)
    assert_resumes(method, synco(warmup=0.4))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"noised": -1}, "noised must be at least 0, got -1"),
        (dict.fromkeys(COUNTS, 0), r"interpolated \+ .* \+ signed must be at least 1, got 0"),
        ({"hard": 21}, r"hard must be at most queue_size \(20\), got 21"),
    ],
)
def test_bad_options(given, message):
    with pytest.raises(ValueError, match=message):
        synco(**given)


def test_preset():
    counts = dict.fromkeys(("interpolated", "extrapolated", "pairs"), 256)
    counts |= dict.fromkeys(("noised", "moved", "signed"), 64)
    lengths = dict.fromkeys(("sigma", "delta", "eta"), 0.01)
    own = QUEUE_V2 | {"hard": 1024, "warmup": 10 / 200} | counts | lengths
    assert_preset("synco-imagenet", MOCO_V2 | {"method": "synco"}, own)
