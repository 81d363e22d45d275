"""Settings become an optimizer and its learning rates."""

import math

import pytest
import torch
from torch import nn

from clae_fast.config import Optimization
from clae_fast.config.layers import resolve
from clae_fast.training.build import build_method
from clae_fast.training.lars import LARS
from clae_fast.training.optimizer import build_optimizer, load_optimizer, lr_factor, set_lr


def tiny(**settings):
    return resolve({"image_size": 8, **settings})


class TestOptimizer:
    @pytest.mark.parametrize(
        ("name", "kind"),
        [
            ("adam", torch.optim.Adam),
            ("adamw", torch.optim.AdamW),
            ("sgd", torch.optim.SGD),
            ("lars", LARS),
        ],
    )
    def test_settings_arrive_and_1d_parameters_may_be_exempt(self, name, kind):
        module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        config = tiny(optimizer=name, lr=0.5, weight_decay=0.1, momentum=0.8)
        optimizer = build_optimizer(config.optimization, module)
        assert type(optimizer) is kind
        (group,) = optimizer.param_groups
        assert (group["lr"], group["weight_decay"], len(group["params"])) == (0.5, 0.1, 4)
        assert group.get("momentum", 0.8) == 0.8
        config = tiny(optimizer=name, weight_decay=0.1, decay_1d=False)
        groups = build_optimizer(config.optimization, module).param_groups
        assert [(len(g["params"]), g["weight_decay"]) for g in groups] == [(1, 0.1), (3, 0.0)]

    @pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "lars"])
    def test_a_first_gradient_that_is_not_finite_leaves_nothing_behind(self, name, nan_empty):
        grads = [torch.full((2, 3), math.inf), torch.rand(2, 3)]
        found = []
        for skipped in (0, 1):
            weight = nn.Parameter(torch.ones(2, 3))
            optimizer = build_optimizer(
                tiny(optimizer=name).optimization, nn.ParameterList([weight])
            )
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
            for grad in grads[1 - skipped :]:
                weight.grad = grad * scaler.scale(torch.ones(()))
                scaler.step(optimizer)
                scaler.update()
            found.append(weight.detach())
        torch.testing.assert_close(*found, rtol=0, atol=0)

    def test_shared_weights_are_optimized_once(self):
        method = build_method(tiny())
        (group,) = build_optimizer(tiny().optimization, method).param_groups
        assert len({id(p) for p in group["params"]}) == len(group["params"])
        shared = set(method.encoder.parameters()) & set(method.adv_encoder.parameters())
        assert shared < set(group["params"])


class TestSchedule:
    def factors(self, steps, **settings):
        factor = lr_factor(Optimization(**settings), steps_per_epoch=2)
        return [factor(step) for step in range(steps)]

    def test_cosine_after_warm_up(self):
        found = self.factors(8, schedule="cosine", epochs=4, warmup_epochs=2)
        cosine = [(1 + math.cos(math.pi * t / 4)) / 2 for t in range(4)]
        assert found == pytest.approx([0.25, 0.5, 0.75, 1.0, *cosine])

    def test_steps_are_relative_to_the_first_rate(self):
        found = self.factors(
            8, schedule="step", epochs=4, warmup_epochs=0, milestones=(1, 3), factors=(0.1, 0.05)
        )
        assert found == [1, 1, 0.1, 0.1, 0.1, 0.1, 0.05, 0.05]

    def test_constant_and_warm_up_to_the_end(self):
        assert self.factors(3, schedule="constant", epochs=2, warmup_epochs=0) == [1, 1, 1]
        assert self.factors(3, schedule="cosine", epochs=1, warmup_epochs=1) == [0.5, 1.0, 1.0]


class TestState:
    def trained(self, **settings):
        module = nn.Linear(3, 2)
        optimizer = build_optimizer(tiny(**settings).optimization, module)
        module(torch.rand(4, 3)).sum().backward()
        optimizer.step()
        return module, optimizer

    @pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "lars"])
    def test_settings_stay_those_of_the_run(self, name):
        _, before = self.trained(optimizer=name, lr=0.5)
        _, after = self.trained(optimizer=name, lr=0.1)
        load_optimizer(after, before.state_dict())
        assert {group["lr"] for group in after.param_groups} == {0.1}
        states = [optimizer.state_dict()["state"] for optimizer in (before, after)]
        torch.testing.assert_close(*states, rtol=0, atol=0)

    def test_other_parameters_are_refused(self):
        _, optimizer = self.trained()
        other = build_optimizer(tiny().optimization, nn.Linear(3, 2, bias=False))
        with pytest.raises(ValueError, match="the optimizer's parameters differ"):
            load_optimizer(optimizer, other.state_dict())

    def test_a_rate_in_a_tensor_is_written_in_place(self):
        weight = nn.Parameter(torch.zeros(2, 2))
        rate = torch.tensor(1.0)
        optimizer = LARS([weight], lr=rate)
        set_lr(optimizer, 0.25)
        assert optimizer.param_groups[0]["lr"] is rate
        assert rate == 0.25
