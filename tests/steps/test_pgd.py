"""Attacks of several steps in the schedules: against plain autograd, by units, by their traces."""

import copy
from contextlib import contextmanager

import processes
import pytest
import torch
from step_cases import (
    WEIGHT,
    SavedBytes,
    assert_same,
    encoders,
    flops,
    method,
    norm_buffers,
    resnet,
    views,
    without_norms,
)
from torch import nn

from clae_fast import nt_xent
from clae_fast.attack import LinfAttack
from clae_fast.distributed import World
from clae_fast.methods import SimCLR
from clae_fast.methods.moco import MoCo
from clae_fast.nn import Encoder, ProjectionHead, adversarial_twin, build_encoder
from clae_fast.nn.resnet import narrow_resnet
from clae_fast.steps.batch import Batch
from clae_fast.steps.options import StepOptions
from clae_fast.steps.passes import frozen
from clae_fast.steps.schedules import query_step, released_step, self_step

both_attacks = pytest.mark.parametrize("kind", ["pair", "self"])
MODES = [("view", "train"), ("random", "train"), ("view", "eval"), ("random", "eval")]
modes = pytest.mark.parametrize(("start", "norm"), MODES)


def attack(steps: int = 3, start: str = "view", norm: str = "train") -> LinfAttack:
    return LinfAttack(eps=0.05, step_size=0.03, lo=0.0, hi=1.0, steps=steps, start=start, norm=norm)


def run(kind: str, pair, x, **options):
    options = {"adv_weight": WEIGHT, **options}
    return method("simclr", pair).step(Batch(x), StepOptions(kind=kind, **options))


def warm(pair: nn.ModuleList) -> nn.ModuleList:
    """Running statistics that are those of images."""
    with torch.no_grad():
        for encoder in pair:
            for _ in range(20):
                encoder(views(12)[0])
    return pair


def naive(kind, pair, x_p, x_q, loss, attack, weight):
    """Projected gradient descent on the formula, left to autograd."""
    held = copy.deepcopy(pair)
    encoder = held[0 if kind == "pair" else 1]
    x_0 = x_q if kind == "pair" else x_p
    modes = {True: encoder.train, False: encoder.eval}
    # the pair attack's anchor is that of training, and it comes after the clean pair
    modes[kind == "pair" or attack.norm == "train"]()
    anchor = encoder(x_p).detach()
    if kind == "pair":
        encoder(x_q)
    modes[attack.norm == "train"]()
    torch.manual_seed(7)
    x = attack.random_start(x_0) if attack.start == "random" else x_0
    for _ in range(attack.steps):
        x = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(loss(anchor, encoder(x)), x)
        x = attack.step(x.detach(), dx, x_0)
    z_p = pair[0](x_p)
    clean, adv = loss(z_p, pair[0](x_q)), loss(z_p, pair[1](x))
    (clean + weight * adv).backward()
    return clean, adv, x


@both_attacks
@modes
@pytest.mark.parametrize("steps", [1, 3])
def test_equals_autograd(kind, start, norm, steps):
    pair, x = warm(encoders()), views()
    other = copy.deepcopy(pair)
    loss = method("simclr", pair).loss
    expected = naive(kind, other, *x, loss, attack(steps, start, norm), WEIGHT)
    torch.manual_seed(7)
    result = run(kind, pair, x, attack=attack(steps, start, norm))
    assert_same(pair, result, other, expected)
    for name, buffer in norm_buffers(other).items():
        torch.testing.assert_close(norm_buffers(pair)[name], buffer, rtol=1e-12, atol=1e-15)
    assert all(module.training for module in pair.modules())
    moved = (result.x_adv - (x[1] if kind == "pair" else x[0])).abs().max()
    assert 0.03 <= moved <= 0.05


@both_attacks
def test_every_option_counts(kind):
    """The comparison can fail: steps, start and mode give different adversarial views."""
    x = views()
    found = []
    for steps, start, norm in [(2, "view", "train"), (3, "view", "train"), (2, "random", "train")]:
        torch.manual_seed(7)
        result = run(kind, warm(encoders()), x, attack=attack(steps, start, norm))
        found.append(result.x_adv)
    found.append(run(kind, warm(encoders()), x, attack=attack(2, "view", "eval")).x_adv)
    for i, a in enumerate(found):
        assert not any(torch.equal(a, b) for b in found[:i])


