"""Attacks inside an l-infinity ball: how far they go, from where, and in how many moves.

    x_t+1 = clip(clip(x_t + step_size * sign(g_t), x_0 - eps, x_0 + eps), lo, hi)

One move is the fast gradient sign method (Goodfellow et al., ICLR 2015). Several moves are
projected gradient descent (PGD; Madry et al., ICLR 2018). `linf_twin` is for loops that are written
by hand: it makes one move on the way of a plain backward pass.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from clae_fast import _check
from clae_fast.ops.linf_step import linf_step
from clae_fast.ops.stem_step import stem_step

PerChannel = float | list[float] | tuple[float, ...]


class Twin:
    """The adversarial view that belongs to a view made by `linf_twin`."""

    def __init__(self, attack: "LinfAttack") -> None:
        self._attack = attack
        self._x_adv: Tensor | None = None

    @property
    def x_adv(self) -> Tensor:
        """The adversarial view, a constant of the view's shape, dtype and device.

        Raises:
            RuntimeError: If no backward pass has reached the view yet.
        """
        if self._x_adv is None:
            raise RuntimeError(
                "twin.x_adv is not there yet: run backward on a loss that depends on the view"
            )
        return self._x_adv


class _LinfTwin(torch.autograd.Function):
    """Identity; its backward pass writes `twin.x_adv` and hands no gradient on."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, twin: Twin) -> Tensor:
        ctx.save_for_backward(x)
        ctx.twin = twin
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[None, None]:
        (x,) = ctx.saved_tensors
        ctx.twin._x_adv = ctx.twin._attack.step(x, dx)
        return None, None


