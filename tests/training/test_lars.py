import copy
import math

import pytest
import torch
from torch import nn

from clae_fast.training.lars import LARS


def parameter(*values, shape=None):
    data = torch.tensor(values, dtype=torch.float64)
    return nn.Parameter(data if shape is None else data.view(shape))


def test_two_steps_equal_the_formula():
    w = parameter(3.0, 4.0, shape=(1, 2))  # norm 5
    optimizer = LARS([w], lr=0.5, momentum=0.9, weight_decay=0.1, trust_coefficient=0.01)
    expected, velocity = w.detach().clone(), torch.zeros(1, 2, dtype=torch.float64)
    for grad in ([[1.0, 2.0]], [[-2.0, 0.5]]):
        w.grad = torch.tensor(grad, dtype=torch.float64)
        optimizer.step()
        g = w.grad + 0.1 * expected
        velocity = 0.9 * velocity + 0.01 * expected.norm() / g.norm() * g
        expected = expected - 0.5 * velocity
        torch.testing.assert_close(w.detach(), expected, rtol=1e-12, atol=0)


def test_1d_parameters_take_plain_momentum_steps():
    ours, theirs = parameter(1.0, -2.0), parameter(1.0, -2.0)
    optimizers = (
        LARS([ours], lr=0.1, momentum=0.9, weight_decay=0.5),
        torch.optim.SGD([theirs], lr=0.1, momentum=0.9),
    )
    for grad in ([1.0, 2.0], [0.5, -1.0]):
        ours.grad = theirs.grad = torch.tensor(grad, dtype=torch.float64)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("weight", "grad"), [(0.0, 1.0), (1.0, 0.0)])
def test_a_zero_norm_leaves_the_step_unscaled(weight, grad):
    w = parameter(weight, shape=(1, 1))
    w.grad = torch.full_like(w, grad)
    LARS([w], lr=0.1).step()
    assert w.item() == pytest.approx(weight - 0.1 * grad)


def test_state_survives_a_checkpoint():
    w = parameter(3.0, 4.0, shape=(1, 2))
    optimizer = LARS([w], lr=0.5)
    w.grad = torch.ones_like(w)
    optimizer.step()
    twin = nn.Parameter(w.detach().clone())
    other = LARS([twin], lr=0.1)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    twin.grad = torch.ones_like(twin)
    optimizer.step()
    other.step()
    assert torch.equal(w, twin)


def test_closure_and_parameters_without_gradient():
    w, unused = parameter(1.0, shape=(1, 1)), parameter(1.0, shape=(1, 1))
    optimizer = LARS([w, unused], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = (w**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 1.0
    assert w.item() < 1.0
    assert unused.item() == 1.0


def test_negative_arguments_are_named():
    with pytest.raises(ValueError, match="momentum must not be negative, got -1"):
        LARS([parameter(1.0)], lr=0.1, momentum=-1)


class TestLossScale:
    def step(self, grad, scaler=None):
        w = nn.Parameter(torch.tensor([[3.0, 4.0]]))
        optimizer = LARS([w], lr=0.5, weight_decay=0.1)
        w.grad = torch.ones_like(w)
        optimizer.step()
        velocity = optimizer.state[w]["momentum_buffer"]
        before = w.detach().clone(), velocity.clone()
        w.grad = torch.tensor([grad])
        if scaler is None:
            optimizer.step()
        else:
            w.grad *= scaler.scale(torch.ones(()))
            scaler.step(optimizer)
            scaler.update()
        return before, (w.detach(), velocity)

    def test_it_is_undone(self):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        torch.testing.assert_close(self.step([1.0, -2.0], scaler), self.step([1.0, -2.0]))

    @pytest.mark.parametrize("bad", [math.inf, math.nan])
    def test_nothing_moves_where_a_gradient_is_not_finite(self, bad):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        before, after = self.step([1.0, bad], scaler)
        torch.testing.assert_close(after, before, rtol=0, atol=0)
        assert scaler.get_scale() == 512