@both_attacks
@modes
def test_a_further_step_knows_the_attacked_rows_alone(kind, start, norm):
    """With the adversarial view in the clean one's place, where no trained pass gives a step."""
    pair, x = warm(encoders()), views()
    held = copy.deepcopy(pair)
    m = 3
    torch.manual_seed(7)
    options = {"adv_replace": True, "adv_fraction": 0.5}
    result = run(kind, pair, x, attack=attack(2, start, norm), **options)
    encoder = held[0 if kind == "pair" else 1]
    x_0 = (x[1] if kind == "pair" else x[0])[:m]
    encoder.train(kind == "pair" or norm == "train")
    anchor = encoder(x[0])[:m] if kind == "pair" else encoder(x[0][:m])
    encoder.train(norm == "train")
    torch.manual_seed(7)
    x_t = attack(2, start, norm).begin(x_0)
    for _ in range(2):
        x_t = x_t.clone().requires_grad_()
        (dx,) = torch.autograd.grad(SimCLR(encoder).loss(anchor.detach(), encoder(x_t)), x_t)
        x_t = attack().step(x_t.detach(), dx, x_0)
    assert torch.equal(result.x_adv, x_t)


def test_the_first_step_of_a_fraction_is_the_whole_pairs():
    pair, x = encoders(), views()
    held = copy.deepcopy(pair)
    one = run("pair", copy.deepcopy(pair), x, attack=attack(1)).x_adv[:3]
    result = run("pair", pair, x, attack=attack(2), adv_fraction=0.5)
    anchor = held[0](x[0]).detach()[:3]
    x_1 = one.clone().requires_grad_()
    (dx,) = torch.autograd.grad(SimCLR(held[0]).loss(anchor, held[0](x_1)), x_1)
    assert torch.equal(result.x_adv, attack().step(one, dx, x[1][:3]))


@both_attacks
@pytest.mark.parametrize("norm", ["train", "eval"])
def test_chunks_equal_the_whole_batch(kind, norm):
    pair, x = without_norms(), views()
    other = copy.deepcopy(pair)
    for modules, micro_batch in ((pair, 4), (other, None)):
        torch.manual_seed(7)
        options = {"attack": attack(3, "random", norm), "micro_batch": micro_batch}
        modules.result = run(kind, modules, x, **options)
    assert torch.equal(pair.result.x_adv, other.result.x_adv)
    for weight, reference in zip(pair.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(weight.grad, reference.grad, rtol=1e-12, atol=1e-14)


@pytest.fixture(scope="module")
def resnet18():
    backbone, features = resnet(build_encoder, "resnet18", 8)
    encoder = Encoder(backbone, ProjectionHead(features, 512, 64))
    x = views(5, 8, torch.float32)
    return encoder, x, flops(lambda: SimCLR(encoder).step(Batch(x), StepOptions()))


@pytest.mark.parametrize(
    ("kind", "attack", "options", "units"),
    [
        ("pair", attack(3), {}, 13),
        ("pair", attack(3, "random"), {}, 15),
        ("pair", attack(3, "view", "eval"), {}, 15),
        ("pair", attack(1, "random", "eval"), {}, 11),
        ("pair", attack(3), {"adv_fraction": 0.4}, 6 + 0.4 * 7),
        ("pair", attack(3), {"adv_replace": True}, 12),
        ("pair", attack(3), {"micro_batch": 3}, 12 + 6),
        ("self", attack(3), {}, 15),
        ("self", attack(3, "view", "eval"), {}, 15),
        ("self", attack(3, "random"), {}, 16),
        ("self", attack(3, "random"), {"adv_replace": True}, 13),
    ],
)
def test_units(resnet18, kind, attack, options, units):
    """No step computes a weight's gradient."""
    encoder, x, plain = resnet18
    built = SimCLR(encoder, adversarial=True)
    options = StepOptions(kind=kind, attack=attack, **options)
    ratio = flops(lambda: built.step(Batch(x), options)) / plain
    assert 6 * ratio == pytest.approx(units, rel=0.01)
    cost = SimCLR.cost(options)
    assert cost.units(chunks=options.micro_batch is not None) == pytest.approx(units)


@both_attacks
@pytest.mark.parametrize(("start", "norm"), [("view", "train"), ("random", "eval")])
def test_peak_of_saved_activations(kind, start, norm):
    backbone, features = resnet(narrow_resnet, width=16)
    encoder = Encoder(backbone, ProjectionHead(features, 32, 16))
    built, x = SimCLR(encoder, adversarial=True), Batch(views(8, 16, torch.float32))
    peaks = []
    for which in ("none", kind):
        saved = SavedBytes(built)
        with saved:
            built.step(x, StepOptions(kind=which, attack=attack(3, start, norm)))
        assert saved.live == 0
        peaks.append(saved.peak)
    assert peaks[1] <= 1.02 * peaks[0]


def test_eval_mode_is_left_as_it_was_found():
    module = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(nn.Dropout(), nn.BatchNorm2d(3)))
    module[1].eval()
    module[0].weight.requires_grad_(False)

    @contextmanager
    def states():
        before = [layer.training for layer in module.modules()]
        yield
        assert [layer.training for layer in module.modules()] == before
        assert [weight.requires_grad for weight in module.parameters()] == [False] + 3 * [True]
        assert all(layer.track_running_stats for layer in (module[0], module[1][1]))

    for norm in ("train", "eval"):
        with states():
            with frozen(module, norm):
                assert module[0].training == (norm == "train")
                assert not module[1].training
                assert not any(weight.requires_grad for weight in module.parameters())
            with pytest.raises(KeyError), frozen(module, norm):
                raise KeyError


