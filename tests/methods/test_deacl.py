"""DeACL against a plain float64 computation of its own, and with teachers that are runs."""

import copy

import processes
import pytest
import torch
from learning_cases import assert_learns
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
from torch import nn

from clae_fast import data
from clae_fast.attack import LinfAttack
from clae_fast.config.layers import resolve
from clae_fast.methods import DeACL
from clae_fast.steps.batch import Batch
from clae_fast.steps.options import StepOptions
from clae_fast.training.build import build_method
from clae_fast.training.encoders import FrozenEncoder, restore
from clae_fast.training.run_folder import RunFolder
from clae_fast.training.trainer import Trainer


def distance(a, b):
    return -((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).mean()


def teacher():
    """Other weights than the student's, in the mode in which nobody should run it."""
    with torch.random.fork_rng():
        torch.manual_seed(6)
        layers = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
        network = nn.Sequential(*layers, nn.Linear(144, 8))
        return FrozenEncoder(nn.Identity(), network, image_size=8).double()


def build(encoder, **options):
    return DeACL(encoder, teacher=teacher(), adversarial=True, **options)


def naive(built, x, options, weight):
    """The formula, left to autograd."""
    goal = copy.deepcopy(built.teacher).eval()(x).detach()
    held = copy.deepcopy(built.encoder).train(options.norm == "train")
    torch.manual_seed(7)
    x_adv = pgd(options, x, lambda x: distance(held(x), goal))
    z, z_adv = built.encoder(torch.cat((x, x_adv))).chunk(2)
    loss, adv_loss = distance(z, goal), distance(z_adv, z)
    (loss + weight * adv_loss).backward()
    return loss, adv_loss, x_adv


@modes
@pytest.mark.parametrize("steps", [1, 3])
def test_equals_autograd(start, norm, steps):
    built, (x, _) = build(warm_encoder(), gamma=3.0), views()
    built.train()
    other, options = copy.deepcopy(built), attack(steps, start, norm)
    torch.manual_seed(7)
    result = built.step(Batch((x,)), StepOptions(kind="pair", attack=options, adv_weight=WEIGHT))
    assert_same(built, result, other, naive(other, x, options, WEIGHT * 3))
    assert all(weight.grad is None for weight in built.teacher.parameters())


def test_without_an_attack():
    built, (x, _) = build(warm_encoder()), views()
    other = copy.deepcopy(built)
    result = built.step(Batch((x,)), StepOptions())
    loss = distance(other.encoder(x), other.teacher(x))
    loss.backward()
    assert_same(built, result, other, (loss, None, None))


def test_units():
    assert_units(lambda encoder: DeACL(encoder, teacher=copy.deepcopy(encoder)), 2)


@pytest.mark.parametrize("kind", ["none", "pair"])
def test_scale_and_chunks(kind):
    assert_options(build(without_norms()), kind, attack(), lambda: None)


def check_processes(world):
    assert_processes(world, build(without_norms()))


def test_two_processes_equal_one(tmp_path):
    processes.run(check_processes, 2, tmp_path)


def test_preset():
    settings = resolve({}, "deacl-cifar10").to_dict()
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
        "options": {"gamma": 2.0},
        "teacher": "runs/simclr-paper-cifar10",
        "optimizer": "sgd",
        "lr": 0.5,
        "weight_decay": 5e-4,
        "batch_size": 256,
        "epochs": 100,
        "head_layers": 0,
    }
    assert {name: settings[name] for name in expected} == expected


def test_bad_options():
    for gamma in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="gamma must be in"):
            build(without_norms(), gamma=gamma)
    with pytest.raises(ValueError, match="teacher must be given for deacl, got None"):
        resolve({"method": "deacl"})
    with pytest.raises(ValueError, match="views must be 1 for deacl, got 2"):
        build(without_norms()).step(Batch(views()), StepOptions())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A teacher, trained for as long as it takes to be worth learning from."""
    settings = {"device": "cpu", "image_size": 8, "epochs": 3, "attack": "none", "seed": 1}
    config = resolve(settings)
    folder = RunFolder.create(tmp_path_factory.mktemp("runs") / "teacher", config)
    Trainer(config).fit(folder)
    return folder


def test_learns(run):
    trainer = assert_learns(
        4,
        method="deacl",
        attack="pair",
        teacher=str(run.path),
        head_layers=0,
        attack_steps=2,
        attack_start="random",
        attack_norm="eval",
        step_size=0.04,
        crop_min_scale=0.8,
        batch_size=64,
        lr=6e-3,
        epochs=4,
    )
    whole, _ = restore(run, run.checkpoint)
    found = trainer.method.teacher.state_dict()
    for name, value in whole.backbone.state_dict().items():
        assert torch.equal(found[f"backbone.{name}"], value), name
    assert not any(layer.training for layer in trainer.method.teacher.modules())
    # the student sees new images as the teacher does, attacked ones too
    transform = data.eval_transform(8)
    x = torch.stack([transform(trainer.test[i]) for i in range(64)])
    goal, student = trainer.method.teacher(x), trainer.method.encoder.eval()
    x_adv = pgd(LinfAttack(eps=0.06, steps=2), x, lambda x: distance(student(x), goal))
    fresh = build_method(trainer.config).encoder.eval()
    with torch.no_grad():
        clean, robust, before = (
            -distance(f(seen), goal) for f, seen in ((student, x), (student, x_adv), (fresh, x))
        )
    assert clean > 0.9
    assert robust > 0.85
    assert before < 0.7, (clean, robust, before)


def test_a_teacher_of_other_features(run):
    settings = {"method": "deacl", "teacher": str(run.path), "device": "cpu", "image_size": 8}
    with pytest.raises(ValueError, match=r"64 features and the encoder 32.* set proj_dim to 64"):
        build_method(resolve(settings | {"proj_dim": 32}))
    assert build_method(resolve(settings | {"proj_dim": 64})).encoder.head[0].in_features == 64
