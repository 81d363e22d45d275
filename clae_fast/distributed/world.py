"""The processes that train together, and what they exchange.

Each process has a slice of the global batch and one device. Losses are taken over all rows, and
weight gradients are summed. With synchronized BatchNorm (`clae_fast.nn.sync_norm`) or without any,
W processes compute what one process computes with the whole batch. DistributedDataParallel is not
used: it expects one backward pass in a step, in which every parameter gets its gradient.

One process alone is a `World` too. It communicates nothing and costs nothing.
"""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from clae_fast.distributed.device import pick_device
from clae_fast.errors import LostWorkerError

T = TypeVar("T")
Loss = Callable[[Tensor, Tensor], Tensor]

# how long a process waits for the others, which wait while the first one validates
TIMEOUT = timedelta(minutes=30)
# counts the processes that fail
_failures: Store | None = None
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# integers that are as long as an element
_SAME_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, eq=False)
class World:
    """The processes of a run, seen from one of them.

    All processes have to call a method that communicates, in the same order. It raises
    LostWorkerError where another process is gone.

    Attributes:
        rank: Number of this process, from 0.
        size: How many processes there are.
        local_rank: Number of this process on its machine, from 0.
        device: The device that this process computes on.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @classmethod
    def single(cls, device: torch.device | str = "cpu") -> "World":
        """The world of one process alone."""
        return cls(rank=0, size=1, local_rank=0, device=torch.device(device))

    def __deepcopy__(self, memo: dict[int, Any]) -> "World":
        # a module that holds the world may be copied, but there is one world
        return self

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes, prints and evaluates."""
        return self.rank == 0

    def local_batch(self, batch_size: int) -> int:
        """How many rows of a global batch each process has.

        Raises:
            ValueError: The number of processes does not divide `batch_size`.
        """
        if batch_size % self.size:
            raise ValueError(
                f"batch_size must be divisible by the {self.size} processes, got {batch_size}"
            )
        return batch_size // self.size

    def barrier(self) -> None:
        """Waits until every process is here."""
        if self.size > 1:
            with _others_needed():
                dist.barrier()

    def broadcast(self, value: T) -> T:
        """The first process's `value`, anything that can be pickled."""
        if self.size == 1:
            return value
        values = [value]
        with _others_needed():
            dist.broadcast_object_list(values, device=self.device)
        return values[0]

    @torch.no_grad()
    def share(self, module: nn.Module) -> None:
        """Sets parameters and buffers of `module` to the first process's values."""
        if self.size == 1:
            return
        for tensor in (*module.parameters(), *module.buffers()):
            values = tensor.contiguous()
            with _others_needed():
                dist.broadcast(values, src=0)
            tensor.copy_(values)

    @torch.no_grad()
    def require_equal(self, module: nn.Module) -> None:
        """Checks that all processes have the same parameters, by exchanging one number each.

        Raises:
            RuntimeError: The parameters differ.
        """
        if self.size == 1:
            return
        bits = [p.detach().view(_SAME_SIZE[p.element_size()]).sum() for p in module.parameters()]
        sums = self.all_gather(torch.stack(bits).sum()[None])
        if bool((sums != sums[0]).any()):
            raise RuntimeError("the processes' weights are no longer the same")

    def all_gather(self, x: Tensor) -> Tensor:  # [N, ...] -> [W N, ...]
        """The rows of `x` of all processes by rank; `x` has one shape everywhere."""
        if self.size == 1:
            return x
        gathered = x.new_empty(self.size * x.shape[0], *x.shape[1:])
        with _others_needed():
            dist.all_gather_into_tensor(gathered, x.contiguous())
        return gathered

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sums `x` over the processes, in place."""
        if self.size > 1:
            self.start_all_reduce(x)()
        return x

    def start_all_reduce(self, x: Tensor) -> Callable[[], None]:
        """Starts to sum `x` in place and returns a function that waits for the sum."""
        with _others_needed():
            work = dist.all_reduce(x, async_op=True)

        def wait() -> None:
            with _others_needed():
                work.wait()

        return wait

    def own_rows(self, x: Tensor) -> Tensor:  # [W N, ...] -> [N, ...]
        """This process's rows out of those of all processes."""
        rows = self.local_batch(len(x))
        return x[self.rank * rows : (self.rank + 1) * rows]

    def gather(self, z: Tensor) -> Tensor:  # [N, D] -> [W N, D]
        """`all_gather`, differentiable: the gradient of this process's own rows flows back.

        That gradient has to be complete, which it is where every process computes the same loss of
        all rows, as with `gather_loss`.
        """
        if self.size == 1:
            return z
        (rows,) = _Gather.apply(self, z)
        return rows

    def gather_loss(self, loss: Loss) -> Loss:
        """`loss` over the rows of all processes, so that every row has all others as negatives.

        Every process gathers all rows and computes the whole loss. So the value is the same on all
        processes, and the gradient of a process's own rows is complete: it contains the terms of
        other processes' rows. Weight gradients, summed over the processes, are those of one process
        with the global batch. This holds for any loss. Embeddings are exchanged once, in the
        forward pass; the backward pass exchanges nothing.

        The loss is computed W times, at 4 n^2 D FLOPs for each process and value, where n = 2N rows
        are in the global batch. For a pair step with ResNet-18 on 32x32 images (10 GFLOP an image,
        D = 128, two values), that is about N W / 2.4e6 of the step's FLOPs: 1.4 % for N = 4096 on 8
        processes, 10 % for N = 8192 on 30. With ResNet-50 on 224x224 images N can be 7 times
        larger.

        A parameter of the loss itself gets its whole gradient on every process, and must not be
        summed by a `clae_fast.distributed.reducer.GradientReducer`.

        Args:
            loss: `loss(z_a, z_b) -> scalar` of rows [W N, D], deterministic.

        Returns:
            A function of this process's rows, [N, D], with as many rows on every process.
        """
        if self.size == 1:
            return loss
        return lambda z_a, z_b: loss(*_Gather.apply(self, z_a, z_b))

    def gather_grad(self, attack_grad: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """`attack_grad` over the rows of all processes, of which each process gets its own rows.

        Args:
            attack_grad: Maps the embeddings of all rows, [W N, D], to the gradient of a loss there.

        Returns:
            A function that maps this process's embeddings, [N, D], to their gradient, [N, D].
        """
        if self.size == 1:
            return attack_grad
        return lambda z: self.own_rows(attack_grad(self.all_gather(z)))

    @contextmanager
    def one_at_first(self) -> Iterator[None]:
        """Lets a machine's first process go first, so that others find what it downloads."""
        if self.local_rank:
            self.barrier()
        yield
        if not self.local_rank:
            self.barrier()

    def shutdown(self) -> None:
        """Waits for the other processes and leaves the group; each may go on alone."""
        if self.size > 1:
            self.barrier()
            dist.destroy_process_group()


class _Gather(torch.autograd.Function):
    """Gathers the rows of several operands; the backward pass takes the process's own rows."""

    @staticmethod
    def forward(ctx: Any, world: World, *operands: Tensor) -> tuple[Tensor, ...]:
        ctx.world = world
        ctx.set_materialize_grads(False)
        # operands go side by side, so that one collective is enough
        gathered = world.all_gather(torch.cat(operands, dim=1))
        rows = gathered.split([z.shape[1] for z in operands], dim=1)
        wanted = ctx.needs_input_grad[1:]
        ctx.mark_non_differentiable(*(z for z, w in zip(rows, wanted, strict=True) if not w))
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dz: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *(None if d is None else ctx.world.own_rows(d) for d in dz)


def init(device_name: str = "auto") -> World:
    """Joins the processes that torchrun started; without torchrun, the process is alone.

    Args:
        device_name: "cpu" computes on the CPU, with gloo between processes. "cuda" takes the GPU
            with the number of the local rank, with NCCL. "auto" takes a GPU where there is one. A
            process that is alone takes any device that `--device` can name.

    Raises:
        ValueError: Variables of torchrun are missing or wrong, or this machine lacks a device for
            each of its processes.
        LostWorkerError: The other processes cannot be reached.
    """
    if not started_by_torchrun():
        return World.single(pick_device(device_name))
    rank, size, local_rank = (_number(name) for name in _VARIABLES[:3])
    if not 0 <= rank < size:
        raise ValueError(f"RANK must be below WORLD_SIZE, got {rank} and {size}")
    if size == 1:
        return World.single(pick_device(device_name))
    for name in _VARIABLES:
        if name not in os.environ:
            raise ValueError(f"{name} is not set, but RANK is: start the processes with torchrun")
    device = _own_device(device_name, local_rank)
    with _others_needed():
        store, rank, size = next(iter(rendezvous("env://", timeout=TIMEOUT)))
        store.set_timeout(TIMEOUT)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=PrefixStore("group", store),
            rank=rank,
            world_size=size,
            timeout=TIMEOUT,
            device_id=device if device.type == "cuda" else None,
        )
    global _failures
    _failures = store
    return World(rank, size, local_rank, device)


