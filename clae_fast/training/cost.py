"""What a run will cost: units of a step, and an estimate of the memory that a step takes."""

import copy
import weakref
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

from clae_fast.config import Config
from clae_fast.methods import METHODS, Method
from clae_fast.steps.batch import Batch
from clae_fast.training.build import step_options
from clae_fast.training.engine import Engine, precision_on


def step_units(config: Config) -> dict[str, float]:
    """Units of a step; one is a forward pass of the encoder over one view of the batch.

    Returns:
        Those of an "attacked" step and of a "plain" one of the same method, and "mean", which a
        step of the run takes on average.
    """
    views, objective, options = config.views, config.objective, step_options(config)
    small = views.small_crops * (views.small_crop_size / views.image_size) ** 2

    def units(kind: str) -> float:
        cost = METHODS[objective.method].cost(
            replace(options, kind=kind), small_crops=small, **objective.options
        )
        return cost.units(chunks=options.micro_batch is not None)

    attacked, plain = units(options.kind), units("none")
    every = config.adversary.adv_every
    return {"attacked": attacked, "plain": plain, "mean": (attacked + (every - 1) * plain) / every}


def step_memory(config: Config, method: Method, device: torch.device) -> dict[str, int]:
    """Estimates the bytes that a step holds, by taking a step whose tensors have no values.

    The estimate leaves out what libraries need besides, and what one operation needs while it runs;
    compiled encoders may keep less.

    Args:
        config: Settings of the run.
        method: As `build.build_method` has it, on the CPU.
        device: Where the run computes, which decides the precision. The step itself is taken on the
            CPU, where optimizers read no learning rate from a tensor.

    Returns:
        Bytes of "weights" (with buffers and momentum encoders), "gradients", "optimizer" (its
        state), "views" (of a batch) and "activations" (kept for backward passes, at their peak).
    """
    precision = precision_on(device, config.engine.precision)
    views_dtype = torch.float16 if precision == "fp16" else torch.float32
    # bf16 takes as many bytes, and has no loss scale, which steps would read
    precision = "bf16" if precision == "fp16" else precision
    config = config.replace(precision=precision, compile="no", capture="no")
    sizes = [config.views.image_size] * 2 + [
        config.views.small_crop_size
    ] * config.views.small_crops
    batch_size, options = config.optimization.batch_size, step_options(config)
    mode = FakeTensorMode()
    with FakeCopyMode(mode):
        method = copy.deepcopy(method)
    with mode:
        engine = Engine(config, method, options, torch.device("cpu"))
        views = [torch.empty(batch_size, 3, size, size, dtype=views_dtype) for size in sizes]
        labels = torch.empty(batch_size, dtype=torch.int64)
        taken = (*views[: method.views], *views[2:])
        kept = [*method.parameters(), *method.buffers()]
        saved = _Saved([*kept, *views])
        with saved:
            engine.eager(options.kind, Batch(taken, labels if method.needs_labels else None))
        state = engine.state_dict()["optimizer"]["state"].values()
        numbers = [value for own in state for value in own.values()]
        return {
            "weights": _bytes(kept),
            "gradients": _bytes([p.grad for p in method.parameters() if p.grad is not None]),
            "optimizer": _bytes([value for value in numbers if isinstance(value, Tensor)]),
            "views": _bytes(views),
            "activations": saved.peak,
        }


def parameters(module: nn.Module) -> int:
    """How many numbers of a module are trained."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def _bytes(tensors: list[Tensor]) -> int:
    """Bytes of these tensors; a storage that several share counts once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


class _Saved(torch.autograd.graph.saved_tensors_hooks):
    """Peak bytes that autograd keeps for backward passes, each storage once.

    Args:
        outside: Tensors that exist without autograd, and do not count.
    """

    def __init__(self, outside: list[Tensor]) -> None:
        self.peak = self._live = 0
        self._holders: dict[int, int] = {}
        self._outside = {tensor.untyped_storage()._cdata for tensor in outside}
        super().__init__(self._pack, lambda holder: holder.tensor)

    def _pack(self, tensor: Tensor) -> "_Holder":
        holder, storage = _Holder(tensor), tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._outside:
            if not self._holders.get(key):
                self._live += size
                self.peak = max(self.peak, self._live)
            self._holders[key] = self._holders.get(key, 0) + 1
            weakref.finalize(holder, self._release, key, size)
        return holder

    def _release(self, key: int, size: int) -> None:
        self._holders[key] -= 1
        if not self._holders[key]:
            self._live -= size


class _Holder:
    """What autograd holds instead of a tensor, so that its release is seen."""

    def __init__(self, tensor: Tensor) -> None:
        # detached, since a saved output would hold the graph that holds it
        self.tensor = tensor.detach()
