"""One view through an encoder: forward, a stop at its embeddings, and back.

A pass leaves its embeddings as a leaf, where losses accumulate their gradients in any number and
order; then `back` takes the sum to the weights, once. With chunks the view's activations are alive
a chunk at a time, as in GradCache (Gao et al., Scaling Deep Contrastive Learning Batch Size under
Memory Limited Setup, RepL4NLP 2021).
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.nn.modules.batchnorm import _BatchNorm

from clae_fast.attack import LinfAttack
from clae_fast.nn.mode import evaluating
from clae_fast.steps import stem
from clae_fast.steps.checks import check_scale, scalar

Around = Callable[[], AbstractContextManager[object]]
Loss = Callable[[Tensor, Tensor], Tensor]


class Pass:
    """A view whose backward pass goes to the weights: 1 unit now, 2 by `back`.

    Args:
        encoder: The encoder.
        x: The view, [N, C, ...].

    Attributes:
        z: The embeddings, a leaf, [N, D].
    """

    def __init__(self, encoder: nn.Module, x: Tensor) -> None:
        self._stop(encoder(x))

    def _stop(self, output: Tensor) -> None:
        self._output = output
        self.z = output.detach().requires_grad_()
        self._x_adv: Tensor | None = None

    def back(self, around: Around = nullcontext) -> None:
        """Takes back what losses have left at the embeddings, if they have; to be called once.

        Args:
            around: Makes a context for the last backward pass.
        """
        with around():
            if self.z.grad is not None:
                self._back(self.z.grad)

    def _back(self, dz: Tensor) -> None:
        self._output.backward(dz)

    @property
    def x_adv(self) -> Tensor:
        """The adversarial view, where the pass attacks its view and has been taken back.

        Raises:
            RuntimeError: It is not there.
        """
        if self._x_adv is None:
            raise RuntimeError("no x_adv yet: run backward on a loss that depends on the view")
        return self._x_adv


class AttackedPass(Pass):
    """A pass whose way back to the weights leaves the adversarial view behind, after one step.

    Args:
        encoder: The encoder.
        x: The view, [N, C, ...].
        attack: How far the step goes.
    """

    def __init__(self, encoder: nn.Module, x: Tensor, attack: LinfAttack) -> None:
        view, self._twin = attack.twin(x)
        output, self._find_stem = stem.forward(encoder, view, attack.impl)
        self._x, self._attack = x, attack
        self._stop(output)

    def _back(self, dz: Tensor) -> None:
        found = self._find_stem()
        if found is None or not found.trained:
            self._output.backward(dz)
            self._x_adv = self._twin.x_adv
            return

        def step(dys: tuple[Tensor | None]) -> None:
            (dy,) = dys
            if dy is None:  # zero
                self._x_adv = self._attack.project(self._x, self._x)
            else:
                self._x_adv = self._attack.stem_step(self._x, dy, **found.convolution)

        hook = found.node.register_prehook(step)
        # not to the view, so that the convolution computes its weight's gradient alone
        self._output.backward(dz, inputs=found.leaves)
        hook.remove()


class InputPass(Pass):
    """A pass that goes back to the view alone, for a step of an attack: 1 unit now, 1 by `back`.

    It runs in `frozen(encoder)`: asked for one gradient alone, autograd computes no weight's, but
    keeps what they would need, and a compiled encoder computes all the gradients it was traced for.

    Args:
        encoder: The encoder.
        x: Where the step starts, [N, C, ...].
        attack: How far the step goes.
        x0: The centre of the ball, as `x`; None takes `x`.
    """

    def __init__(
        self, encoder: nn.Module, x: Tensor, attack: LinfAttack, x0: Tensor | None = None
    ) -> None:
        # no leaf, to which torch's FLOP counter cannot follow
        self._view = x.detach().requires_grad_().view_as(x)
        output, self._find_stem = stem.forward(encoder, self._view, attack.impl)
        self._x, self._attack, self._x0 = x, attack, x0
        self._stop(output)

    def _back(self, dz: Tensor) -> None:
        # the stem's step projects onto the ball around its start
        found = self._find_stem() if self._x0 is None else None
        if found is None:
            (dx,) = torch.autograd.grad(self._output, self._view, dz)
            self._x_adv = self._attack.step(self._x, dx, self._x0)
            return
        (dy,) = torch.autograd.grad(self._output, [GradientEdge(found.node, 0)], dz)
        self._x_adv = self._attack.stem_step(self._x, dy, **found.convolution)


class CachedPass(Pass):
    """A pass in chunks, each encoded anew on the way back: 1 unit now, 1 more by `back`.

    BatchNorm normalises a chunk by its own statistics, and its running ones move once a chunk.
    Random layers draw for a chunk what they drew for it the first time: states of generators are
    read and written, so no CUDA graph can be captured of it.

    Args:
        kind: As of `run`.
        encoder: The encoder.
        x: The view, [N, C, ...].
        options: As of `run`.
        micro_batch: Rows of a chunk.
    """

    def __init__(
        self,
        kind: Callable[..., Pass],
        encoder: nn.Module,
        x: Tensor,
        options: tuple[Any, ...],
        micro_batch: int,
    ) -> None:
        self._kind, self._encoder = kind, encoder
        # tensors among the options have the view's rows
        split = (o.split(micro_batch) if isinstance(o, Tensor) else repeat(o) for o in options)
        self._chunks = list(zip(x.split(micro_batch), *split, strict=False))
        self._random: list[list[Tensor]] = []
        rows = []
        with torch.no_grad():
            for chunk, *_ in self._chunks:
                self._random.append(_random_state(x.device))
                rows.append(encoder(chunk))
        self._stop(torch.cat(rows))

    def back(self, around: Around = nullcontext) -> None:
        """As a pass at once; the context is for the last chunk's."""
        if self.z.grad is None:
            super().back(around)
            return
        device = self.z.device
        drawn = [device] if device.type == "cuda" else []
        parts = []
        with torch.random.fork_rng(drawn), _statistics_held(self._encoder):
            for chunk, state, dz in zip(
                self._chunks, self._random, self.z.grad.split(len(self._chunks[0][0])), strict=True
            ):
                _set_random_state(state, device)
                part = self._kind(self._encoder, *chunk)
                part.z.grad = dz
                part.back(around if chunk is self._chunks[-1] else nullcontext)
                parts.append(part._x_adv)
        attacked = [x_adv for x_adv in parts if x_adv is not None]
        if attacked:
            self._x_adv = torch.cat(attacked)


