"""AdCo against a plain float64 computation of its own: losses, gradients, keys, bank, state."""

import pytest
import torch
from bank_cases import Plain, assert_steps_equal, build, fill
from queries import assert_preset, assert_resumes, options
from queries import batch as made
from torch.nn import functional as F


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("kind", ["none", "pair"])
def test_steps_equal_autograd(kind, symmetric):
    method = build(symmetric=symmetric)
    fill(method)
    assert_steps_equal(method, Plain(method), kind)


def test_one_temperature_spares_the_denominators():
    method = build(bank_temperature=0.12, symmetric=True)
    fill(method)
    assert_steps_equal(method, Plain(method), "pair")


def test_small_crops_are_queries_of_the_large_key():
    method = build()
    fill(method)
    assert_steps_equal(method, Plain(method), "pair", crops=2)


@pytest.mark.parametrize("symmetric", [False, True])
def test_keys_fill_the_bank(symmetric):
    method = build(symmetric=symmetric)
    expected = method.bank.clone()
    given = made(0)
    with torch.no_grad():
        keys = [F.normalize(method.key_encoder(x)) for x in given.views[1 - symmetric :][::-1]]
    expected[: 6 * (1 + symmetric)] = torch.cat(keys)
    method.before_step(0.0)
    method.step(given, options())
    torch.testing.assert_close(method.bank, expected, rtol=1e-12, atol=0)
    assert method.phase == "fill"
    assert not method.velocity.any()


def test_a_full_bank_sets_the_key_encoder():
    method = build()
    assert fill(method) == 3
    assert method.phase == ""
    for slow, fast in zip(
        method.key_encoder.parameters(), method.encoder.parameters(), strict=True
    ):
        torch.testing.assert_close(slow, fast, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("full", [False, True])
def test_resume(full):
    torch.manual_seed(1)
    method = build()
    if full:
        fill(method)
    torch.manual_seed(2)
    assert_resumes(method, build())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bank_size": 0}, "bank_size must be at least 1, got 0"),
        ({"bank_lr": -1.0}, "bank_lr must be in"),
        ({"bank_momentum": 1.0}, "bank_momentum must be in"),
        ({"bank_temperature": 0.0}, "bank_temperature must be above 0, got 0.0"),
        ({"bank_decay": -1.0}, "bank_decay must be in"),
        ({"key_momentum": 1.5}, r"key_momentum must be in \[0, 1\], got 1.5"),
    ],
)
def test_bad_options(given, message):
    with pytest.raises(ValueError, match=message):
        build(**given)


def test_a_bank_has_room_for_the_keys_of_a_step():
    with pytest.raises(ValueError, match="bank_size must be at least 12, the keys of a step"):
        build(bank_size=8, symmetric=True).step(made(0), options())


def test_preset():
    expected = {"method": "adco", "temperature": 0.12, "lr": 0.03, "batch_size": 256}
    own = {"bank_size": 65536, "bank_lr": 3.0, "bank_momentum": 0.9, "bank_temperature": 0.02}
    own |= {"bank_decay": 1e-4, "key_momentum": 0.999, "symmetric": False}
    assert_preset("adco-imagenet", expected, own)
