"""Methods: their losses, the gradient the self attack follows, their state, and room for others."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import clae_fast
from clae_fast.attack import LinfAttack
from clae_fast.methods import METHODS, UEL, PairMethod, Plain, SimCLR
from clae_fast.steps.batch import Batch
from clae_fast.steps.options import StepOptions

PAIRS = ("simclr", "plain", "uel")


def embeddings(n=7, dim=5):
    generator = torch.Generator().manual_seed(4)
    return torch.randn(2, n, dim, generator=generator, dtype=torch.float64).unbind()


def network():
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)
        )


def views():
    return torch.rand(2, 6, 3, 6, 6, generator=torch.Generator().manual_seed(6)).unbind()


def test_registry():
    assert {SimCLR, Plain, UEL} <= set(METHODS.values())
    assert all(cls.name == name for name, cls in METHODS.items())
    for cls in (SimCLR, Plain, UEL):
        again = cls is Plain
        assert cls.reforward_anchor == again
        assert cls.units == {"none": 6, "pair": 9, "self": 11, "released": 18 if again else 15}
        assert cls.own_options() == {}


@pytest.mark.parametrize(
    ("name", "op", "temperature"),
    [("simclr", "nt_xent", 0.5), ("plain", "info_nce", 0.1), ("uel", "uel", 0.1)],
)
def test_losses_are_the_ops_at_the_papers_temperatures(name, op, temperature):
    z_a, z_b = embeddings()
    op = getattr(clae_fast, op)
    built = METHODS[name](network())
    assert torch.equal(built.loss(z_a, z_b), op(z_a, z_b, temperature=temperature))
    built = METHODS[name](network(), temperature=0.3)
    assert torch.equal(built.loss(z_a, z_b), op(z_a, z_b, temperature=0.3))


@pytest.mark.parametrize("name", PAIRS)
def test_attack_gradient_is_that_of_the_second_operand(name):
    z, _ = embeddings()
    built = METHODS[name](network())
    z_b = z.clone().requires_grad_()
    (expected,) = torch.autograd.grad(built.loss(z, z_b), z_b)
    given = z.clone().requires_grad_()
    with torch.no_grad():
        dz = built.attack_grad(given)
    assert not dz.requires_grad
    torch.testing.assert_close(dz, expected, rtol=1e-10, atol=1e-14)
    # at the tip of the positive similarity only negatives are left, and those lie on the sphere
    torch.testing.assert_close((dz * z).sum(1), torch.zeros(7).double(), rtol=0, atol=1e-12)
    assert dz.norm() > 0.01


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("kind", ["none", "pair", "self"])
def test_every_attack_runs_and_a_step_lowers_the_loss(name, kind):
    built = METHODS[name](network(), adversarial=kind != "none")
    optimizer = torch.optim.SGD(built.parameters(), lr=0.05)
    attack = LinfAttack(eps=8 / 255, lo=0.0, hi=1.0)
    totals = []
    for _ in range(4):
        optimizer.zero_grad()
        result = built.step(Batch(views()), StepOptions(kind=kind, attack=attack))
        assert all(weight.grad is not None for weight in built.parameters())
        optimizer.step()
        built.after_step()
        totals.append(result.loss + (result.adv_loss or 0))
    assert totals[-1] < totals[0]


def test_state_is_all_there_is():
    attack = LinfAttack(eps=8 / 255)
    trained = SimCLR(network(), adversarial=True)
    for _ in range(2):
        trained.step(Batch(views()), StepOptions(kind="pair", attack=attack))
    with torch.no_grad():
        for weight in trained.parameters():
            weight -= 0.1 * weight.grad
    fresh = SimCLR(network(), adversarial=True)
    fresh.load_state_dict(copy.deepcopy(trained.state_dict()))
    trained.zero_grad()
    one = trained.step(Batch(views()), StepOptions(kind="pair", attack=attack))
    two = fresh.step(Batch(views()), StepOptions(kind="pair", attack=attack))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert fresh.encoder[0].weight is fresh.adv_encoder[0].weight
    assert fresh.adv_encoder[1].num_batches_tracked == 3


def test_without_attacks_there_is_no_twin():
    built = SimCLR(network())
    assert built.adv_encoder is None
    assert set(built.state_dict()) == {f"encoder.{key}" for key in network().state_dict()}
    assert len(list(built.parameters())) == 6
    assert len(list(SimCLR(network(), adversarial=True).parameters())) == 8


def test_a_method_with_state_of_its_own_fits():
    """A momentum encoder and a bank, updated by the hook, checkpointed like everything else."""

    class Bank(PairMethod):
        name = "bank"

        def __init__(self, encoder):
            super().__init__(encoder, temperature=0.2, adversarial=True)
            self.slow = copy.deepcopy(encoder).requires_grad_(False)
            self.register_buffer("bank", F.normalize(embeddings()[0].float()))

        def loss(self, z_a, z_b, context):
            keys = torch.cat([z_b, self.bank])
            return clae_fast.info_nce(z_a, keys, temperature=self.temperature)

        def after_step(self):
            for slow, fast in zip(self.slow.parameters(), self.encoder.parameters(), strict=True):
                slow.lerp_(fast.detach(), 0.5)
            self.bank = self.bank.roll(1, 0)

    built = Bank(network())
    for kind in ("none", "pair", "self"):
        result = built.step(Batch(views()), StepOptions(kind=kind, attack=LinfAttack(eps=0.03)))
        assert result.loss.isfinite()
    before = copy.deepcopy(built.state_dict())
    with torch.no_grad():
        built.encoder[0].weight += 1
    built.after_step()
    assert {"bank", "slow.0.weight", "adv_encoder.1.weight"} <= built.state_dict().keys()
    torch.testing.assert_close(built.slow[0].weight, before["slow.0.weight"] + 0.5)
    assert torch.equal(built.bank[1], before["bank"][0])


def test_bad_temperatures():
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="temperature must be positive"):
            SimCLR(network(), temperature=temperature)