def test_random_layers_are_refused_only_where_one_pass_stands_for_two():
    x = views(4, 4)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.Dropout(0.5)).double()
    twin = adversarial_twin(encoder)
    for start, norm in MODES:
        options = {"attack": attack(2, start, norm), "attack_grad": lambda z: z}
        if (start, norm) == ("view", "train"):
            with pytest.raises(ValueError, match="use the pair attack"):
                self_step(encoder, twin, *x, nt_xent, **options)
        else:
            self_step(encoder, twin, *x, nt_xent, **options)


def test_the_released_order_has_one_step():
    pair, x = encoders(), views()
    for options in (attack(2), attack(1, "random"), attack(1, "view", "eval")):
        with pytest.raises(ValueError, match="an attack of one step, from the view"):
            released_step(*pair, *x, nt_xent, attack=options)


def check_processes(world):
    """W processes attack with the loss over all rows, as one does."""
    size = world.size
    x = views(4 * size)
    for kind in ("pair", "self"):
        for options in (attack(3), attack(2, "view", "eval")):
            pair, other = without_norms(), without_norms()
            other.load_state_dict(pair.state_dict())
            own = tuple(world.own_rows(view) for view in x)
            result = run(kind, pair, own, attack=options, world=world)
            expected = run(kind, other, x, attack=options, world=World.single())
            assert torch.equal(result.x_adv, world.own_rows(expected.x_adv))
            for weight, reference in zip(pair.parameters(), other.parameters(), strict=True):
                total = world.all_reduce(weight.grad.clone())
                torch.testing.assert_close(total, reference.grad, rtol=1e-9, atol=1e-12)


def test_several_processes(tmp_path):
    processes.run(check_processes, 2, tmp_path)


@modes
def test_queries(start, norm):
    """Each against a constant of its own; the first is attacked against its own."""
    pair, x = warm(encoders()), views()
    held, other = copy.deepcopy(pair[0]), copy.deepcopy(pair)
    goals = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(5)).double()

    def loss(z, v):
        return (z - goals[v]).square().mean()

    torch.manual_seed(7)
    options = attack(2, start, norm)
    result = query_step(pair[0], x, loss, adv_encoder=pair[1], attack=options, adv_weight=WEIGHT)
    held(x[0]), held(x[1])
    held.train(norm == "train")
    torch.manual_seed(7)
    x_t = options.begin(x[0])
    for _ in range(2):
        x_t = x_t.clone().requires_grad_()
        (dx,) = torch.autograd.grad(loss(held(x_t), 0), x_t)
        x_t = options.step(x_t.detach(), dx, x[0])
    clean = loss(other[0](x[0]), 0) + loss(other[0](x[1]), 1)
    adv = loss(other[1](x_t), 0)
    (clean + WEIGHT * adv).backward()
    assert_same(pair, result, other, (clean, adv, x_t))


@modes
def test_keys_and_queue_see_clean_views_only(start, norm):
    """The attack composes with momentum contrast, where further steps leave no trace."""
    pair, x = warm(encoders()), Batch(views())
    built = MoCo(pair[0], adversarial=True, queue_size=18)
    held, plain = copy.deepcopy(built), copy.deepcopy(built)
    options = attack(2, start, norm)
    torch.manual_seed(7)
    result = built.step(x, StepOptions(kind="pair", attack=options))
    expected = plain.step(x, StepOptions())
    assert torch.equal(result.loss, expected.loss)
    assert torch.equal(built.queue, plain.queue)
    assert built.pointer == 6
    for found, wanted in ((built.encoder, plain.encoder), (built.key_encoder, plain.key_encoder)):
        for name, buffer in norm_buffers(wanted).items():
            assert torch.equal(norm_buffers(found)[name], buffer), name
    with torch.no_grad():
        (keys,) = held.targets(x, StepOptions())
    x_0 = x.views[0]
    held.encoder(x_0)
    held.encoder.train(norm == "train")
    torch.manual_seed(7)
    x_t = options.begin(x_0)
    for _ in range(2):
        x_t = x_t.clone().requires_grad_()
        (dx,) = torch.autograd.grad(held.loss(held.encoder(x_t), keys), x_t)
        x_t = options.step(x_t.detach(), dx, x_0)
    assert torch.equal(result.x_adv, x_t)
