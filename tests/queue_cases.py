"""Settings and plain autograd computations that tests of methods with a queue share."""

import copy
import dataclasses

import torch
from queries import WEIGHT, batch, options, sgd
from step_cases import attack, encoders
from torch import nn
from torch.nn import functional as F

from clae_fast.data import RECIPES
from clae_fast.methods.moco import MoCo

QUEUE = 20


def build(cls=MoCo, **options):
    """A method over a small ResNet and its twin, in float64."""
    encoder, twin = encoders()
    built = cls(encoder, adversarial=True, **{"queue_size": QUEUE, "key_momentum": 0.8, **options})
    built.adv_encoder = twin
    return built


def moco_loss(z, keys, queue, temperature=0.2):
    """The definition, with all logits in one matrix."""
    u = F.normalize(z)
    logits = torch.cat([(u * keys).sum(1, keepdim=True), u @ queue.T], 1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(z), dtype=torch.int64))


class Plain(nn.Module):
    """The whole method once more, left to autograd, with a queue that moves."""

    def __init__(self, method, loss=moco_loss):
        super().__init__()
        # what the two encoders share, their copies share
        copies = copy.deepcopy(nn.ModuleList([method.encoder, method.adv_encoder]))
        self.encoder, self.adv_encoder = copies
        self.key_encoder = copy.deepcopy(method.key_encoder)
        # the oldest first
        self.queue = method.queue.clone()
        assert method.pointer == 0
        self.momentum = float(method.key_momentum)
        self.loss = loss

    def step(self, batch, kind, symmetric=False):
        """Gradients of a step, and its losses; the queue takes the keys."""
        x_p, x_q, *small = batch.views
        with torch.no_grad():
            k_q = F.normalize(self.key_encoder(x_q))
            k_p = F.normalize(self.key_encoder(x_p)) if symmetric else None
        queue = self.queue
        x = x_p.clone().requires_grad_()
        share = 0.5 if symmetric else 1.0
        clean = share * self.loss(self.encoder(x), k_q, queue)
        clean.backward()
        if symmetric:
            other = share * self.loss(self.encoder(x_q), k_p, queue)
            other.backward()
            clean = clean + other
        for crop in small:
            further = self.loss(self.encoder(crop), k_q, queue) / len(small)
            further.backward()
            clean = clean + further
        adv = x_adv = None
        if kind == "pair":
            x_adv = attack().step(x_p, x.grad)
            adv = share * self.loss(self.adv_encoder(x_adv), k_q, queue)
            (WEIGHT * adv).backward()
        keys = torch.cat([k_q, k_p]) if symmetric else k_q
        self.queue = torch.cat([queue, keys])[len(keys) :]
        return clean, adv, x_adv

    @torch.no_grad()
    def follow(self):
        for slow, fast in zip(
            self.key_encoder.parameters(), self.encoder.parameters(), strict=True
        ):
            slow.copy_(self.momentum * slow + (1 - self.momentum) * fast)


def same_tensors(found, expected):
    """Of state dictionaries, those that both have."""
    for name in expected.keys() & found.keys():
        torch.testing.assert_close(
            found[name],
            expected[name],
            rtol=1e-9,
            atol=1e-11,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def assert_steps_equal(method, plain, kind, *, steps=3, crops=0):
    """Losses, views, gradients, weights, keys' encoder and queue, for several steps."""
    optimizers = sgd(method), sgd(plain)
    symmetric = method.options.large_queries == 2
    for number in range(steps):
        given = batch(number, crops=crops)
        torch.manual_seed(number)
        result = method.step(given, options(kind))
        torch.manual_seed(number)
        clean, adv, x_adv = plain.step(given, kind, symmetric)
        torch.testing.assert_close(result.loss, clean.detach(), rtol=1e-10, atol=0)
        if kind == "pair":
            torch.testing.assert_close(result.adv_loss, adv.detach(), rtol=1e-10, atol=0)
            assert torch.equal(result.x_adv, x_adv)
        for name, weight in plain.named_parameters():
            found = method.get_parameter(name).grad
            if weight.grad is None:
                assert found is None, name
            else:
                torch.testing.assert_close(found, weight.grad, rtol=1e-8, atol=1e-12)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        method.after_step()
        plain.follow()
        same_tensors(method.state_dict(), plain.state_dict())
    oldest_first = method.queue.roll(-int(method.pointer), 0)
    torch.testing.assert_close(oldest_first, plain.queue, rtol=1e-9, atol=1e-11)


# Chen et al., 2020: the command in the README of github.com/facebookresearch/moco
MOCO_V2 = {
    **dataclasses.asdict(RECIPES["moco_v2"]),
    "attack": "none",
    "dataset": "folder",
    "image_size": 224,
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "temperature": 0.2,
    "arch": "resnet50",
    "head_layers": 2,
    "head_norm": "none",
    "hidden_dim": 2048,
    "proj_dim": 128,
    "optimizer": "sgd",
    "lr": 0.03,
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "decay_1d": True,
    "schedule": "cosine",
    "warmup_epochs": 0,
    "epochs": 200,
    "batch_size": 256,
}


QUEUE_V2 = {"queue_size": 65536, "key_momentum": 0.999, "norm_splits": 8, "symmetric": False}
