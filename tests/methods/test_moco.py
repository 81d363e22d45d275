"""MoCo against a plain float64 computation of its own: losses, gradients, keys, queue, state."""

import copy

import processes
import pytest
import torch
from queries import WEIGHT, assert_preset, assert_resumes, batch, options, sgd
from queue_cases import (
    MOCO_V2,
    QUEUE,
    QUEUE_V2,
    Plain,
    assert_steps_equal,
    build,
    moco_loss,
    same_tensors,
)
from step_cases import norm_buffers
from torch import nn
from torch.nn import functional as F

from clae_fast.config.layers import resolve
from clae_fast.distributed import World
from clae_fast.distributed.reducer import GradientReducer
from clae_fast.methods.moco import MoCo
from clae_fast.nn.grouped_norm import grouped_norm
from clae_fast.nn.split_norm import dealt
from clae_fast.nn.sync_norm import convert
from clae_fast.steps.batch import Batch
from clae_fast.training.trainer import Trainer


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
