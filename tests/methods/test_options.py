"""Settings of methods are inherited, frozen and within bounds, and units follow from cost."""

import dataclasses
import math
import re
from typing import Annotated, get_args, get_origin, get_type_hints

import pytest
import torch
from torch import nn

from clae_fast.methods import HCL, METHODS, SSCL, SupCon
from clae_fast.steps.options import StepCost

every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def test_settings_are_inherited_and_frozen():
    built = SSCL(nn.Linear(2, 2), beta=2.0, hard=3)
    assert (built.options.beta, built.options.hard, built.options.tau_plus) == (2.0, 3, 0.1)
    assert built.temperature == built.options.temperature == SSCL.own_temperature() == 0.5
    with pytest.raises(dataclasses.FrozenInstanceError):
        built.options.beta = 1.0


@every_method
def test_defaults_are_within_bounds(method):
    options = method.Options()
    assert method.own_options().keys() | {"temperature"} == dataclasses.asdict(options).keys()
    for name, (kind, default) in method.own_options().items():
        assert type(default) is kind, name


@every_method
def test_every_bound_is_checked(method):
    for name, hint in get_type_hints(method.Options, include_extras=True).items():
        if get_origin(hint) is Annotated:
            kind, bounds = get_args(hint)
            wrong = "nothing" if kind is str else math.nan
            message = f"{name} must be {bounds.wanted}, got {wrong!r}"
            with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
                method.Options(**{name: wrong})


@every_method
def test_every_setting_has_a_meaning(method):
    texts = " ".join(options.__doc__ for options in method.Options.__mro__[:-1])
    for name in method.own_options():
        assert f"    {name}: " in texts, name


def test_wrong_names_and_types():
    with pytest.raises(TypeError, match="unexpected keyword argument 'bet'"):
        HCL(nn.Linear(2, 2), bet=1.0)
    with pytest.raises(TypeError, match="beta must be a number, got str"):
        HCL(nn.Linear(2, 2), beta="1")


def test_units_follow_from_cost():
    class Dear(HCL):
        kinds = ("none", "pair")

        @classmethod
        def cost(cls, options, **others):
            return StepCost(trained=4, attacked=options.attack.steps * (options.kind == "pair"))

    assert Dear.units == Dear(nn.Linear(2, 2)).units == {"none": 12, "pair": 14}


def test_a_supervised_loss_needs_labels():
    z = torch.randn(2, 4, 3)
    with pytest.raises(ValueError, match="labels must be given for supcon, got None"):
        SupCon(nn.Linear(2, 2)).loss(*z)
