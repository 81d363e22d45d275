"""Settings and plain autograd computations that tests of methods with a bank share."""

import copy

import torch
from queries import WEIGHT, options, sgd
from queries import batch as made
from step_cases import attack, encoders
from torch import nn
from torch.nn import functional as F

from clae_fast.methods.adco import AdCo

BANK = {"bank_size": 18, "bank_lr": 0.4, "bank_momentum": 0.8, "bank_temperature": 0.02}
BANK |= {"bank_decay": 0.01, "key_momentum": 0.9}


def build(cls=AdCo, **others):
    """A method over a small ResNet and its twin, in float64."""
    encoder, twin = encoders()
    method = cls(encoder, adversarial=True, **BANK | others)
    method.adv_encoder = twin
    return method


def tangent(W, gradient):
    """What a gradient by unit rows is by the rows themselves."""
    leaf = W.clone().requires_grad_()
    return torch.autograd.grad(F.normalize(leaf), leaf, gradient)[0]


def adco_loss(z, keys, bank, temperature):
    logits = F.normalize(z) @ torch.cat([keys, F.normalize(bank)]).T / temperature
    return F.cross_entropy(logits, torch.arange(len(z)))


def adco_gradient(z, keys, bank, temperature):
    """Of the loss by the bank, with its sign flipped."""
    leaf = bank.clone().requires_grad_()
    loss = adco_loss(z.detach(), keys, leaf, temperature)
    return -torch.autograd.grad(loss, leaf)[0]


class Plain(nn.Module):
    """The whole method once more, left to autograd, once its bank is full."""

    def __init__(self, method):
        super().__init__()
        # what the two encoders share, their copies share
        copies = copy.deepcopy(nn.ModuleList([method.encoder, method.adv_encoder]))
        self.encoder, self.adv_encoder = copies
        self.key_encoder = copy.deepcopy(method.key_encoder)
        self.bank, self.velocity = method.bank.clone(), method.velocity.clone()
        self.method = [method]

    def step(self, views, kind):
        (method,) = self.method
        own = method.options
        x_p, x_q, *small = views
        with torch.no_grad():
            k_q = F.normalize(self.key_encoder(x_q))
            k_p = F.normalize(self.key_encoder(x_p)) if own.symmetric else None
        share = 0.5 if own.symmetric else 1.0
        x = x_p.clone().requires_grad_()
        queries = [(x, k_q, share)] + [(x_q, k_p, share)] * own.symmetric
        queries += [(crop, k_q, 1.0) for crop in small]
        clean, gradient = 0.0, torch.zeros_like(self.bank)
        for view, keys, weight in queries:
            z = self.encoder(view)
            loss = weight * adco_loss(z, keys, self.bank, own.temperature)
            loss.backward()
            clean = clean + loss.detach()
            gradient += weight * adco_gradient(z, keys, self.bank, own.bank_temperature)
        adv = x_adv = None
        if kind == "pair":
            x_adv = attack().step(x_p, x.grad)
            adv = share * adco_loss(self.adv_encoder(x_adv), k_q, self.bank, own.temperature)
            (WEIGHT * adv).backward()
        self.velocity = own.bank_momentum * self.velocity + gradient + own.bank_decay * self.bank
        self.bank = self.bank - own.bank_lr * self.velocity
        return clean, adv, x_adv

    @torch.no_grad()
    def follow(self):
        momentum = float(self.method[0].key_momentum)
        for slow, fast in zip(
            self.key_encoder.parameters(), self.encoder.parameters(), strict=True
        ):
            slow.copy_(momentum * slow + (1 - momentum) * fast)


def fill(method):
    """Steps until the bank is full, and what ends that phase."""
    number = 0
    while method.phase == "fill":
        method.before_step(0.0)
        if method.phase == "fill":
            method.step(made(100 + number), options())
            method.after_step()
            number += 1
    method.zero_grad()
    return number


def assert_steps_equal(method, plain, kind, *, crops=0):
    optimizers = sgd(method), sgd(plain)
    for number in range(3):
        given = made(number, crops=crops)
        method.before_step(number / 3)
        result = method.step(given, options(kind))
        clean, adv, x_adv = plain.step(given.views, kind)
        torch.testing.assert_close(result.loss, clean, rtol=1e-10, atol=0)
        if kind == "pair":
            torch.testing.assert_close(result.adv_loss, adv.detach(), rtol=1e-10, atol=0)
            assert torch.equal(result.x_adv, x_adv)
        for name, weight in plain.named_parameters():
            found = method.get_parameter(name).grad
            if weight.grad is None:
                assert found is None, name
            else:
                torch.testing.assert_close(found, weight.grad, rtol=1e-7, atol=1e-11)
        torch.testing.assert_close(method.velocity, plain.velocity, rtol=1e-7, atol=1e-11)
        torch.testing.assert_close(method.bank, plain.bank, rtol=1e-9, atol=1e-11)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        method.after_step()
        plain.follow()
