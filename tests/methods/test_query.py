"""CLAE's attack with methods of queries: who is attacked, and who never sees the adversary."""

import copy

import pytest
import torch
from bank_cases import BANK, fill
from queries import batch, options
from step_cases import encoders, norm_buffers

from clae_fast.methods import METHODS, QueryMethod

# what makes a method small; each takes the settings that it has
SMALL = {"queue_size": 20, "hard": 3, "warmup": 0.0, **BANK}
BUILT = {
    name: {option: SMALL[option] for option in SMALL.keys() & method.own_options().keys()}
    for name, method in METHODS.items()
    if issubclass(method, QueryMethod)
}
SYMMETRIC = [name for name in BUILT if "symmetric" in METHODS[name].own_options()]
CASES = [(name, {}) for name in BUILT] + [(name, {"symmetric": True}) for name in SYMMETRIC]
every_case = pytest.mark.parametrize(
    ("name", "given"), CASES, ids=[name + "-symmetric" * bool(given) for name, given in CASES]
)


def build(name, given):
    """A method over a small ResNet and its twin, in float64, its bank full."""
    encoder, twin = encoders()
    method = METHODS[name](encoder, adversarial=True, **BUILT[name], **given)
    method.adv_encoder = twin
    fill(method)
    return method


def test_every_one_is_here():
    assert {"moco", "mochi", "synco", "acssl", "adco", "caco"} <= BUILT.keys()


@every_case
def test_the_attacked_view_is_the_first_large_query(name, given):
    method = build(name, given)
    views = batch(0, crops=2)
    seen = {encoder: [] for encoder in ("encoder", "key_encoder", "adv_encoder")}
    for encoder, inputs in seen.items():
        getattr(method, encoder).register_forward_pre_hook(
            lambda _, given, inputs=inputs: inputs.append(given[0].detach())
        )
    result = method.step(views, options("pair"))
    moved = (result.x_adv - views.views[0]).abs().amax((1, 2, 3))
    assert ((moved > 0) & (moved <= 0.05)).all()
    assert [torch.equal(x, result.x_adv) for x in seen["adv_encoder"]] == [True]
    for encoder in ("encoder", "key_encoder"):
        assert seen[encoder]
        assert all(any(torch.equal(x, view) for view in views.views) for x in seen[encoder])


@every_case
def test_keys_bank_and_queue_know_nothing_of_the_attack(name, given):
    method = build(name, given)
    clean = copy.deepcopy(method)
    for number in range(2):
        for built, kind in ((method, "pair"), (clean, "none")):
            torch.manual_seed(number)
            built.step(batch(number, crops=2), options(kind))
            built.after_step()
    assert method.adv_encoder is not None
    for state in ("queue", "bank", "velocity"):
        if hasattr(method, state):
            assert torch.equal(getattr(method, state), getattr(clean, state))
    for encoder in ("encoder", "key_encoder"):
        other = norm_buffers(getattr(clean, encoder))
        for key, buffer in norm_buffers(getattr(method, encoder)).items():
            assert torch.equal(buffer, other[key]), key
