"""Processes as one world: global losses, summed gradients, and training equal to one process's."""

import copy

import processes
import pytest
import torch
from torch import nn

from clae_fast import distributed, nt_xent, tied_nt_xent, uel
from clae_fast.attack import LinfAttack
from clae_fast.distributed import World, world
from clae_fast.distributed.reducer import GradientReducer
from clae_fast.errors import LostWorkerError
from clae_fast.methods import SimCLR
from clae_fast.nn.sync_norm import convert
from clae_fast.steps.batch import Batch
from clae_fast.steps.options import StepOptions

SIZES = (2, 4)


def close(found, expected, tolerance=1e-12):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def lopsided(z_a, z_b):
    """A loss in which every row meets every other, and the operands differ."""
    return (z_a @ z_b.T).softmax(1).diagonal().log().sum() + z_b.square().sum().sqrt()


def constant_anchor(z_a, z_b):
    assert not z_a.requires_grad
    assert z_b.requires_grad
    return nt_xent(z_a, z_b)


def check_collectives(world):
    x = rows(3, 2, seed=world.rank)
    gathered = world.all_gather(x.T)
    close(gathered, torch.cat([rows(3, 2, seed=rank).T for rank in range(world.size)]))
    close(world.own_rows(gathered), x.T)
    close(world.all_reduce(x.clone()), sum(rows(3, 2, seed=rank) for rank in range(world.size)))
    assert world.broadcast({"rank": world.rank}) == {"rank": 0}
    assert world.local_batch(3 * world.size) == 3
    with pytest.raises(ValueError, match=f"divisible by the {world.size} processes, got 7"):
        world.local_batch(7)
    world.barrier()
    firsts = world.all_gather(torch.tensor([distributed.reports_first()]))
    assert firsts.sum() == 1

    torch.manual_seed(world.rank)
    module = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))
    module.to(memory_format=torch.channels_last)
    world.share(module)
    torch.manual_seed(0)
    close(module[0].bias, nn.Conv2d(2, 3, 3).bias)
    assert module[0].weight.is_contiguous(memory_format=torch.channels_last)
    world.require_equal(module)
    if world.rank == 1:
        # by the last bit of one weight
        weight = module[0].weight.data
        weight[0, 0, 0, 0] = weight[0, 0, 0, 0].nextafter(torch.tensor(9.0))
    with pytest.raises(RuntimeError, match="weights are no longer the same"):
        world.require_equal(module)


@pytest.mark.parametrize("size", SIZES)
def test_collectives(tmp_path, size):
    processes.run(check_collectives, size, tmp_path)


def check_losses(world):
    z_a, z_b = rows(2, 4 * world.size, 5)
    for loss in (nt_xent, uel, lopsided):
        whole = [z.clone().requires_grad_() for z in (z_a, z_b)]
        expected = loss(*whole)
        expected.backward()
        own = [world.own_rows(z).clone().requires_grad_() for z in (z_a, z_b)]
        found = world.gather_loss(loss)(*own)
        found.backward()
        close(found, expected)
        for mine, its in zip(own, whole, strict=True):
            close(mine.grad, world.own_rows(its.grad))
        # a constant operand stays one
        world.gather_loss(constant_anchor)(own[0].detach(), own[1])
    close(world.gather_grad(tied_nt_xent)(world.own_rows(z_a)), world.own_rows(tied_nt_xent(z_a)))


@pytest.mark.parametrize("size", SIZES)
def test_losses_are_over_all_rows(tmp_path, size):
    processes.run(check_losses, size, tmp_path)


