"""The training step on a device: its precision, compilation and capture.

A step reads images, learning rate and loss scale from the device and leaves losses and weights
there. The host only says which step comes next, and waits for no result. So a whole step, from two
views to the moved weights, can be recorded once as a CUDA graph and replayed.
"""

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.amp import GradScaler

from clae_fast.config import Config
from clae_fast.distributed import World
from clae_fast.distributed.reducer import GradientReducer
from clae_fast.methods import Method
from clae_fast.nn import Encoder
from clae_fast.steps.batch import Batch
from clae_fast.steps.options import StepOptions, StepResult
from clae_fast.training.optimizer import build_optimizer, load_optimizer, set_lr

_AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# steps before a capture: in them libraries choose algorithms, compilers compile, and the optimizer
# makes its state
_WARM_UP = 3


class Engine:
    """Takes a method's steps.

    Args:
        config: Settings of the run. Where precision, compile and capture are "auto", a GPU computes
            in fp16 with a loss scale, compiled and captured; the CPU computes in fp32 and does
            neither.
        method: The method and its encoders, on `device`.
        options: How an adversarial step is taken, as `build.step_options` has it.
        device: Where steps are taken.
        world: The processes that share a batch; one alone by default.

    Attributes:
        dtype: Of the views that steps take, fp16 or fp32. It is never bf16, whose spacing near 1 is
            coarser than an attack.

    Raises:
        ValueError: A setting that this device does not have.
    """

    def __init__(
        self,
        config: Config,
        method: Method,
        options: StepOptions,
        device: torch.device,
        world: World | None = None,
    ) -> None:
        world = world or World.single(device)
        on_gpu = device.type == "cuda"
        precision = precision_on(device, config.engine.precision)
        if config.engine.capture == "yes" and not on_gpu:
            raise ValueError(f"capture must be no or auto on {device}: CUDA graphs need a GPU")
        autocast = _AUTOCAST[precision]
        compiled = config.engine.compile == "yes" or (config.engine.compile == "auto" and on_gpu)
        # also adversarial twins and momentum encoders
        for encoder in method.modules():
            if isinstance(encoder, Encoder):
                encoder.autocast = autocast
                if compiled:
                    encoder.compile(dynamic=False)
        self.dtype = torch.float16 if precision == "fp16" else torch.float32
        self._config = config
        self._method = method
        self._options = options
        self._device = device
        # with micro_batch, steps read and write the states of generators, which no graph captures
        captured = on_gpu and config.engine.capture != "no" and config.engine.micro_batch is None
        self._optimizer = build_optimizer(config.optimization, method, device)
        self._world = world
        self._reducer = GradientReducer(method.parameters(), world)
        self._scaler = GradScaler(device.type, enabled=precision == "fp16")
        self._describe = ", ".join((precision, *["compiled"] * compiled, *["captured"] * captured))
        self._one = torch.ones((), device=device)
        self._stream = torch.cuda.Stream(device) if captured else None
        self._taken: Counter[str] = Counter()
        self._graphs: dict[str, _Graph] = {}

    def __str__(self) -> str:
        """As in "fp16, compiled, captured"."""
        return self._describe

    def step(self, batch: Batch, *, global_step: int, lr: float, progress: float) -> StepResult:
        """Takes a step on views of this process's rows, of `dtype`.

        Args:
            batch: The views, and labels where the method takes them.
            global_step: How many steps of the run came before; every `adv_every`-th is adversarial.
            lr: The learning rate of this step.
            progress: The part of the run that is done, from 0 to below 1.

        Returns:
            The losses, constants on the device that the next step overwrites.
        """
        adversary = self._config.adversary
        set_lr(self._optimizer, lr)
        self._method.before_step(progress)
        kind = adversary.attack if global_step % adversary.adv_every == 0 else "none"
        # each has a graph of its own
        which = f"{kind} {self._method.phase}"
        self._taken[which] += 1
        if self._stream is None:
            return self.eager(kind, batch)
        if self._taken[which] <= _WARM_UP:
            return self._warm_up(self._stream, kind, batch)
        if which not in self._graphs:
            try:
                self._graphs[which] = _Graph(partial(self.eager, kind), batch)
            except RuntimeError as error:
                self._do_without_graphs(error)
                return self.eager(kind, batch)
        return self._graphs[which](batch)

    def _warm_up(self, stream: torch.cuda.Stream, kind: str, batch: Batch) -> StepResult:
        """A step as a capture will see it: on a stream of its own."""
        current = torch.cuda.current_stream(self._device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            result = self.eager(kind, batch)
        current.wait_stream(stream)
        return result

    def _do_without_graphs(self, error: RuntimeError) -> None:
        """Continues without graphs after a capture failed; nothing ran during the capture."""
        if self._config.engine.capture == "yes":
            raise error
        reason = str(error).partition("\n")[0]
        print(f"steps run uncaptured, since capture failed: {reason}", file=sys.stderr)
        self._stream = None
        self._graphs.clear()
        # the failed capture may have left the old scaler in the middle of a step
        scaler = GradScaler(self._device.type, enabled=self._scaler.is_enabled())
        scaler.load_state_dict(self._scaler.state_dict())
        self._scaler = scaler

    def eager(self, kind: str, batch: Batch) -> StepResult:
        """Takes a step with this kind of attack without a graph, at the current learning rate."""
        self._reducer.zero_grad()
        options = replace(
            self._options,
            kind=kind,
            scale=self._scaler.scale(self._one) if self._scaler.is_enabled() else None,
            last_backward=self._reducer.last_backward,
            world=self._world,
        )
        result = self._method.step(batch, options)
        self._reducer.finish()
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._method.after_step()
        return result

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds besides the method."""
        return {"optimizer": self._optimizer.state_dict(), "scaler": self._scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave, on this or another kind of device.

        Raises:
            KeyError, TypeError, ValueError: The state belongs to another optimizer.
        """
        load_optimizer(self._optimizer, state["optimizer"])
        # before the first step, in another precision and in version 0.1 there is none
        if self._scaler.is_enabled() and state.get("scaler"):
            self._scaler.load_state_dict(state["scaler"])


def precision_on(device: torch.device, precision: str) -> str:
    """What the setting `precision` means on a device: "fp32", "bf16" or "fp16"."""
    if precision != "auto":
        return precision
    return "fp16" if device.type == "cuda" else "fp32"


class _Graph:
    """A step as a CUDA graph, which reads a batch of its own; each batch is copied into it."""

    def __init__(self, step: Callable[[Batch], StepResult], batch: Batch) -> None:
        labels = None if batch.labels is None else batch.labels.clone()
        self._batch = Batch(tuple(view.clone() for view in batch.views), labels)
        self._graph = torch.cuda.CUDAGraph()
        # loaders' threads may pin memory during the capture
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._result = step(self._batch)

    def __call__(self, batch: Batch) -> StepResult:
        for own, view in zip(self._batch.views, batch.views, strict=True):
            own.copy_(view)
        if self._batch.labels is not None and batch.labels is not None:
            self._batch.labels.copy_(batch.labels)
        self._graph.replay()
        return self._result
