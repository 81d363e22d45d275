"""What a run will cost: units, and the memory of a step, against a step that is really taken."""

import itertools

import pytest
import torch
from step_cases import SavedBytes

from clae_fast.config.layers import resolve
from clae_fast.methods import METHODS
from clae_fast.steps.batch import Batch
from clae_fast.steps.options import StepOptions
from clae_fast.training import cost
from clae_fast.training.build import build_attack, build_method
from clae_fast.training.optimizer import build_optimizer

CPU = torch.device("cpu")
KINDS = [
    (name, kind)
    for name, method in METHODS.items()
    for kind in method.units
    if kind != "released" and not method.needs_teacher
]


@pytest.mark.parametrize(("method", "attack"), KINDS)
def test_units_are_those_of_the_method(method, attack):
    config = resolve({"method": method, "attack": attack})
    units = cost.step_units(config)
    known = METHODS[method].units
    assert units == {"attacked": known[attack], "plain": known["none"], "mean": known[attack]}


@pytest.mark.parametrize(
    ("settings", "mean"),
    [
        ({"adv_every": 4}, 6 + 3 / 4),
        ({"adv_every": 4, "attack": "self"}, 6 + 5 / 4),
        ({"adv_fraction": 0.5}, 7.5),
        ({"adv_fraction": 0.5, "adv_replace": True}, 7),
        ({"attack_steps": 5}, 9 + 8),
        ({"attack_steps": 5, "attack_start": "random"}, 9 + 10),
        ({"attack_steps": 5, "attack_start": "random", "attack": "self"}, 10 + 10),
        ({"micro_batch": 16}, 12),
        ({"micro_batch": 16, "attack": "none"}, 8),
        ({"method": "adco", "options": {"symmetric": True}}, 11),
        # two crops of a quarter of the pixels
        ({"method": "adco", "small_crops": 2, "small_crop_size": 8}, 7 + 3 * 2 / 4),
    ],
)
def test_units_of_settings(settings, mean):
    assert cost.step_units(resolve(settings))["mean"] == pytest.approx(mean)


def numbers(tensors):
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize(
    ("method", "attack"),
    [("simclr", "pair"), ("rocl", "pair"), ("sscl", "self"), ("supcon", "none"), ("adco", "pair")],
)
def test_memory_is_that_of_a_real_step(method, attack):
    config = resolve({"method": method, "attack": attack, "batch_size": 8, "image_size": 8})
    built = build_method(config)
    found = cost.step_memory(config, built, CPU)
    assert all(parameter.grad is None for parameter in built.parameters())

    views = torch.rand(2, 8, 3, 8, 8)
    labels = torch.arange(8) % 2 if built.needs_labels else None
    saved = SavedBytes(built)
    with saved:
        built.step(
            Batch(tuple(views), labels), StepOptions(kind=attack, attack=build_attack(config))
        )
    optimizer = build_optimizer(config.optimization, built)
    optimizer.step()
    trained = [p for p in built.parameters() if p.grad is not None]
    state = itertools.chain(*(own.values() for own in optimizer.state.values()))
    assert found["weights"] == numbers([*built.parameters(), *built.buffers()])
    assert found["gradients"] == numbers(trained)
    assert found["optimizer"] == numbers(state)
    assert found["views"] == views.nbytes
    assert found["activations"] == pytest.approx(saved.peak, rel=0.1)


@pytest.mark.parametrize(
    ("method", "optimizer"),
    [("simclr", "adam"), ("rocl", "lars"), ("sscl", "sgd"), ("adco", "sgd"), ("mochi", "adamw")],
)
def test_a_gpu_that_is_not_there(method, optimizer):
    """Views and activations in fp16, weights and the optimizer's state in fp32."""
    config = resolve({"method": method, "attack": "pair", "optimizer": optimizer, "image_size": 8})
    built = build_method(config)
    found = cost.step_memory(config, built, torch.device("cuda"))
    known = cost.step_memory(config, built, CPU)
    assert found["views"] == known["views"] / 2
    assert found["activations"] < 0.75 * known["activations"]
    for name in ("weights", "gradients", "optimizer"):
        assert found[name] == known[name]


def test_half_precision_and_chunks_keep_less():
    def kept(**settings):
        config = resolve({"batch_size": 64, "image_size": 8} | settings)
        return cost.step_memory(config, build_method(config), CPU)["activations"]

    assert kept(precision="bf16") < 0.7 * kept()
    assert kept(micro_batch=8) < 0.2 * kept()