def started_by_torchrun() -> bool:
    """Whether torchrun, or a launcher like it, started this process as one of several."""
    return "RANK" in os.environ or "LOCAL_RANK" in os.environ


def reports_first() -> bool:
    """Whether this process is the first to ask: where several fail, only that one says why."""
    if _failures is None:
        # an early failure is the same on all processes of a machine
        return os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        return _failures.add("clae_fast/failed", 1) == 1
    except RuntimeError:
        # the process that counts is gone, and may not have reported
        return True


def _number(name: str) -> int:
    try:
        return int(os.environ[name])
    except KeyError as error:
        raise ValueError(f"{name} is not set: start the processes with torchrun") from error
    except ValueError as error:
        raise ValueError(f"{name} must be a number, got {os.environ[name]!r}") from error


def _own_device(name: str, local_rank: int) -> torch.device:
    """The device of one of several processes."""
    device = pick_device(name)
    if device.type == "cpu":
        return device
    if name not in ("auto", "cuda"):
        raise ValueError(
            f"device must be cpu, cuda or auto for several processes, each with a GPU of its own, "
            f"got {name!r}"
        )
    here = max(local_rank + 1, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if here > torch.cuda.device_count():
        raise ValueError(
            f"{here} processes on this machine need a GPU each, but torch sees "
            f"{torch.cuda.device_count()}: start as many, or take --device cpu"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


@contextmanager
def _others_needed() -> Iterator[None]:
    """Turns the error of a backend that misses another process into a short LostWorkerError."""
    try:
        yield
    except RuntimeError as error:
        # the place in the backend's code and its advice are left out
        words = re.sub(r"^\[[^]]*\] ", "", " ".join(str(error).split())).partition(". ")[0]
        raise LostWorkerError(f"another process of the run is lost: {words[:150]}") from error