class Shared(nn.Module):
    """Weights in parts: some for every pass, some for an earlier one, some for none."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3).to(memory_format=torch.channels_last)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.last = nn.Linear(4, 3)
        self.early = nn.Linear(3, 3, dtype=torch.float64)
        self.unused = nn.Parameter(torch.ones(5))

    def forward(self, x):
        return self.last(self.frozen(self.first(x).mean((2, 3))))


def reduced_step(reducer, module, x):
    reducer.zero_grad()
    module.early(module(x).double()).sum().backward()
    with reducer.last_backward():
        module(x).square().sum().backward()
    reducer.finish()
    return {name: p.grad for name, p in module.named_parameters()}


def check_reducer(world):
    torch.manual_seed(0)
    whole = Shared()
    module = copy.deepcopy(whole)
    x = torch.randn(2 * world.size, 2, 5, 5)
    # the twin's parameters again, as chained lists have them
    parameters = [*module.parameters(), *module.first.parameters()]
    reducer = GradientReducer(parameters, world, bucket_bytes=64)
    alone = GradientReducer(whole.parameters(), World.single())
    sent = []
    start = World.start_all_reduce

    def start_all_reduce(self, flat):
        sent.append((flat.numel(), reducer._overlaps))
        return start(self, flat)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(World, "start_all_reduce", start_all_reduce)
        for first in (True, False, False):
            sent.clear()
            expected = reduced_step(alone, whole, x)
            found = reduced_step(reducer, module, world.own_rows(x))
            for name, grad in expected.items():
                if grad is None:
                    assert found[name] is None, name
                    continue
                torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-5)
                assert found[name].stride() == dict(module.named_parameters())[name].stride()
            # early in fp64, last, first, unused: in one order, as soon as each is known
            sizes, overlapped = zip(*sent, strict=True)
            assert sizes == (14, 16, 76, 8)
            assert overlapped == (False,) * 4 if first else (True,) * 4
    assert {name for name, grad in found.items() if grad is None} == {
        "frozen.weight",
        "frozen.bias",
        "unused",
    }

    reducer.zero_grad()
    with pytest.raises(RuntimeError, match=r"finish\(\) comes after"):
        reducer.finish()
    for parameter in module.parameters():
        parameter.grad = None
    with (
        pytest.raises(RuntimeError, match="not in its bucket: zero gradients by reducer"),
        reducer.last_backward(),
    ):
        module(world.own_rows(x)).sum().backward()
    # one process's infinity is everyone's
    reducer = GradientReducer(module.parameters(), world)
    reducer.zero_grad()
    with reducer.last_backward():
        (module(world.own_rows(x)).sum() * (float("inf") if world.leads else 1.0)).backward()
    reducer.finish()
    assert not module.last.weight.grad.isfinite().any()


@pytest.mark.parametrize("size", SIZES)
def test_gradients_are_summed(tmp_path, size):
    processes.run(check_reducer, size, tmp_path)


class Block(nn.Module):
    def __init__(self, width, norm):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=not norm)
        self.norm = nn.BatchNorm2d(width) if norm else nn.Identity()

    def forward(self, x):
        return x + self.norm(self.conv(x)).relu()


def build(norm):
    torch.manual_seed(0)
    encoder = nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6) if norm else nn.Identity(),
        nn.ReLU(),
        Block(6, norm),
        nn.AvgPool2d(3),
        nn.Flatten(),
        nn.Linear(24, 8),
    )
    return SimCLR(encoder.double(), temperature=0.3, adversarial=True)


def train(method, world, kind, **options):
    """Five steps on this process's rows of batches of eight."""
    attack = LinfAttack(eps=0.05)
    reducer = GradientReducer(method.parameters(), world, bucket_bytes=2000)
    optimizer = torch.optim.SGD(method.parameters(), lr=0.2, momentum=0.9, weight_decay=0.01)
    losses = []
    for number in range(5):
        views = [world.own_rows(rows(8, 3, 8, 8, seed=2 * number + k)) for k in range(2)]
        reducer.zero_grad()
        result = method.step(
            Batch(views),
            StepOptions(
                kind=kind,
                attack=attack,
                last_backward=reducer.last_backward,
                world=world,
                **options,
            ),
        )
        reducer.finish()
        optimizer.step()
        losses.append(result.loss)
    return torch.stack(losses), method.state_dict()


CASES = {
    "plain": ("none", {}),
    "plain, batched": ("none", {"batched": True}),
    "pair": ("pair", {}),
    "self": ("self", {}),
    "released": ("released", {}),
}


def check_training(world):
    for norm in (True, False):
        for name, (kind, options) in CASES.items():
            expected = train(build(norm), World.single(), kind, **options)
            method = build(norm)
            convert(method, world)
            close(train(method, world, kind, **options), expected, 1e-9)
            world.require_equal(method)
            if norm and name == "pair":
                # BatchNorm by one process's rows trains other weights
                other = train(build(norm), world, kind)[1]["encoder.0.weight"]
                assert (other - expected[1]["encoder.0.weight"]).abs().max() > 1e-3


@pytest.mark.parametrize("size", SIZES)
def test_weights_equal_those_of_one_process(tmp_path, size):
    """All of them after five steps, and the running statistics of both branches, in float64."""
    processes.run(check_training, size, tmp_path)


def check_lost(world):
    world.barrier()
    if world.rank == 1:
        return
    with pytest.raises(LostWorkerError, match="another process of the run is lost: "):
        world.all_reduce(torch.ones(1 << 16))


def leave(world):
    # not by shutdown, which waits
    World.shutdown = lambda _: None
    check_lost(world)


def test_a_lost_worker_is_told_from_other_errors(tmp_path):
    processes.run(leave, 2, tmp_path)


class TestInit:
    def test_alone_without_torchrun(self, monkeypatch):
        for name in ("RANK", "LOCAL_RANK"):
            monkeypatch.delenv(name, raising=False)
        world = distributed.init("cpu")
        assert (world.rank, world.size, world.device) == (0, 1, torch.device("cpu"))
        assert world.gather_loss(nt_xent) is nt_xent
        assert world.gather_grad(tied_nt_xent) is tied_nt_xent
        x = torch.ones(2)
        assert world.all_gather(x) is x
        assert world.all_reduce(x) is x
        assert distributed.reports_first()
        world.barrier()
        world.share(nn.Linear(1, 1))
        world.shutdown()

    @pytest.mark.parametrize(
        ("variables", "device", "message"),
        [
            ({"RANK": "0"}, "cpu", "WORLD_SIZE is not set: start the processes with torchrun"),
            ({"RANK": "a", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "cpu", "RANK must be a number"),
            ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "cpu", "RANK must be below"),
            ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "cpu", "MASTER_ADDR is not set"),
        ],
    )
    def test_wrong_variables(self, monkeypatch, variables, device, message):
        for name in world._VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ValueError, match=message):
            distributed.init(device)

    def test_a_gpu_each(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        chosen = []
        monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        assert world._own_device("auto", 1) == torch.device("cuda", 1)
        assert chosen == [torch.device("cuda", 1)]
        with pytest.raises(ValueError, match="cpu, cuda or auto for several processes"):
            world._own_device("cuda:0", 0)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
        with pytest.raises(ValueError, match=r"3 processes on this machine need a GPU each.* 2"):
            world._own_device("cuda", 0)
