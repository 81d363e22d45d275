"""CaCo against a plain float64 computation of its own: losses, gradients, labels, bank, state."""

import copy

import pytest
import torch
from bank_cases import BANK, assert_steps_equal, build, fill, tangent
from bank_cases import Plain as PlainAdCo
from queries import WEIGHT, assert_preset, assert_resumes, options
from queries import batch as made
from step_cases import attack
from torch.nn import functional as F

from clae_fast.methods.caco import CaCo


def caco_loss(z, labels, bank, temperature):
    return F.cross_entropy(F.normalize(z) @ F.normalize(bank).T / temperature, labels)


def caco_gradient(z, labels, bank, temperature):
    """Of the loss by the bank, with the sign of every entry that is no positive flipped."""
    u, w = F.normalize(z.detach()), F.normalize(bank)
    s = (u @ w.T / temperature).requires_grad_()
    (ds,) = torch.autograd.grad(F.cross_entropy(s, labels), s)
    flipped = torch.where(F.one_hot(labels, len(bank)).bool(), ds, -ds)
    return tangent(bank, flipped.T @ u / temperature)


class Plain(PlainAdCo):
    """The whole method once more, left to autograd, once its bank is full."""

    def step(self, views, kind):
        (method,) = self.method
        own = method.options
        T, T_bank = own.temperature, own.bank_temperature
        with torch.no_grad():
            k_p, k_q = (F.normalize(self.key_encoder(x)) for x in views[:2])
            y_p, y_q = ((k @ F.normalize(self.bank).T).argmax(1) for k in (k_p, k_q))
        small = len(views) - 2
        share = 0.5 if small else 1.0
        x = views[0].clone().requires_grad_()
        queries = [(x, [y_q], share), (views[1], [y_p], share)]
        queries += [(crop, [y_q, y_p], 1 / small) for crop in views[2:]]
        clean, gradient = 0.0, torch.zeros_like(self.bank)
        for view, labels, weight in queries:
            z = self.encoder(view)
            weight /= len(labels)
            loss = weight * sum(caco_loss(z, y, self.bank, T) for y in labels)
            loss.backward()
            clean = clean + loss.detach()
            gradient += weight * sum(caco_gradient(z, y, self.bank, T_bank) for y in labels)
        adv = x_adv = None
        if kind == "pair":
            x_adv = attack().step(views[0], x.grad)
            adv = share * caco_loss(self.adv_encoder(x_adv), y_q, self.bank, T)
            (WEIGHT * adv).backward()
        self.velocity = own.bank_momentum * self.velocity + gradient + own.bank_decay * self.bank
        self.bank = self.bank - own.bank_lr * self.velocity
        return clean, adv, x_adv


@pytest.mark.parametrize("bank_temperature", [0.2, 0.05])
@pytest.mark.parametrize("kind", ["none", "pair"])
def test_steps_equal_autograd(kind, bank_temperature):
    method = build(CaCo, bank_temperature=bank_temperature)
    fill(method)
    assert_steps_equal(method, Plain(method), kind)


def test_small_crops_are_queries_of_both_labels():
    method = build(CaCo, bank_temperature=0.2)
    fill(method)
    assert_steps_equal(method, Plain(method), "pair", crops=2)


def test_momentum_contrast_fills_the_bank():
    method = build(CaCo, fill_temperature=0.3)
    bank = method.bank.clone()
    given = made(0)
    with torch.no_grad():
        keys = [F.normalize(method.key_encoder(x)) for x in given.views[::-1]]
    plain = copy.deepcopy(method.encoder)
    expected = 0.0
    for x, key in zip(given.views, keys, strict=True):
        logits = F.normalize(plain(x)) @ torch.cat([key, bank]).T / 0.3
        expected += F.cross_entropy(logits, torch.arange(6))
    result = method.step(given, options())
    torch.testing.assert_close(result.loss, expected.detach(), rtol=1e-10, atol=0)
    torch.testing.assert_close(method.bank[:12], torch.cat(keys), rtol=1e-12, atol=0)
    assert torch.equal(method.bank[12:], bank[12:])


def test_the_key_encoders_momentum_grows_to_one():
    method = build(CaCo)
    for progress, momentum in ((0.0, 0.9), (0.5, 0.95), (1.0, 1.0)):
        method.before_step(progress)
        assert float(method.key_momentum) == pytest.approx(momentum, rel=1e-12)
    assert BANK["key_momentum"] == 0.9


@pytest.mark.parametrize("full", [False, True])
def test_resume(full):
    torch.manual_seed(1)
    method = build(CaCo)
    if full:
        fill(method)
    torch.manual_seed(2)
    assert_resumes(method, build(CaCo))


def test_bad_options():
    with pytest.raises(ValueError, match="fill_temperature must be above 0, got 0"):
        build(CaCo, fill_temperature=0.0)


def test_preset():
    expected = {"method": "caco", "temperature": 0.08, "optimizer": "lars"}
    expected |= {"lr": 0.3 * 1024 / 256, "batch_size": 1024, "weight_decay": 1.5e-6}
    own = {"bank_size": 65536, "bank_lr": 3.0, "bank_momentum": 0.9, "bank_temperature": 0.08}
    own |= {"bank_decay": 0.0, "key_momentum": 0.99, "fill_temperature": 0.2}
    assert_preset("caco-imagenet", expected, own)
