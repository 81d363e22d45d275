"""Momentum twins: what they share, how they follow, and what they leave alone."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from clae_fast.nn.momentum import cosine_momentum, follow, momentum_twin


def encoder() -> nn.Sequential:
    layers = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Softplus(), nn.Flatten(), nn.Linear(64, 5))
    return nn.Sequential(*layers).double()


def images(seed: int) -> torch.Tensor:
    return torch.rand(
        5, 3, 6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def test_the_twin_is_a_copy_that_nothing_trains():
    module = encoder()
    before = copy.deepcopy(module.state_dict())
    twin = momentum_twin(module)
    assert twin.training
    assert torch.equal(twin(images(0)), module(images(0)))
    assert not any(weight.requires_grad for weight in twin.parameters())
    assert all(weight.requires_grad for weight in module.parameters())
    own = {tensor.data_ptr() for tensor in twin.state_dict().values()}
    assert not own & {tensor.data_ptr() for tensor in module.state_dict().values()}
    twin(images(1))
    assert torch.equal(module[0].weight, before["0.weight"])
    # statistics of the keys it has seen, not of the queries
    assert twin[1].num_batches_tracked == 2
    assert module[1].num_batches_tracked == 1


def test_eval_mode_is_kept():
    assert not momentum_twin(encoder().eval()).training


@pytest.mark.parametrize("momentum", [0.0, 0.75, 1.0])
def test_parameters_follow_and_buffers_do_not(momentum):
    module = encoder()
    twin = momentum_twin(module)
    for _ in range(3):
        module(images(2))
    with torch.no_grad():
        for weight in module.parameters():
            weight += torch.randn_like(weight)
    slow, buffers = copy.deepcopy(twin), [buffer.clone() for buffer in twin.buffers()]
    for steps in (1, 2):
        assert follow(twin, module, torch.tensor(momentum, dtype=torch.float64)) is None
        for name, weight in twin.named_parameters():
            old, new = slow.get_parameter(name), module.get_parameter(name)
            expected = momentum**steps * old + (1 - momentum**steps) * new
            torch.testing.assert_close(weight, expected, rtol=1e-14, atol=1e-15)
            assert weight.grad is None
            assert not weight.requires_grad
    for buffer, expected in zip(twin.buffers(), buffers, strict=True):
        assert torch.equal(buffer, expected)


def test_strides_and_ties_stay():
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(2, 2), nn.Linear(2, 2))
    module.to(memory_format=torch.channels_last)
    module[2].weight = module[1].weight
    twin = momentum_twin(module)
    with torch.no_grad():
        module[1].weight.zero_()
    follow(twin, module, torch.tensor(0.5))
    assert twin[2].weight is twin[1].weight
    assert twin[0].weight.is_contiguous(memory_format=torch.channels_last)
    # a weight that has two places moves once
    torch.testing.assert_close(twin[1].weight, momentum_twin(module)[1].weight + twin[1].weight)


def test_a_process_group_is_shared():
    norm = nn.SyncBatchNorm(3, process_group=torch.Generator())
    assert momentum_twin(nn.Sequential(norm))[0].process_group is norm.process_group


def test_it_follows_a_moving_encoder_as_a_mean_of_its_past():
    module = nn.Linear(2, 1, bias=False).double()
    twin = momentum_twin(module)
    past = [module.weight.detach().clone()]
    for step in range(4):
        with torch.no_grad():
            module.weight.copy_(F.normalize(module.weight + step))
        past.append(module.weight.detach().clone())
        follow(twin, module, torch.tensor(0.9, dtype=torch.float64))
    weights = [0.9**4, *(0.1 * 0.9**age for age in (3, 2, 1, 0))]
    mean = sum(weight * then for weight, then in zip(weights, past, strict=True))
    torch.testing.assert_close(twin.weight.detach(), mean, rtol=1e-13, atol=0)


def test_the_momentum_grows_to_one():
    assert cosine_momentum(0.0, 0.99) == 0.99
    assert cosine_momentum(0.5, 0.99) == pytest.approx(0.995)
    assert cosine_momentum(1.0, 0.99) == 1.0
    values = [cosine_momentum(step / 10, 0.9) for step in range(11)]
    assert values == sorted(values)


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"encoder must be a torch\.nn\.Module, got str"):
        momentum_twin("resnet18")