@dataclass(frozen=True, kw_only=True)
class LinfAttack:
    """An attack inside an l-infinity ball: one signed move, or several (PGD).

    All lengths are in the units of the view. A view that was normalized by `mean` and `std` takes a
    radius of `eps / std`, one number per channel, and bounds of `(0 - mean) / std` and
    `(1 - mean) / std`.

    Attributes:
        eps: Radius of the ball, a number or one per channel (dim 1 of the view).
        step_size: Length of a move, a number or one per channel; None takes `eps`.
        lo: Lower bound of the values, a number or one per channel; None for no bound.
        hi: Upper bound of the values, a number or one per channel; None for no bound.
        steps: How many moves the attack makes. A move costs 2 units, and the first one costs
            nothing where a training pass of the view makes it.
        start: Where the first move starts: at the "view", or at a "random" point of the ball.
        norm: How passes for the attack alone normalize: "train" by the batch's statistics, "eval"
            by the running statistics, with the whole encoder in eval mode.
        impl: Implementation of `clae_fast.linf_step` and `clae_fast.stem_step`.

    Raises:
        TypeError: A length is neither a number nor a sequence of numbers, or `steps` is no integer.
        ValueError: A length is negative or not finite, `lo` is not below `hi`, `steps` is below 1,
            or `start` or `norm` has none of these values.
    """

    eps: PerChannel
    step_size: PerChannel | None = None
    lo: PerChannel | None = None
    hi: PerChannel | None = None
    steps: int = 1
    start: str = "view"
    norm: str = "train"
    impl: str = "auto"

    def __post_init__(self) -> None:
        for name in ("eps", "step_size", "lo", "hi"):
            value = getattr(self, name)
            if value is None and name != "eps":
                continue
            for number in _numbers(name, value):
                if not math.isfinite(number):
                    raise ValueError(f"{name} must be finite, got {value}")
                if name in ("eps", "step_size") and number < 0:
                    raise ValueError(f"{name} must not be negative, got {value}")
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        if self.lo is not None and self.hi is not None:
            lo, hi = _numbers("lo", self.lo), _numbers("hi", self.hi)
            channels = max(len(lo), len(hi))
            lo, hi = lo * (channels // len(lo)), hi * (channels // len(hi))
            if len(lo) != len(hi) or any(a >= b for a, b in zip(lo, hi, strict=True)):
                raise ValueError(f"lo must be below hi in every channel, got {self.lo}, {self.hi}")
        if not isinstance(self.steps, int) or isinstance(self.steps, bool):
            raise TypeError(f"steps must be an integer, got {type(self.steps).__name__}")
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        for name, choices in (("start", ("view", "random")), ("norm", ("train", "eval"))):
            if getattr(self, name) not in choices:
                got = getattr(self, name)
                raise ValueError(f"{name} must be {' or '.join(choices)}, got {got!r}")

    @property
    def begins_in_training(self) -> bool:
        """Whether a training pass of the view can make the first move."""
        return (self.start, self.norm) == ("view", "train")

    def begin(self, x0: Tensor) -> Tensor:
        """Where the first move starts; randomness comes from the global generator of the device."""
        return x0 if self.start == "view" else self.random_start(x0)

    def step(
        self,
        x: Tensor,  # [N, C, ...]
        grad: Tensor,  # as x
        x0: Tensor | None = None,  # as x
    ) -> Tensor:
        """One signed move from `x` along `grad`, projected, in one launch.

        Args:
            x: Where the move starts.
            grad: Gradient of the loss at `x`; the sign of NaN is 0.
            x0: Center of the ball; None takes `x`.

        Returns:
            The adversarial view, with `|x_adv - x0| <= eps` in `x`'s dtype.
        """
        return linf_step(x, grad, alpha=self._alpha, x0=x0, **self._ball)

    def stem_step(
        self,
        x: Tensor,  # [N, C, H, W]
        dy: Tensor,  # [N, C_out, dy_H, dy_W]
        *,
        weight: Tensor,  # [C_out, C, K, K]
        stride: int,
        padding: int,
    ) -> Tensor:
        """A move along the input gradient of a convolution, which is never stored, in one launch.

        Args:
            x: Where the move starts, and the center of the ball.
            dy: Gradient of the loss at the output of the convolution of `x`.
            weight: The convolution's weight.
            stride: The convolution's stride.
            padding: The convolution's zero padding.

        Returns:
            The adversarial view, with `|x_adv - x| <= eps` in `x`'s dtype.
        """
        return stem_step(
            dy, weight, x, stride=stride, padding=padding, alpha=self._alpha, **self._ball
        )

    def project(self, x: Tensor, x0: Tensor) -> Tensor:
        """The point nearest to `x` in the ball around `x0` and in [lo, hi]."""
        return linf_step(x, x, alpha=0.0, x0=x0, **self._ball)

    def random_start(self, x0: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A point drawn uniformly from the ball around `x0`, then projected."""
        self.check("x0", x0)
        noise = torch.empty_like(x0).uniform_(-1.0, 1.0, generator=generator)
        parts = noise.unbind(1) if isinstance(self.eps, tuple) else (noise,)
        # a number at a time, since a CUDA graph cannot capture a copy of them to the device
        for part, eps in zip(parts, _numbers("eps", self.eps), strict=True):
            part.mul_(eps)
        return self.project(x0 + noise, x0)

    def check(self, name: str, x: Tensor) -> None:
        """Raises unless the view `x`, called `name`, can be attacked with these lengths."""
        _check.tensor(name, x)
        if x.dtype == torch.bfloat16:
            raise TypeError(
                f"{name} must be fp32 or fp16, got bf16: near 1 its spacing exceeds eps"
            )
        for length in ("eps", "step_size", "lo", "hi"):
            if getattr(self, length) is not None:
                _check.per_channel(length, getattr(self, length), x)

    @property
    def _alpha(self) -> PerChannel:
        return self.eps if self.step_size is None else self.step_size

    @property
    def _ball(self) -> dict[str, Any]:
        return {"eps": self.eps, "lo": self.lo, "hi": self.hi, "impl": self.impl}

    def twin(self, x: Tensor) -> tuple[Tensor, Twin]:
        """`linf_twin` with this attack's lengths."""
        self.check("x", x)
        twin = Twin(self)
        return _LinfTwin.apply(x.detach().requires_grad_(), twin), twin


def linf_twin(
    x: Tensor,  # [N, C, ...]
    *,
    eps: PerChannel,
    step_size: PerChannel | None = None,
    lo: PerChannel | None = None,
    hi: PerChannel | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Twin]:
    """Marks a view for attack: a backward pass that reaches it makes the adversarial view.

    The forward pass is the identity. The backward pass turns the gradient of the view into the
    adversarial view, `twin.x_adv`, in one launch. It stores no gradient, and none flows on to `x`.
    Where several backward passes reach the view, the last one counts.

    The example below is the pair attack in a loop of one's own, at 9 units where plain training
    takes 6. The anchor's embedding is cut off the graph and becomes a leaf, into which both losses
    write their gradients. The anchor's encoder pass is taken back last, once.

    Args:
        x: The view.
        eps: Radius of the ball, a number or one per channel.
        step_size: Length of the move, a number or one per channel; None takes `eps`.
        lo: Lower bound of the values, a number or one per channel; None for no bound.
        hi: Upper bound of the values, a number or one per channel; None for no bound.
        impl: Implementation of `clae_fast.linf_step`.

    Returns:
        The view to give to the encoder, and its twin.

    Raises:
        TypeError: `x` is not a tensor of fp32, fp16 or fp64 (bf16 is too coarse for eps).
        ValueError: A length is negative or not finite, `lo` is not below `hi`, or the number of
            lengths is not that of the channels.

    Example:
        >>> z_p = encoder(x_p)
        >>> a = z_p.detach().requires_grad_()
        >>> x_q, twin = linf_twin(x_q, eps=8 / 255, lo=0.0, hi=1.0)
        >>> nt_xent(a, encoder(x_q)).backward()
        >>> nt_xent(a, adv_encoder(twin.x_adv)).backward()
        >>> z_p.backward(a.grad)
    """
    return LinfAttack(eps=eps, step_size=step_size, lo=lo, hi=hi, impl=impl).twin(x)


def _numbers(name: str, value: Any) -> list[float]:
    """The numbers of a length, which is given as one number or as one per channel."""
    numbers = list(value) if isinstance(value, (list, tuple)) else [value]
    if not numbers or any(not isinstance(number, (int, float)) for number in numbers):
        raise TypeError(f"{name} must be a number or one number per channel, got {value!r}")
    return numbers
