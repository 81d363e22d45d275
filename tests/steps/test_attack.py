"""Steps stay in the ball and in the range; the twin is written by whoever runs backward."""

import dataclasses

import pytest
import torch
from torch import nn

from clae_fast.attack import LinfAttack, linf_twin

# per channel, as a view normalized by a standard deviation of each channel's own needs
EPS = (0.1, 0.2, 0.05)
CHANNELS = torch.tensor(EPS, dtype=torch.float64).view(3, 1, 1)


def image(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(4, 3, 5, 6, generator=generator, dtype=torch.float64).to(dtype)


def gradient(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 3, 5, 6, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_step_is_the_formula(dtype):
    x, grad = image(dtype), gradient()
    attack = LinfAttack(eps=EPS, step_size=0.07, lo=0.0, hi=1.0)
    x_adv = attack.step(x, grad)
    expected = x.double() + 0.07 * grad.sign().double()
    expected = torch.maximum(torch.minimum(expected, x + CHANNELS), x - CHANNELS).clamp(0, 1)
    assert x_adv.dtype == dtype
    torch.testing.assert_close(x_adv, expected.to(dtype), rtol=0, atol=2 * torch.finfo(dtype).eps)
    assert ((x_adv.double() - x.double()).abs() <= CHANNELS).all()
    assert x_adv.min() == 0
    assert x_adv.max() == 1


def test_step_size_defaults_to_the_radius_and_nothing_clamps():
    x, grad = image(), gradient()
    x_adv = LinfAttack(eps=0.25).step(x, grad)
    torch.testing.assert_close(x_adv, x + 0.25 * grad.sign())
    assert x_adv.min() < 0
    assert x_adv.max() > 1


def test_steps_from_elsewhere_stay_in_the_ball():
    x0, attack = image(), LinfAttack(eps=EPS, step_size=0.15)
    x = x0
    for seed in range(4):
        x = attack.step(x, gradient(seed), x0)
        assert ((x.double() - x0.double()).abs() <= CHANNELS).all()
    assert not torch.equal(x, attack.step(x0, gradient(3)))


def test_project():
    x0, attack = image(), LinfAttack(eps=EPS, lo=0.0, hi=1.0)
    far = x0 + gradient()
    near = attack.project(far, x0)
    eps = CHANNELS.float()
    expected = torch.maximum(torch.minimum(far, x0 + eps), x0 - eps).clamp(0, 1)
    torch.testing.assert_close(near, expected)
    assert torch.equal(attack.project(near, x0), near)
    assert torch.equal(attack.project(x0, x0), x0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_random_start(dtype):
    x0, attack = image(dtype) * 0.5 + 0.25, LinfAttack(eps=EPS, lo=0.0, hi=1.0)
    x = attack.random_start(x0, torch.Generator().manual_seed(2))
    again = attack.random_start(x0, torch.Generator().manual_seed(2))
    assert torch.equal(x, again)
    moved = (x.double() - x0.double()) / CHANNELS
    assert x.dtype == dtype
    assert moved.abs().max() <= 1
    assert moved.abs().amax((0, 2, 3)).min() > 0.9  # every channel uses its own radius
    assert abs(moved.mean()) < 0.1
    assert moved.var() == pytest.approx(1 / 3, rel=0.2)


def test_where_an_attack_begins():
    x0 = image()
    assert LinfAttack(eps=EPS).begin(x0) is x0
    attack = LinfAttack(eps=EPS, start="random")
    torch.manual_seed(2)
    x = attack.begin(x0)
    torch.manual_seed(2)
    assert torch.equal(x, attack.random_start(x0))
    assert not torch.equal(x, attack.begin(x0))


def test_twin_is_the_identity_and_its_backward_the_step():
    x, attack = image(), LinfAttack(eps=0.03, lo=0.0, hi=1.0)
    weight = gradient().requires_grad_()
    y, twin = attack.twin(x)
    assert torch.equal(y, x)
    with pytest.raises(RuntimeError, match="run backward"):
        _ = twin.x_adv
    (y * weight).sum().backward()
    assert torch.equal(twin.x_adv, attack.step(x, weight.detach()))
    assert torch.equal(weight.grad, x)  # what lies beyond the view gets its gradient as ever
    assert not twin.x_adv.requires_grad


def test_twin_keeps_no_input_gradient():
    x = image().requires_grad_()
    y, twin = linf_twin(x, eps=0.03)
    (y * gradient()).sum().backward()
    assert x.grad is None
    leaf = y.grad_fn.next_functions[0][0].variable
    assert leaf.is_leaf
    assert leaf.grad is None
    assert twin.x_adv.shape == x.shape


def test_twin_sums_all_uses_of_the_view_and_the_last_backward_counts():
    x, first, second = image(), gradient(1), gradient(2)
    attack = LinfAttack(eps=0.03)
    y, twin = linf_twin(x, eps=0.03)
    loss = (y * first).sum() + (2 * y * second).sum()
    loss.backward(retain_graph=True)
    assert torch.equal(twin.x_adv, attack.step(x, first + 2 * second))
    (-loss).backward()
    assert torch.equal(twin.x_adv, attack.step(x, -first - 2 * second))


def test_twin_in_channels_last_and_half_precision():
    x = image(torch.float16).to(memory_format=torch.channels_last)
    y, twin = linf_twin(x, eps=0.02)
    assert y.is_contiguous(memory_format=torch.channels_last)
    nn.Conv2d(3, 8, 3)(y.float()).square().sum().backward()
    assert twin.x_adv.dtype == torch.float16
    assert twin.x_adv.is_contiguous(memory_format=torch.channels_last)
    assert (twin.x_adv.double() - x.double()).abs().max() <= 0.02


def test_an_attack_is_a_value():
    attack = LinfAttack(eps=[0.1, 0.2, 0.3])
    assert attack == LinfAttack(eps=(0.1, 0.2, 0.3))
    assert hash(attack) == hash(LinfAttack(eps=(0.1, 0.2, 0.3)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        attack.eps = 0.1
    with pytest.raises(TypeError):
        LinfAttack(0.1)


@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        ({"eps": -0.1}, ValueError, "eps must not be negative, got -0.1"),
        ({"eps": (0.1, -0.1)}, ValueError, "eps must not be negative"),
        ({"eps": float("nan")}, ValueError, "eps must be finite, got nan"),
        ({"eps": None}, TypeError, "eps must be a number or one number per channel, got None"),
        ({"eps": "0.1"}, TypeError, "eps must be a number or one number per channel, got '0.1'"),
        ({"eps": ()}, TypeError, "eps must be a number"),
        ({"eps": 0.1, "step_size": -1}, ValueError, "step_size must not be negative, got -1"),
        ({"eps": 0.1, "lo": float("-inf")}, ValueError, "lo must be finite"),
        ({"eps": 0.1, "lo": 1.0, "hi": 0.0}, ValueError, "lo must be below hi"),
        ({"eps": 0.1, "lo": 0.0, "hi": (1.0, 0.0)}, ValueError, "lo must be below hi"),
        ({"eps": 0.1, "lo": (0.0, 0.0, 0.0), "hi": (1.0, 1.0)}, ValueError, "lo must be below hi"),
    ],
)
def test_bad_lengths(lengths, error, message):
    with pytest.raises(error, match=message):
        LinfAttack(**lengths)
    with pytest.raises(error, match=message):
        linf_twin(image(), **lengths)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"steps": 1.0}, TypeError, "steps must be an integer, got float"),
        ({"steps": True}, TypeError, "steps must be an integer, got bool"),
        ({"start": "center"}, ValueError, "start must be view or random, got 'center'"),
        ({"norm": None}, ValueError, "norm must be train or eval, got None"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        LinfAttack(eps=0.1, **options)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (image().bfloat16(), "x must be fp32 or fp16, got bf16"),
        (image().byte(), r"x must be of dtype .*, got torch\.uint8"),
        ([0.5], r"x must be a torch\.Tensor, got list"),
    ],
)
def test_bad_views(x, message):
    with pytest.raises(TypeError, match=message):
        linf_twin(x, eps=0.1)


def test_as_many_lengths_as_channels():
    with pytest.raises(ValueError, match="eps"):
        linf_twin(image(), eps=(0.1, 0.2))
