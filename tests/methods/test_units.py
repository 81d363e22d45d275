"""What a step of each method costs, by torch's count of FLOPs, against the units that it claims."""

import copy

import pytest
import torch
from step_cases import attack, flops, resnet, views

from clae_fast.methods import METHODS
from clae_fast.nn import Encoder, ProjectionHead, build_encoder
from clae_fast.steps.batch import Batch
from clae_fast.steps.options import StepOptions


@pytest.fixture(scope="module")
def resnet18():
    backbone, features = resnet(build_encoder, "resnet18", 8)
    return Encoder(backbone, ProjectionHead(features, 512, 64))


def build(name, encoder, **options):
    if METHODS[name].needs_teacher:
        options["teacher"] = copy.deepcopy(encoder)
    if name == "acssl":
        options["hard"] = 1
    return METHODS[name](encoder, adversarial=True, **options)


def units(built, encoder, kind):
    x = views(4, 8, torch.float32)
    labels = torch.arange(4) % 2 if built.needs_labels else None
    with torch.no_grad():
        unit = flops(lambda: encoder(x[0]))
    step = StepOptions(kind=kind, attack=attack())
    return flops(lambda: built.step(Batch(x[: built.views], labels), step)) / unit


CASES = [(name, kind) for name, method in METHODS.items() for kind in method.units]


@pytest.mark.parametrize(("name", "kind"), CASES, ids=[f"{name}-{kind}" for name, kind in CASES])
def test_units(resnet18, name, kind):
    built = build(name, resnet18)
    assert units(built, resnet18, kind) == pytest.approx(built.units[kind], rel=0.01)


# what begins later in a run: banks that are full, synthetic negatives
@pytest.mark.parametrize("name", ["adco", "caco", "mochi", "synco"])
@pytest.mark.parametrize("kind", ["none", "pair"])
def test_units_of_the_later_phase(resnet18, name, kind):
    built = build(name, resnet18)
    first = built.phase
    if hasattr(built, "filled"):
        built.filled.fill_(len(built.bank))
    built.before_step(0.5)
    assert built.phase != first
    assert units(built, resnet18, kind) == pytest.approx(built.units[kind], rel=0.01)


@pytest.mark.parametrize("name", ["moco", "mochi", "synco", "adco"])
@pytest.mark.parametrize(("kind", "expected"), [("none", 8), ("pair", 11)])
def test_units_of_both_views_as_queries(resnet18, name, kind, expected):
    built = build(name, resnet18, symmetric=True)
    assert units(built, resnet18, kind) == pytest.approx(expected, rel=0.01)


def test_the_attack_adds_a_third_of_the_step():
    """CLAE's attack: a backward pass into the view, and a view to train on, for any method."""
    for name in ("simclr", "plain", "uel", "dcl", "hcl", "sscl", "supcon", "h_scl"):
        assert METHODS[name].units["none"] == 6
        assert METHODS[name].units["pair"] == 9
    for name in ("moco", "mochi", "synco", "acssl", "adco"):
        assert METHODS[name].units == {"none": 4, "pair": 7}
    assert METHODS["caco"].units == {"none": 8, "pair": 11}
