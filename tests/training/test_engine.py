"""The engine takes the schedules' steps: precision, loss scale, compilation, other options."""

import copy
import math

import pytest
import torch
from torch import nn

from clae_fast.config.layers import resolve
from clae_fast.steps.batch import Batch
from clae_fast.steps.options import StepOptions
from clae_fast.training.build import build_attack, build_method, step_options
from clae_fast.training.engine import Engine
from clae_fast.training.optimizer import build_optimizer

SETTINGS = {"device": "cpu", "image_size": 8, "hidden_dim": 16, "proj_dim": 8}
CPU = torch.device("cpu")


def engine(**settings):
    config = resolve({**SETTINGS, **settings})
    torch.manual_seed(0)
    method = build_method(config).train()
    return Engine(config, method, step_options(config), CPU), method, config


def views(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(2, 8, 3, 8, 8, generator=generator).to(dtype)


def assert_close(a, b, **tolerance):
    torch.testing.assert_close(a.state_dict(), b.state_dict(), **tolerance)


@pytest.mark.parametrize("attack", ["none", "pair", "self"])
def test_a_step_is_the_schedule_and_the_optimizers(attack):
    ours, method, config = engine(attack=attack, lr=1.0)
    by_hand = copy.deepcopy(method)
    for number, lr in enumerate((0.01, 0.002)):
        result = ours.step(Batch(views()), progress=0.0, global_step=number, lr=lr)
        assert (result.adv_loss is None) == (attack == "none")
    optimizer = build_optimizer(config.optimization, by_hand)
    for lr in (0.01, 0.002):
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        expected = by_hand.step(
            Batch(views()), StepOptions(kind=attack, attack=build_attack(config))
        )
        optimizer.step()
    assert_close(method, by_hand, rtol=0, atol=0)
    torch.testing.assert_close(result.loss, expected.loss, rtol=0, atol=0)


def test_every_kth_step_is_adversarial():
    ours, method, _ = engine(attack="pair", adv_every=3)
    name = "backbone.1.bn1.num_batches_tracked"
    found = []
    for number in range(7):
        result = ours.step(Batch(views()), progress=0.0, global_step=number, lr=1e-3)
        seen = method.adv_encoder.state_dict()[name].item()
        found.append((result.adv_loss is not None, seen))
    assert found == [(number % 3 == 0, number // 3 + 1) for number in range(7)]


@pytest.mark.parametrize("attack", ["pair", "self"])
@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 2e-2), ("fp16", 4e-3)])
def test_half_precision_follows_fp32(attack, precision, tolerance):
    full, _, _ = engine(attack=attack)
    half, method, _ = engine(attack=attack, precision=precision)
    assert half.dtype == (torch.float16 if precision == "fp16" else torch.float32)
    expected = full.step(Batch(views()), progress=0.0, global_step=0, lr=1e-3)
    result = half.step(Batch(views(half.dtype)), progress=0.0, global_step=0, lr=1e-3)
    assert result.x_adv.dtype == half.dtype
    for value, other in ((result.loss, expected.loss), (result.adv_loss, expected.adv_loss)):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, other, rtol=tolerance, atol=0)
    assert {weight.dtype for weight in method.parameters()} == {torch.float32}


def test_a_step_whose_gradient_overflows_is_skipped_and_the_scale_halved():
    ours, method, _ = engine(attack="pair", precision="fp16")
    ours.step(Batch(views(ours.dtype)), progress=0.0, global_step=0, lr=1e-3)
    scale = ours.state_dict()["scaler"]["scale"]
    before = copy.deepcopy(method)
    handle = method.encoder.head[-1].register_full_backward_hook(
        lambda module, dx, dy: (torch.full_like(dx[0], math.inf),)
    )
    result = ours.step(Batch(views(ours.dtype)), progress=0.0, global_step=1, lr=1e-3)
    handle.remove()
    assert ours.state_dict()["scaler"]["scale"] == scale / 2
    torch.testing.assert_close(
        dict(method.named_parameters()), dict(before.named_parameters()), rtol=0, atol=0
    )
    # what the attack made of it is an image, and so are the statistics
    assert result.x_adv.isfinite().all()
    assert all(buffer.isfinite().all() for buffer in method.buffers())
    ours.step(Batch(views(ours.dtype)), progress=0.0, global_step=2, lr=1e-3)
    moved = zip(method.parameters(), before.parameters(), strict=True)
    assert any(not torch.equal(now, then) for now, then in moved)


def test_state_goes_on_bit_for_bit():
    settings = {"attack": "pair", "precision": "fp16"}
    whole, expected, _ = engine(**settings)
    for number in range(4):
        whole.step(Batch(views(whole.dtype)), progress=0.0, global_step=number, lr=1e-3)
    first, method, _ = engine(**settings)
    for number in range(2):
        first.step(Batch(views(first.dtype)), progress=0.0, global_step=number, lr=1e-3)
    second, resumed, _ = engine(**settings)
    resumed.load_state_dict(method.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for number in range(2, 4):
        second.step(Batch(views(second.dtype)), progress=0.0, global_step=number, lr=1e-3)
    assert_close(resumed, expected, rtol=0, atol=0)
    assert second.state_dict()["scaler"] == whole.state_dict()["scaler"]


def test_what_runs_is_said():
    assert str(engine()[0]) == "fp32"
    assert str(engine(precision="bf16", compile="yes")[0]) == "bf16, compiled"


@pytest.mark.parametrize(
    "options",
    [
        {"adv_fraction": 0.5},
        {"adv_fraction": 0.5, "adv_replace": True},
        {"micro_batch": 4},
        {"attack": "none", "batch_views": True},
    ],
)
def test_options_reach_the_schedule(options):
    ours, method, config = engine(**{"attack": "pair", **options})
    by_hand = copy.deepcopy(method)
    result = ours.step(Batch(views()), progress=0.0, global_step=0, lr=0.01)
    renamed = {"batched" if name == "batch_views" else name: v for name, v in options.items()}
    kind = renamed.pop("attack", "pair")
    expected = by_hand.step(
        Batch(views()), StepOptions(kind=kind, attack=build_attack(config), **renamed)
    )
    torch.testing.assert_close(result, expected, rtol=0, atol=0)
    grads = zip(method.parameters(), by_hand.parameters(), strict=True)
    for weight, other in grads:
        torch.testing.assert_close(weight.grad, other.grad, rtol=0, atol=0)


# dynamo looks at the gradients of what it gets
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_compiled_steps_follow_eager_ones():
    eager, expected, _ = engine(attack="self")
    compiled, method, _ = engine(attack="self", compile="yes")
    for number in range(2):
        losses = [
            step.step(Batch(views()), progress=0.0, global_step=number, lr=1e-3)
            for step in (eager, compiled)
        ]
    torch.testing.assert_close(losses[0].loss, losses[1].loss, rtol=1e-5, atol=0)
    buffers = [dict(each.named_buffers()) for each in (method, expected)]
    torch.testing.assert_close(*buffers, rtol=1e-3, atol=1e-5)


def test_a_cpu_captures_nothing():
    with pytest.raises(ValueError, match="capture must be no or auto on cpu"):
        engine(capture="yes")


def test_only_the_body_is_compiled():
    _, method, _ = engine(compile="yes")
    for encoder in (method.encoder, method.adv_encoder):
        network = encoder.backbone[1]
        assert "body" in vars(network)
        assert not isinstance(network.conv1, torch._dynamo.OptimizedModule)
    assert isinstance(method.encoder.head[0], nn.Linear)
