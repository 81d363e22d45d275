"""RoCL against a plain float64 computation of its own: loss, attack, gradients, statistics."""

import copy

import processes
import pytest
import torch
from robust import (
    WEIGHT,
    assert_options,
    assert_processes,
    assert_same,
    assert_units,
    attack,
    modes,
    pgd,
    warm_encoder,
    without_norms,
)
from step_cases import views
from torch.nn import functional as F

from clae_fast import nt_xent
from clae_fast.config.layers import resolve
from clae_fast.distributed import World
from clae_fast.methods import RoCL
from clae_fast.steps.batch import Batch
from clae_fast.steps.options import StepOptions

T = 0.5


def ntx(*z):
    """The definition: ordered pairs of views, all other rows as constants in the denominator."""
    count, n = len(z), len(z[0])
    u = F.normalize(torch.cat(z))
    logits = (u @ u.detach().T / T).masked_fill(torch.eye(count * n, dtype=torch.bool), -torch.inf)
    log_p = logits.log_softmax(1)
    total = 0
    for a in range(count):
        for b in range(count):
            if a != b:
                total = total - log_p[a * n : (a + 1) * n, b * n : (b + 1) * n].diagonal().sum()
    return total / (count * n)


def naive(encoder, x_p, x_q, options, weight):
    """The formula, left to autograd."""
    held = copy.deepcopy(encoder).train(options.norm == "train")
    z_q = held(x_q).detach()
    torch.manual_seed(7)
    x_adv = pgd(options, x_p, lambda x: ntx(held(x), z_q))
    p, q, adv = encoder(torch.cat((x_p, x_q, x_adv))).chunk(3)
    loss, adv_loss = ntx(p, q, adv), ntx(adv, q)
    (loss + weight * adv_loss).backward()
    return loss, adv_loss, x_adv


@modes
@pytest.mark.parametrize("steps", [1, 3])
def test_equals_autograd(start, norm, steps):
    encoder, x = warm_encoder(), views()
    other, options = copy.deepcopy(encoder), attack(steps, start, norm)
    torch.manual_seed(7)
    built = RoCL(encoder, adversarial=True, reg_weight=0.3)
    result = built.step(Batch(x), StepOptions(kind="pair", attack=options, adv_weight=WEIGHT))
    assert_same(encoder, result, other, naive(other, *x, options, WEIGHT * 0.3))


def test_without_an_attack():
    encoder, x = warm_encoder(), views()
    other = copy.deepcopy(encoder)
    result = RoCL(encoder).step(Batch(x), StepOptions())
    loss = ntx(*other(torch.cat(x)).chunk(2))
    loss.backward()
    assert_same(encoder, result, other, (loss, None, None))
    # of the value of NT-Xent, but not of its gradient
    z = [row.detach().requires_grad_() for row in other(torch.cat(x)).chunk(2)]
    torch.testing.assert_close(ntx(*z), nt_xent(*z, temperature=T), rtol=1e-12, atol=0)
    (dz,) = torch.autograd.grad(ntx(*z), z[:1])
    (whole,) = torch.autograd.grad(nt_xent(*z, temperature=T), z[:1])
    assert not torch.allclose(dz, whole)


def test_units():
    assert_units(lambda encoder: RoCL(encoder, adversarial=True), 2)


@pytest.mark.parametrize("kind", ["none", "pair"])
def test_scale_and_chunks(kind):
    built = RoCL(without_norms(), adversarial=True)
    assert_options(built, kind, attack(), lambda: None)


def check_processes(world):
    assert_processes(world, RoCL(without_norms(), adversarial=True, reg_weight=0.3))


def test_two_processes_equal_one(tmp_path):
    processes.run(check_processes, 2, tmp_path)


def test_labels_of_several_processes():
    """Rows of a process lie together, a view after the other."""

    class Two(World):
        def gather(self, z):
            return torch.cat((z, self.theirs))

    z = torch.randn(2, 2, 3, 4, generator=torch.Generator().manual_seed(5)).double()
    world = Two(0, 2, 0, torch.device("cpu"))
    object.__setattr__(world, "theirs", z[1].reshape(6, 4))
    found = RoCL(without_norms())._loss(z[0].reshape(6, 4), 2, world)
    expected = ntx(torch.cat((z[0, 0], z[1, 0])), torch.cat((z[0, 1], z[1, 1])))
    torch.testing.assert_close(found, expected)


def test_there_is_no_twin():
    built = RoCL(without_norms(), adversarial=True)
    assert built.adv_encoder is None
    assert all(name.startswith("encoder.") for name in built.state_dict())
    with pytest.raises(ValueError, match=r"needs an attack$"):
        built.step(Batch(views()), StepOptions(kind="pair"))
    with pytest.raises(ValueError, match="kind must be none or pair for rocl, got 'self'"):
        built.step(Batch(views()), StepOptions(kind="self", attack=attack()))


def test_preset():
    settings = resolve({}, "rocl-cifar10").to_dict()
    expected = {
        "dataset": "cifar10",
        "attack": "pair",
        "attack_start": "random",
        "attack_norm": "eval",
        "arch": "resnet18",
        "schedule": "cosine",
        "warmup_epochs": 10,
        "eps": 0.0314,
        "step_size": 0.007,
        "attack_steps": 7,
        "options": {"reg_weight": 1 / 256},
        "temperature": 0.5,
        "optimizer": "lars",
        "weight_decay": 1e-6,
        "batch_size": 512,
        "epochs": 1000,
        "hidden_dim": 2048,
        "proj_dim": 128,
        "mean": (0.0, 0.0, 0.0),
        "std": (1.0, 1.0, 1.0),
    }
    assert {name: settings[name] for name in expected} == expected


def test_bad_options():
    for weight in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="reg_weight must be in"):
            RoCL(without_norms(), reg_weight=weight)
    with pytest.raises(ValueError, match="options: rocl has no 'lambda', it has reg_weight"):
        resolve({"method": "rocl", "options": {"lambda": 256.0}})
