"""What a run will cost: units of its steps, and an estimate of the memory that one takes."""

import copy
import weakref

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

from clae_fast.config import Config
from clae_fast.methods import METHODS, Method
from clae_fast.steps.batch import Batch
from clae_fast.steps.options import StepOptions
from clae_fast.training.build import build_attack
from clae_fast.training.engine import Engine, precision_on


def step_units(config: Config) -> dict[str, float]:
    """Units of a step, of one encoder forward pass over one view of the batch.

    Returns:
        Those of an "attacked" step and of a "plain" one of the same method, and how many a step of
        the run takes on average, "mean".
    """
    method, small = (
        METHODS[config.objective.method],
        (config.views.small_crop_size / config.views.image_size) ** 2,
    )

    def units(kind: str) -> float:
        options = StepOptions(
            kind=kind,
            attack=build_attack(config),
            adv_fraction=config.adversary.adv_fraction,
            adv_replace=config.adversary.adv_replace,
            micro_batch=config.engine.micro_batch,
        )
        cost = method.cost(
            options, small_crops=config.views.small_crops * small, **config.objective.options
        )
        return cost.units(chunks=config.engine.micro_batch is not None)

    attacked, plain = units(config.adversary.attack), units("none")
    every = config.adversary.adv_every
    return {"attacked": attacked, "plain": plain, "mean": (attacked + (every - 1) * plain) / every}


def step_memory(config: Config, method: Method, device: torch.device) -> dict[str, int]:
    """An estimate of the bytes that a step holds, by taking one whose tensors have no values.

    What libraries need besides, and what one operation needs while it runs, is not known before;
    compiled encoders may keep less.

    Args:
        config: Settings of the run.
        method: As `clae_fast.training.trainer.build_method` has it, on the CPU.
        device: Where the run computes, whose precision counts; the step is one on the CPU, where
            optimisers read no learning rate from a tensor.

    Returns:
        Bytes of "weights" (buffers and momentum encoders too), "gradients", "optimizer" (its
        state), "views" (of a batch) and "activations" (kept for backward passes, at their peak).
    """
    precision = precision_on(device, config.engine.precision)
    views_dtype = torch.float16 if precision == "fp16" else torch.float32
    # as many bytes, and no loss scale, which steps would read
    precision = "bf16" if precision == "fp16" else precision
    config = config.replace(precision=precision, compile="no", capture="no")
    mode = FakeTensorMode()
    with FakeCopyMode(mode):
        method = copy.deepcopy(method)
    with mode:
        engine = Engine(config, method, build_attack(config), torch.device("cpu"))
        sizes = [config.views.image_size] * 2 + [
            config.views.small_crop_size
        ] * config.views.small_crops
        views = [
            torch.empty(config.optimization.batch_size, 3, size, size, dtype=views_dtype)
            for size in sizes
        ]
        labels = torch.empty(config.optimization.batch_size, dtype=torch.int64)
        taken = (*views[: method.views], *views[2:])
        kept = [*method.parameters(), *method.buffers()]
        saved = _Saved([*kept, *views])
        with saved:
            engine.eager(
                config.adversary.attack, Batch(taken, labels if method.needs_labels else None)
            )
        state = engine.state_dict()["optimizer"]["state"].values()
        return {
            "weights": _bytes(kept),
            "gradients": _bytes([p.grad for p in method.parameters() if p.grad is not None]),
            "optimizer": _bytes([v for own in state for v in own.values() if _is_tensor(v)]),
            "views": _bytes(views),
            "activations": saved.peak,
        }


def parameters(module: nn.Module) -> int:
    """Trained numbers of a module, each once."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def _bytes(tensors: list[Tensor]) -> int:
    """What tensors take, a storage that they share once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


class _Saved(torch.autograd.graph.saved_tensors_hooks):
    """Peak bytes that autograd keeps for backward passes, each storage once.

    Args:
        outside: tensors that are there all the same.
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
    """What autograd holds in the place of a tensor."""

    def __init__(self, tensor: Tensor) -> None:
        # detached: a saved output would hold the graph that holds it
        self.tensor = tensor.detach()
