"""Several processes as one: global batches, one reduced gradient, and errors that say who is lost.

Each process has a slice of the global batch and one device. Losses are taken over all rows, weight
gradients are summed, and with synchronised BatchNorm (`clae_fast.nn.sync_norm`), or none, W
processes compute what one does with the whole batch. There is no DistributedDataParallel: its
reducer takes one backward pass a step, in which every parameter has its gradient.

One process is a `World` too, in which nothing is communicated and nothing costs anything.
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

# how long a process waits for the others; they wait for the first one to validate
TIMEOUT = timedelta(minutes=30)
# where the processes that fail are counted
_failures: Store | None = None
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# integers as long as an element
_SAME_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, eq=False)
class World:
    """The processes of a run, seen from one of them.

    Every method that communicates is to be called by all of them, in the same order, and raises
    LostWorkerError where another one is gone.

    Attributes:
        rank: Number of this process, from 0.
        size: How many there are.
        local_rank: Number of this process on its machine.
        device: Where it computes.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @classmethod
    def single(cls, device: torch.device | str = "cpu") -> "World":
        """One process alone."""
        return cls(rank=0, size=1, local_rank=0, device=torch.device(device))

    def __deepcopy__(self, memo: dict[int, Any]) -> "World":
        # a module may hold it and be copied, but there is one
        return self

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes, prints and evaluates."""
        return self.rank == 0

    def local_batch(self, batch_size: int) -> int:
        """The rows of a global batch that each process has.

        Raises:
            ValueError: They do not come out even.
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
        """Gives parameters and buffers of `module` the first process's values."""
        if self.size == 1:
            return
        for tensor in (*module.parameters(), *module.buffers()):
            values = tensor.contiguous()
            with _others_needed():
                dist.broadcast(values, src=0)
            tensor.copy_(values)

    @torch.no_grad()
    def require_equal(self, module: nn.Module) -> None:
        """Checks, by one number a process, that all have the same parameters.

        Raises:
            RuntimeError: They do not.
        """
        if self.size == 1:
            return
        bits = [p.detach().view(_SAME_SIZE[p.element_size()]).sum() for p in module.parameters()]
        sums = self.all_gather(torch.stack(bits).sum()[None])
        if bool((sums != sums[0]).any()):
            raise RuntimeError("the processes' weights are no longer the same")

    def all_gather(self, x: Tensor) -> Tensor:  # [N, ...] -> [W N, ...]
        """Every process's `x`, of one shape, below one another in the order of ranks."""
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
        """Begins to sum `x` in place, and returns what waits for the sum."""
        with _others_needed():
            work = dist.all_reduce(x, async_op=True)

        def wait() -> None:
            with _others_needed():
                work.wait()

        return wait

    def own_rows(self, x: Tensor) -> Tensor:  # [W N, ...] -> [N, ...]
        """This process's rows of what `all_gather` gives."""
        rows = self.local_batch(len(x))
        return x[self.rank * rows : (self.rank + 1) * rows]

    def gather(self, z: Tensor) -> Tensor:  # [N, D] -> [W N, D]
        """`all_gather`, differentiable: the own rows' gradient flows, which has to be whole.

        It is where every process computes the same of all rows, as `gather_loss` has it.
        """
        if self.size == 1:
            return z
        (rows,) = _Gather.apply(self, z)
        return rows

    def gather_loss(self, loss: Loss) -> Loss:
        """`loss` over the rows of all processes: as many negatives as the global batch has.

        Every process computes the whole loss from gathered rows, and its own rows' gradient is
        whole as well: it contains what remote rows' terms owe to these rows as columns. So values
        agree on all processes, and weight gradients summed over them are those of one process with
        the global batch, for any loss. Only embeddings are exchanged, once, forward; nothing in the
        backward pass.

        Computing the loss W times over costs 4 n^2 D FLOPs a process and value, n = 2N rows of the
        global batch. A pair step, with two values, D = 128 and ResNet-18 on 32x32 images (10 GFLOP
        an image), loses about N W / 2.4e6 of its FLOPs: 1.4 % at N = 4096 on 8 processes, a tenth
        at N = 8192 on 30. ResNet-50 at 224x224 can be 7 times larger.

        A parameter of the loss itself has its whole gradient on every process, not a summand: it
        has no place in a `clae_fast.distributed.reducer.GradientReducer`.

        Args:
            loss: `loss(z_a, z_b) -> scalar` of rows [W N, D], deterministic.

        Returns:
            The same of this process's rows [N, D], as many on every process.
        """
        if self.size == 1:
            return loss
        return lambda z_a, z_b: loss(*_Gather.apply(self, z_a, z_b))

    def gather_grad(self, attack_grad: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """`attack_grad`, [W N, D] -> [W N, D], of the rows of all processes: their own rows of it.

        Args:
            attack_grad: Gradient of a loss at its embeddings, as `Method.attack_grad`.

        Returns:
            The same of this process's rows, [N, D] -> [N, D].
        """
        if self.size == 1:
            return attack_grad
        return lambda z: self.own_rows(attack_grad(self.all_gather(z)))

    @contextmanager
    def one_at_first(self) -> Iterator[None]:
        """Lets one process of each machine through, then the others: what it fetches, they find."""
        if self.local_rank:
            self.barrier()
        yield
        if not self.local_rank:
            self.barrier()

    def shutdown(self) -> None:
        """Leaves, after waiting for the others; each may go on alone."""
        if self.size > 1:
            self.barrier()
            dist.destroy_process_group()


class _Gather(torch.autograd.Function):
    """All processes' rows of several operands; the backward takes the own rows of a gradient."""

    @staticmethod
    def forward(ctx: Any, world: World, *operands: Tensor) -> tuple[Tensor, ...]:
        ctx.world = world
        ctx.set_materialize_grads(False)
        # side by side, for one collective
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
    """Joins the processes that torchrun started, or is alone where nobody did.

    Args:
        device_name: "cpu", with gloo between processes; "cuda", with NCCL and a GPU a process, the
            one of its local rank; "auto": a GPU if there is one. Alone, the device that `--device`
            names.

    Raises:
        ValueError: Variables of torchrun are missing or wrong, or there is no such device for every
            process of this machine.
        LostWorkerError: The others cannot be reached.
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
    """Whether somebody started this process as one of several."""
    return "RANK" in os.environ or "LOCAL_RANK" in os.environ


def reports_first() -> bool:
    """Whether no other process of the run has asked this: of many that fail, one says why."""
    if _failures is None:
        # what fails so early fails on all processes of a machine
        return os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        return _failures.add("clae_fast/failed", 1) == 1
    except RuntimeError:
        # whoever kept count is gone, and may not have reported
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
    """Says in few words what a backend throws where another process is gone."""
    try:
        yield
    except RuntimeError as error:
        # without the place in the backend's code, and its advice
        words = re.sub(r"^\[[^]]*\] ", "", " ".join(str(error).split())).partition(". ")[0]
        raise LostWorkerError(f"another process of the run is lost: {words[:150]}") from error
