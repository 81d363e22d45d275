"""ACL against a plain float64 computation of its own: loss, attack, gradients, statistics."""

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
from step_cases import randomize_norms, views
from torch import nn
from torch.nn import functional as F

from clae_fast.config.layers import resolve
from clae_fast.methods import ACL
from clae_fast.nn import Encoder, ProjectionHead, build_encoder
from clae_fast.steps.batch import Batch
from clae_fast.steps.options import StepOptions

T = 0.5


def ntx(z):
    """NT-Xent of two views, one below the other."""
    u = F.normalize(z)
    logits = (u @ u.T / T).masked_fill(torch.eye(len(z), dtype=torch.bool), -torch.inf)
    return F.cross_entropy(logits, torch.arange(len(z)).roll(len(z) // 2))


def dual():
    """The method over an encoder whose twin differs from it."""
    built = ACL(warm_encoder(), adversarial=True)
    randomize_norms(built.adv_encoder, torch.Generator().manual_seed(9))
    return built


def naive(built, x, options, weight):
    """The formula, left to autograd."""
    held = copy.deepcopy(built.adv_encoder).train(options.norm == "train")
    torch.manual_seed(7)
    x_adv = pgd(options, x, lambda x: ntx(held(x)))
    loss, adv_loss = ntx(built.encoder(x)), ntx(built.adv_encoder(x_adv))
    ((loss + weight * adv_loss) / 2).backward()
    return loss, adv_loss, x_adv


@modes
@pytest.mark.parametrize("steps", [1, 3])
def test_equals_autograd(start, norm, steps):
    built, x = dual(), views()
    other, options = copy.deepcopy(built), attack(steps, start, norm)
    torch.manual_seed(7)
    result = built.step(Batch(x), StepOptions(kind="pair", attack=options, adv_weight=WEIGHT))
    assert_same(built, result, other, naive(other, torch.cat(x), options, WEIGHT))
    # both views are attacked
    assert (result.x_adv - torch.cat(x)).abs().amax((1, 2, 3)).min() > 0.02


def test_without_an_attack():
    built, x = ACL(warm_encoder()), views()
    other = copy.deepcopy(built)
    result = built.step(Batch(x), StepOptions())
    loss = ntx(other.encoder(torch.cat(x)))
    loss.backward()
    assert_same(built, result, other, (loss, None, None))


def test_the_head_has_batchnorm_of_its_own():
    backbone, features = build_encoder("resnet-narrow", 8)
    head = ProjectionHead(features, 12, 8, layers=3, norm="all")
    built = ACL(Encoder(backbone, head), adversarial=True)
    heads = (built.encoder.head, built.adv_encoder.head)
    for own, twin in zip(*(head.modules() for head in heads), strict=True):
        if isinstance(own, nn.BatchNorm1d):
            assert own.weight is not twin.weight
            assert own.momentum == twin.momentum == 0.1
        if isinstance(own, nn.Linear):
            assert own.weight is twin.weight


def test_units():
    assert_units(lambda encoder: ACL(encoder, adversarial=True), 4)


@pytest.mark.parametrize("kind", ["none", "pair"])
def test_scale_and_chunks(kind):
    assert_options(ACL(without_norms(), adversarial=True), kind, attack(), lambda: None)


def check_processes(world):
    assert_processes(world, ACL(without_norms(), adversarial=True))


def test_two_processes_equal_one(tmp_path):
    processes.run(check_processes, 2, tmp_path)


def test_preset():
    settings = resolve({}, "acl-cifar10").to_dict()
    expected = {
        "dataset": "cifar10",
        "attack": "pair",
        "attack_start": "random",
        "attack_norm": "eval",
        "arch": "resnet18",
        "schedule": "cosine",
        "warmup_epochs": 10,
        "eps": 8 / 255,
        "step_size": 2 / 255,
        "attack_steps": 5,
        "options": {},
        "temperature": 0.5,
        "optimizer": "lars",
        "lr": 5.0,
        "weight_decay": 1e-6,
        "batch_size": 512,
        "epochs": 1000,
        "head_layers": 3,
        "head_norm": "all",
        "mean": (0.0, 0.0, 0.0),
        "std": (1.0, 1.0, 1.0),
    }
    assert {name: settings[name] for name in expected} == expected


def test_needs_its_twin():
    with pytest.raises(ValueError, match="needs an attack and a method built with adversarial"):
        ACL(without_norms()).step(Batch(views()), StepOptions(kind="pair", attack=attack()))