def run(
    kind: Callable[..., Pass],
    encoder: nn.Module,
    x: Tensor,  # [N, C, ...]
    *options: Any,
    micro_batch: int | None = None,
) -> Pass:
    """Runs a view.

    Args:
        kind: `Pass`, `AttackedPass` or `InputPass`.
        encoder: The encoder.
        x: The view.
        options: Further arguments of `kind`; tensors have the view's rows.
        micro_batch: Rows of a chunk; None takes the view at once.
    """
    if micro_batch is None:
        return kind(encoder, x, *options)
    return CachedPass(kind, encoder, x, options, micro_batch)


@contextmanager
def frozen(module: nn.Module, norm: str = "train") -> Iterator[None]:
    """Leaves weights without gradients and BatchNorm's running statistics where they are.

    Args:
        module: The encoder.
        norm: The mode of `LinfAttack.norm`: "eval" is that of all layers.
    """
    weights = [weight for weight in module.parameters() if weight.requires_grad]
    for weight in weights:
        weight.requires_grad_(False)
    try:
        with _statistics_held(module) if norm == "train" else evaluating(module):
            yield
    finally:
        for weight in weights:
            weight.requires_grad_(True)


@contextmanager
def _statistics_held(module: nn.Module) -> Iterator[None]:
    """Normalises by the batch's statistics without updating the running ones."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def _random_state(device: torch.device) -> list[Tensor]:
    """Of the CPU's generator and, where it is a GPU, the device's."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def _set_random_state(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state, device)


