"""What the tests of methods of queries share: inputs, resumed runs, presets."""

import copy

import torch
from step_cases import attack

from clae_fast.config.layers import resolve
from clae_fast.steps.batch import Batch
from clae_fast.steps.options import StepOptions

WEIGHT = 0.7


def batch(seed, n=6, size=8, views=2, crops=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [size] * views + [size // 2] * crops
    return Batch(
        tuple(
            torch.rand(n, 3, side, side, generator=generator, dtype=torch.float64)
            for side in shapes
        )
    )


def options(kind="none", **others):
    return StepOptions(kind=kind, attack=attack(), adv_weight=WEIGHT, **others)


def sgd(module):
    weights = [weight for weight in module.parameters() if weight.requires_grad]
    return torch.optim.SGD(weights, lr=0.1, momentum=0.5)


def assert_resumes(method, again, kind="pair"):
    """What a state dictionary holds decides all further steps."""

    def go_on(built, optimizer, seeds):
        losses = []
        for seed in seeds:
            torch.manual_seed(seed)
            built.before_step(seed / 6)
            losses.append(built.step(batch(seed), options(kind)).loss)
            optimizer.step()
            optimizer.zero_grad()
            built.after_step()
        return losses

    optimizer = sgd(method)
    go_on(method, optimizer, range(3))
    again.load_state_dict(copy.deepcopy(method.state_dict()))
    other = sgd(again)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert go_on(method, optimizer, range(3, 6)) == go_on(again, other, range(3, 6))
    for name, tensor in method.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def assert_preset(name, expected, own):
    """A preset's settings, and those that the method alone has."""
    settings = resolve({}, name).to_dict()
    assert {key: settings[key] for key in expected} == expected
    assert settings["options"] == own
