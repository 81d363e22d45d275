"""What the tests of robust methods share: attacks by autograd, comparisons, units."""

import copy
from collections.abc import Callable

import pytest
import torch
from step_cases import encoders, flops, norm_buffers, resnet, views
from torch import Tensor, nn

from clae_fast.attack import LinfAttack
from clae_fast.distributed import World
from clae_fast.nn import Encoder, ProjectionHead, build_encoder
from clae_fast.steps.batch import Batch
from clae_fast.steps.options import StepOptions, StepResult

WEIGHT = 0.7
MODES = [("view", "train"), ("random", "train"), ("random", "eval")]
modes = pytest.mark.parametrize(("start", "norm"), MODES)


def attack(steps: int = 3, start: str = "random", norm: str = "eval") -> LinfAttack:
    return LinfAttack(eps=0.05, step_size=0.03, lo=0.0, hi=1.0, steps=steps, start=start, norm=norm)


def warm_encoder() -> nn.Module:
    """A small ResNet in float64, whose running statistics are those of images."""
    encoder, _ = encoders()
    with torch.no_grad():
        for _ in range(20):
            encoder(views(12)[0])
    return encoder


def without_norms() -> nn.Module:
    """No layer looks at more than one row."""
    layers = (nn.Conv2d(3, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.ReLU(), nn.Flatten())
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return nn.Sequential(*layers, nn.Linear(384, 8)).double()


def pgd(options: LinfAttack, x_0: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """Projected gradient descent that raises a loss of the view."""
    x = options.begin(x_0)
    for _ in range(options.steps):
        x = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(loss(x), x)
        x = options.step(x.detach(), dx, x_0)
    return x


def assert_same(method, result: StepResult, other, expected) -> None:
    """Losses, adversarial view, gradients and statistics; `expected` came with `other`."""
    for found, wanted in zip(result, expected, strict=True):
        assert (found is None) == (wanted is None)
        if found is not None:
            torch.testing.assert_close(found, wanted.detach(), rtol=1e-12, atol=1e-14)
    compared = 0
    for weight, reference in zip(method.parameters(), other.parameters(), strict=True):
        assert (weight.grad is None) == (reference.grad is None)
        if weight.grad is not None:
            compared += 1
            torch.testing.assert_close(weight.grad, reference.grad, rtol=1e-10, atol=1e-13)
    assert compared > 3
    for name, buffer in norm_buffers(other).items():
        torch.testing.assert_close(norm_buffers(method)[name], buffer, rtol=1e-12, atol=1e-15)


def assert_units(build: Callable[..., nn.Module], a_step: int) -> None:
    """The class's units by torch's count of FLOPs, and those of the attack's further steps."""
    backbone, features = resnet(build_encoder, "resnet18", 8)
    encoder = Encoder(backbone, ProjectionHead(features, 512, 64))
    method = build(encoder)
    x = views(4, 8, torch.float32)
    with torch.no_grad():
        unit = flops(lambda: encoder(x[0]))
    batch = Batch(x[: method.views])
    cases = [(kind, attack(1, "view", "train"), units) for kind, units in method.units.items()]
    cases.append(("pair", attack(3), method.units["pair"] + 2 * a_step))
    for kind, options, units in cases:
        step = StepOptions(kind=kind, attack=options)
        found = flops(lambda step=step: method.step(batch, step)) / unit
        assert found == pytest.approx(units, rel=0.01), kind
        assert method.cost(step).units() == units


def assert_options(method, kind: str, steps: LinfAttack, reset: Callable[[], None]) -> None:
    """A scale multiplies gradients alone, and chunks are the batch where there is no BatchNorm."""
    batch = Batch(views()[: method.views])
    results = []
    for options in ({}, {"scale": torch.tensor(8.0)}, {"micro_batch": 4}):
        reset()
        torch.manual_seed(7)
        method.zero_grad()
        step = StepOptions(kind=kind, attack=steps, adv_weight=WEIGHT, **options)
        result = method.step(batch, step)
        trained = [w.grad.clone() for w in method.parameters() if w.grad is not None]
        results.append((result, trained))
    (plain, grads), *others = results
    for (result, found), factor in zip(others, (8, 1), strict=True):
        for a, b in zip(result, plain, strict=True):
            assert (a is None and b is None) or torch.allclose(a, b, rtol=1e-12, atol=1e-14)
        for dw, reference in zip(found, grads, strict=True):
            torch.testing.assert_close(dw, factor * reference, rtol=1e-10, atol=1e-13)


def assert_processes(world: World, method) -> None:
    """W processes compute what one does with the whole batch."""
    x = views(4 * world.size)[: method.views]
    for kind in method.units:
        step = {"kind": kind, "attack": attack(2, "view", "eval"), "adv_weight": WEIGHT}
        alone = copy.deepcopy(method)
        method.zero_grad()
        own = Batch(tuple(world.own_rows(view) for view in x))
        result = method.step(own, StepOptions(**step, world=world))
        expected = alone.step(Batch(x), StepOptions(**step))
        torch.testing.assert_close(result.loss, expected.loss, rtol=1e-12, atol=0)
        for weight, reference in zip(method.parameters(), alone.parameters(), strict=True):
            if reference.grad is not None:
                total = world.all_reduce(weight.grad.clone())
                torch.testing.assert_close(total, reference.grad, rtol=1e-9, atol=1e-12)
