"""Synchronized BatchNorm: W processes normalize as one with the whole batch does."""

import copy

import processes
import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from clae_fast.distributed import World
from clae_fast.nn import adversarial_twin
from clae_fast.nn.sync_norm import SyncBatchNorm, convert

SIZES = (2, 4)
LAYERS = {
    "1d": (lambda: nn.BatchNorm1d(3), (3,)),
    "1d, sequences": (lambda: nn.BatchNorm1d(3), (3, 5)),
    "2d": (lambda: nn.BatchNorm2d(3, eps=1e-3, momentum=0.3), (3, 4, 2)),
    "3d": (lambda: nn.BatchNorm3d(2), (2, 3, 1, 2)),
    "without affine": (lambda: nn.BatchNorm2d(3, affine=False), (3, 2, 2)),
    "cumulative": (lambda: nn.BatchNorm1d(3, momentum=None), (3,)),
    "without buffers": (lambda: nn.BatchNorm1d(3, track_running_stats=False), (3,)),
}


def example(build, shape, rows):
    """A layer with weights that are not one and zero, three batches far from zero, cotangents."""
    generator = torch.Generator().manual_seed(1)
    norm = build().double()
    for parameter in norm.parameters():
        parameter.data.uniform_(-2, 2, generator=generator)
    x, dy = torch.randn(2, 3, rows, *shape, generator=generator, dtype=torch.float64)
    return norm, 100 + 3 * x, dy


def step(norm, x, dy):
    x = x.clone().requires_grad_()
    y = norm(x)
    y.backward(dy)
    return y.detach(), x.grad


def part(x, bounds, rank):
    return x[bounds[rank] : bounds[rank + 1]]


def check_layers(world):
    # as many rows on each, and not
    for bounds in ((0, 2, 4, 6, 8), (0, 1, 4, 6, 11)):
        bounds = bounds[: world.size + 1]
        for build, shape in LAYERS.values():
            whole, xs, dys = example(build, shape, bounds[-1])
            norm = convert(copy.deepcopy(whole), world)
            for x, dy in zip(xs, dys, strict=True):
                expected = step(whole, x, dy)
                found = step(norm, part(x, bounds, world.rank), part(dy, bounds, world.rank))
                for all_rows, own in zip(expected, found, strict=True):
                    close(own, part(all_rows, bounds, world.rank))
            for mine, its in zip(norm.parameters(), whole.parameters(), strict=True):
                close(world.all_reduce(mine.grad), its.grad)
            close(norm.state_dict(), whole.state_dict())
            if whole.running_mean is not None:
                x = part(xs[0], bounds, world.rank)
                close(norm.eval()(x), whole.eval()(x))


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("size", SIZES)
def test_equals_one_process_with_the_whole_batch(tmp_path, size):
    processes.run(check_layers, size, tmp_path)


def check_half(world):
    x = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    x = x.to(memory_format=torch.channels_last)
    own = world.own_rows(x)
    for dtype in (torch.float32, torch.bfloat16):
        whole = nn.BatchNorm2d(3)
        norm = convert(copy.deepcopy(whole), world)
        # under autocast a layer in fp32 meets activations in half precision
        with torch.autocast("cpu", dtype=torch.bfloat16):
            expected, y = whole(x.to(dtype)), norm(own.to(dtype).requires_grad_())
        assert y.dtype == dtype
        assert y.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(y, world.own_rows(expected))
        y.sum().backward()
        assert norm.weight.grad.dtype == torch.float32
        torch.testing.assert_close(norm.state_dict(), whole.state_dict())


def test_half_precision_and_layout(tmp_path):
    processes.run(check_half, 2, tmp_path)


def check_held(world):
    norm = convert(nn.BatchNorm1d(3).double(), world)
    before = copy.deepcopy(norm.state_dict())
    x = torch.randn(4, 3, dtype=torch.float64) + world.rank
    # as an attack's forward pass does
    norm.track_running_stats = False
    found = norm(x)
    norm.track_running_stats = True
    close(norm.state_dict(), before)
    close(found, norm(x))
    # frozen weights need no gradient, a constant input no collective
    norm.requires_grad_(False)
    norm(x.requires_grad_()).sum().backward()
    assert norm.weight.grad is None
    norm.requires_grad_(True)
    norm(x.detach()).square().sum().backward()
    assert norm.weight.grad is not None


def test_held_buffers_and_wanted_gradients(tmp_path):
    processes.run(check_held, 2, tmp_path)


class TestConvert:
    world = World(rank=1, size=2, local_rank=1, device=torch.device("cpu"))

    def test_keeps_names_and_the_tensors_themselves(self):
        network = nn.ModuleDict({"a": nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))})
        network["tied"] = network["a"][1]
        before = {**dict(network.named_parameters()), **dict(network.named_buffers())}
        names = list(network.state_dict())
        assert convert(network.eval(), self.world) is network
        after = {**dict(network.named_parameters()), **dict(network.named_buffers())}
        assert list(network.state_dict()) == names
        assert after.keys() == before.keys()
        assert all(after[name] is before[name] for name in before)
        assert network["tied"] is network["a"][1]
        assert isinstance(network["tied"], SyncBatchNorm)
        assert not network["tied"].training
        assert convert(network, self.world)["tied"] is network["tied"]

    def test_alone_nothing_changes(self):
        norm = nn.BatchNorm1d(3)
        assert convert(norm, World.single()) is norm

    @pytest.mark.parametrize("first", ["twin", "convert"])
    def test_a_twin_before_or_after(self, first):
        encoder = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        if first == "convert":
            convert(encoder, self.world)
        pair = nn.ModuleList([encoder, adversarial_twin(encoder)])
        convert(pair, self.world)
        assert all(isinstance(tree[1], SyncBatchNorm) for tree in pair)
        assert pair[1][1].momentum == 0.01
        assert pair[0][0].weight is pair[1][0].weight
        assert pair[0][1].weight is not pair[1][1].weight
        assert pair[1][1].world is self.world

    @pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0"])
    def test_timms_layers(self, name):
        timm = pytest.importorskip("timm")
        model = timm.create_model(name, num_classes=0).eval()
        before = copy.deepcopy(model)
        convert(model, self.world)
        norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        assert norms
        assert all(type(norm) is SyncBatchNorm for norm in norms)
        x = torch.rand(1, 3, 32, 32)
        torch.testing.assert_close(model(x), before(x))

    def test_what_computes_something_else_is_refused(self):
        class Louder(nn.BatchNorm1d):
            def forward(self, x):
                return 2 * super().forward(x)

        with pytest.raises(TypeError, match="cannot synchronize Louder"):
            convert(nn.Sequential(Louder(3)), self.world)
