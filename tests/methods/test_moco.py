"""MoCo against a plain float64 computation of its own: losses, gradients, keys, queue, state."""

import copy
import dataclasses

import processes
import pytest
import torch
from queries import WEIGHT, assert_preset, assert_resumes, batch, options, sgd
from test_step import attack, encoders, norm_buffers
from torch import nn
from torch.nn import functional as F

from clae_fast.batch import Batch
from clae_fast.data import RECIPES
from clae_fast.distributed import World
from clae_fast.methods.moco import MoCo
from clae_fast.nn.grouped_norm import grouped_norm
from clae_fast.nn.split_norm import dealt
from clae_fast.nn.sync_norm import convert
from clae_fast.reducer import GradientReducer
from clae_fast.settings import resolve
from clae_fast.trainer import Trainer

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
    symmetric = method.symmetric
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


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("kind", ["none", "pair"])
def test_steps_equal_autograd(kind, symmetric):
    method = build(symmetric=symmetric)
    assert_steps_equal(method, Plain(method), kind, steps=4)


def test_small_crops_are_queries_of_the_large_key():
    method = build()
    assert method.small_crops
    assert_steps_equal(method, Plain(method), "pair", crops=2)


def test_loss_and_gradient():
    method = build(queue_size=31, temperature=0.07)
    z = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    (target,) = method.targets(batch(0), options())
    torch.testing.assert_close(target.rows.norm(dim=1), torch.ones(6, dtype=torch.float64))
    found = method.loss(z, target)
    expected = moco_loss(z, target.rows, method.queue, 0.07)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    (dz,) = torch.autograd.grad(found, z)
    (reference,) = torch.autograd.grad(expected, z)
    torch.testing.assert_close(dz, reference, rtol=1e-9, atol=1e-13)


def test_the_queue_is_a_ring_of_the_last_keys():
    method = build()
    queue = method.queue
    address = queue.data_ptr()
    expected = queue.clone()
    at = 0
    for number in range(7):
        given = batch(number)
        (target,) = method.targets(given, options())
        method.update([], [target])
        for key in target.rows:
            expected[at] = key
            at = (at + 1) % QUEUE
        assert torch.equal(method.queue, expected)
        assert int(method.pointer) == at
    # written in place
    assert method.queue.data_ptr() == address


def test_split_norm():
    method = build(norm_splits=3)
    plain = copy.deepcopy(method)
    given = batch(0)
    result = method.step(given, options("pair"))
    keys = F.normalize(dealt(plain.key_encoder, given.views[1], 3))
    assert torch.equal(method.queue[:6], keys)
    with grouped_norm(plain.encoder, 3, split=True):
        z = plain.encoder(given.views[0])
    loss = moco_loss(z, keys, plain.queue)
    torch.testing.assert_close(result.loss, loss.detach(), rtol=1e-12, atol=0)
    with grouped_norm(plain.adv_encoder, 3, split=True):
        z_adv = plain.adv_encoder(result.x_adv)
    adv = moco_loss(z_adv, keys, plain.queue)
    torch.testing.assert_close(result.adv_loss, adv.detach(), rtol=1e-12, atol=0)
    (loss + WEIGHT * adv).backward()
    for name, weight in plain.named_parameters():
        if weight.requires_grad:
            found = method.get_parameter(name).grad
            torch.testing.assert_close(found, weight.grad, rtol=1e-8, atol=1e-12)
    same_tensors(norm_buffers(method), norm_buffers(plain))


def test_resume():
    torch.manual_seed(1)
    method = build()
    torch.manual_seed(2)
    again = build()
    assert not torch.equal(method.queue, again.queue)
    assert_resumes(method, again)


def test_bad_options():
    for given, message in (
        ({"queue_size": 0}, "queue_size must be at least 1, got 0"),
        ({"norm_splits": 0}, "norm_splits must be at least 1, got 0"),
        ({"key_momentum": 1.5}, r"key_momentum must be in \[0, 1\], got 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            build(**given)
    with pytest.raises(TypeError, match="encoder must have dim, the length of its projections"):
        MoCo(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="queue_size must be at least 12, the keys of a step"):
        build(queue_size=8, symmetric=True).step(batch(0), options())
    with pytest.raises(
        ValueError, match="norm_splits must divide the 6 rows encoded at once, got 4"
    ):
        build(norm_splits=4).step(batch(0), options())


def check_processes(world):
    for kind, symmetric in (("none", True), ("pair", False)):
        # the same queue, whoever draws it
        torch.manual_seed(0)
        alone = build(symmetric=symmetric)
        together = convert(copy.deepcopy(alone), world)
        found = train(together, world, kind)
        expected = train(alone, World.single(), kind)
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
        world.require_equal(together)


def train(method, world, kind):
    reducer = GradientReducer(method.parameters(), world)
    optimizer = sgd(method)
    losses = []
    for number in range(3):
        views = tuple(world.own_rows(view) for view in batch(number, n=8).views)
        reducer.zero_grad()
        taken = options(kind, last_backward=reducer.last_backward, world=world)
        losses.append(method.step(Batch(views), taken).loss)
        reducer.finish()
        optimizer.step()
        method.after_step()
    return losses, method.state_dict()


def test_two_processes_equal_one(tmp_path):
    processes.run(check_processes, 2, tmp_path)


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


def test_presets():
    assert_preset("moco-imagenet", MOCO_V2 | {"method": "moco"}, QUEUE_V2)
    # its colab/moco_cifar10_demo.ipynb
    cifar = {
        "method": "moco",
        "dataset": "cifar10",
        "image_size": 32,
        "crop_min_scale": 0.08,
        "blur_prob": (0.0, 0.0),
        "mean": (0.4914, 0.4822, 0.4465),
        "std": (0.2023, 0.1994, 0.2010),
        "temperature": 0.1,
        "arch": "resnet18",
        "head_layers": 1,
        "lr": 0.06,
        "weight_decay": 5e-4,
        "batch_size": 512,
    }
    own = QUEUE_V2 | {"queue_size": 4096, "key_momentum": 0.99}
    assert_preset("moco-cifar10", MOCO_V2 | cifar, own)


def test_the_key_encoder_computes_in_the_runs_precision():
    config = resolve({"device": "cpu", "method": "moco", "attack": "none", "precision": "bf16"})
    assert Trainer(config).method.key_encoder.autocast == torch.bfloat16