class PassRunner:
    """What schedules consist of, with the options that are the same for all parts of a step.

    Args:
        scale: What gradients are multiplied by.
        micro_batch: Rows of a chunk; None takes the batch at once.
    """

    def __init__(self, scale: Tensor | None = None, micro_batch: int | None = None) -> None:
        check_scale(scale)
        if micro_batch is not None:
            if not isinstance(micro_batch, int):
                raise TypeError(f"micro_batch must be an integer, got {type(micro_batch).__name__}")
            if micro_batch < 1:
                raise ValueError(f"micro_batch must be at least 1, got {micro_batch}")
        self._scale = scale
        self._micro_batch = micro_batch

    def run(self, kind: Callable[..., Pass], encoder: nn.Module, x: Tensor, *options: Any) -> Pass:
        """Runs a view, 1 unit."""
        return run(kind, encoder, x, *options, micro_batch=self._micro_batch)

    def backward(self, loss: Tensor, weight: float = 1.0) -> Tensor:  # []
        """Leaves the gradients of a loss, weighted and scaled, at the embeddings: its value."""
        loss = scalar(loss)
        scaled(loss if weight == 1 else weight * loss, self._scale).backward()
        return loss.detach()

    def run_attackable(self, encoder: nn.Module, x: Tensor, attack: LinfAttack) -> Pass:
        """Runs a view, 1 unit, whose way back takes the first step of its attack where it can."""
        if attack.begins_in_training:
            return self.run(AttackedPass, encoder, x, attack)
        return self.run(Pass, encoder, x)

    def constant(self, encoder: nn.Module, x: Tensor, norm: str) -> Tensor:
        """Embeddings without gradients that leave no trace, 1 unit.

        Args:
            encoder: The encoder.
            x: The view.
            norm: As `LinfAttack.norm`.
        """
        with torch.no_grad(), frozen(encoder, norm):
            return torch.cat([encoder(chunk) for chunk in x.split(self._micro_batch or len(x))])

    def attacked(
        self,
        encoder: nn.Module,
        x0: Tensor,  # [N, C, ...]
        attack: LinfAttack,
        gradient: Callable[[Tensor], Tensor],  # [N, D] -> [N, D]
        trained: Pass | None = None,
    ) -> Tensor:
        """Runs an attack, 2 units a step, each of them taken back to the input alone: x_adv.

        Args:
            encoder: Who sees the view; its weights and statistics do not.
            x0: The view, and the centre of the ball.
            attack: How far the attack goes.
            gradient: Gradient of what the attack raises at a step's embeddings, at least in fp32.
            trained: What `run_attackable` gave of a view whose first rows are `x0`, taken back.
        """
        x, steps = attack.begin(x0), attack.steps
        if trained is not None and attack.begins_in_training:
            x, steps = first(len(x0), trained.x_adv), steps - 1
        with frozen(encoder, attack.norm):
            for _ in range(steps):
                view = self.run(InputPass, encoder, x, attack, None if x is x0 else x0)
                z = view.z.detach()
                # in fp32 until it is scaled
                dz = gradient(z.to(torch.promote_types(z.dtype, torch.float32)))
                view.z.grad = scaled(dz, self._scale).to(z.dtype)
                view.back()
                x = view.x_adv
        return x

    def replaced(
        self,
        loss: Loss,
        encoder: nn.Module,
        adv_encoder: nn.Module,
        p: Pass,
        x_adv: Tensor,
        x_q: Tensor,
        last_backward: Around,
    ) -> Tensor:
        """The one loss of p and q with the adversarial view in q's first rows, 3 + 2 units."""
        passes = [self.run(Pass, adv_encoder, x_adv)]
        if len(x_adv) < len(x_q):
            passes.append(self.run(Pass, encoder, x_q[len(x_adv) :]))
        value = self.backward(loss(p.z, torch.cat([view.z for view in passes])))
        for view in passes:
            view.back()
        p.back(last_backward)
        return value


def first(rows: int, x: Tensor) -> Tensor:
    """The first rows, or the tensor itself where these are all."""
    return x if rows == len(x) else x[:rows]


def scaled(value: Tensor, scale: Tensor | None) -> Tensor:
    """The value times the scale, where there is one."""
    return value if scale is None else scale * value


def gradient(loss: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """The gradient of a loss at embeddings."""
    z = z.detach().requires_grad_()
    (dz,) = torch.autograd.grad(scalar(loss(z)), z)
    return dz
