"""A pass takes one view through an encoder, stops at the embeddings, and goes back later.

The embeddings of a pass are a leaf of the autograd graph. Any number of losses leave their
gradients there, in any order. Then `back` takes the sum of these gradients back through the
encoder, once.
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

Around = Callable[[], AbstractContextManager[object]]


class Pass:
    """A pass that is taken back to the weights. Making it costs 1 unit, and `back` costs 2.

    Args:
        encoder: The encoder.
        x: The view, [N, C, ...].

    Attributes:
        z: The embeddings, a leaf, [N, D].
    """

    def __init__(self, encoder: nn.Module, x: Tensor) -> None:
        self._stop(encoder(x))

    def _stop(self, output: Tensor) -> None:
        """Cuts the graph at the encoder's output."""
        if not isinstance(output, Tensor):
            raise TypeError(
                f"encoder must return projections, a tensor [N, D], got {type(output).__name__}"
            )
        self._output = output
        self.z = output.detach().requires_grad_()
        self._x_adv: Tensor | None = None

    def back(self, around: Around = nullcontext) -> None:
        """Takes back the gradients that losses have left at the embeddings. Call it only once.

        Args:
            around: Makes a context that the backward pass runs in.
        """
        with around():
            if self.z.grad is not None:
                self._back(self.z.grad)

    def _back(self, dz: Tensor) -> None:
        self._output.backward(dz)

    @property
    def x_adv(self) -> Tensor:
        """The adversarial view, which an attacking pass has once it has been taken back.

        Raises:
            RuntimeError: There is none yet.
        """
        if self._x_adv is None:
            raise RuntimeError("no x_adv yet: run backward on a loss that depends on the view")
        return self._x_adv


class AttackedPass(Pass):
    """A pass whose backward pass to the weights also makes one move of an attack.

    Args:
        encoder: The encoder.
        x: The view, [N, C, ...].
        attack: How far the move goes.
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

        def move(dys: tuple[Tensor | None]) -> None:
            (dy,) = dys
            # autograd writes None for a gradient of zeros
            if dy is None:
                self._x_adv = self._attack.project(self._x, self._x)
            else:
                self._x_adv = self._attack.stem_step(self._x, dy, **found.convolution)

        hook = found.node.register_prehook(move)
        # the view is left out, so that the convolution computes no gradient for its input
        self._output.backward(dz, inputs=found.leaves)
        hook.remove()


class InputPass(Pass):
    """A pass that is taken back to the view alone, and makes one move of an attack there.

    Making it costs 1 unit, and `back` costs 1. It runs inside `frozen(encoder)`. Without that,
    autograd would keep what the weights' gradients need, although nobody asks for them. A compiled
    encoder would even compute them.

    Args:
        encoder: The encoder.
        x: Where the move starts, [N, C, ...].
        attack: How far the move goes.
        x0: The center of the ball, as `x`; None takes `x`.
    """

    def __init__(
        self, encoder: nn.Module, x: Tensor, attack: LinfAttack, x0: Tensor | None = None
    ) -> None:
        # torch's FLOP counter does not see a backward pass that ends at a leaf
        self._view = x.detach().requires_grad_().view_as(x)
        output, self._find_stem = stem.forward(encoder, self._view, attack.impl)
        self._x, self._attack, self._x0 = x, attack, x0
        self._stop(output)

    def _back(self, dz: Tensor) -> None:
        # stem_step uses the start of the move as the center of the ball
        found = self._find_stem() if self._x0 is None else None
        if found is None:
            (dx,) = torch.autograd.grad(self._output, self._view, dz)
            self._x_adv = self._attack.step(self._x, dx, self._x0)
            return
        (dy,) = torch.autograd.grad(self._output, [GradientEdge(found.node, 0)], dz)
        self._x_adv = self._attack.stem_step(self._x, dy, **found.convolution)


class CachedPass(Pass):
    """A pass in chunks of rows, so that only one chunk's activations are alive at a time.

    The forward pass keeps only the embeddings. `back` encodes each chunk once more before it takes
    it back. This costs one unit more than a pass without chunks. BatchNorm normalizes each chunk by
    the chunk's statistics, and moves its running statistics once for each chunk. Random layers draw
    the same numbers both times, because the states of the generators are saved and restored. No
    CUDA graph can capture that.

    Args:
        kind: The class of the pass that each chunk becomes.
        encoder: The encoder.
        x: The view, [N, C, ...].
        options: Further arguments of `kind`; a tensor among them has the view's rows.
        micro_batch: How many rows a chunk has.

    Source: Gao et al., Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup,
    RepL4NLP 2021 (GradCache).
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
        """Takes the chunks back one after another. Only the last one runs in the context."""
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


@contextmanager
def frozen(module: nn.Module, norm: str = "train") -> Iterator[None]:
    """Inside the block, weights get no gradients and BatchNorm's running statistics do not move.

    Args:
        module: The encoder.
        norm: "train" normalizes by the batch's statistics; "eval" has all layers in eval mode.
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
    """Inside the block, BatchNorm uses the batch's statistics and keeps the running ones."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def _random_state(device: torch.device) -> list[Tensor]:
    """The states of the CPU's generator and, on a GPU, of the device's."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def _set_random_state(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state, device)
