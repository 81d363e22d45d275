"""How far an attack goes, from where and in how many steps inside an l-infinity ball.

    x_t+1 = clip(clip(x_t + step_size * sign(g_t), x_0 - eps, x_0 + eps), lo, hi)

One step is the fast gradient sign method (Goodfellow et al., ICLR 2015), several are projected
gradient descent (Madry et al., ICLR 2018). `linf_twin` is a step for a loop that is written by
hand: an identity whose backward pass leaves the adversarial view behind.
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
    """Identity; its backward writes `twin.x_adv` and hands no gradient on."""

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
    """Attacks inside an l-infinity ball: one signed step, or several (PGD).

    All lengths are in the units of the view: a view normalised by `std` takes a radius of
    `eps / std`, one number per channel, and bounds `(0 - mean) / std`, `(1 - mean) / std`.

    Attributes:
        eps: Radius of the ball, a number or one per channel (dim 1 of the view).
        step_size: Length of a step, a number or one per channel; None takes `eps`.
        lo: Lower end of the range of values, a number or one per channel; None leaves it open.
        hi: Upper end of the range of values, a number or one per channel; None leaves it open.
        steps: How many steps it takes, each of 2 units; where a trained pass of the view gives the
            first one, that costs nothing.
        start: Where the first one starts: at the "view", or at a "random" point of the ball.
        norm: How BatchNorm normalises in passes for the attack alone: by the batch as in "train"
            mode, or by running statistics, the whole encoder in "eval" mode.
        impl: Implementation of `clae_fast.linf_step` and `clae_fast.stem_step`.

    Raises:
        TypeError: If a length is neither a number nor a sequence of numbers, or `steps` no integer.
        ValueError: If a length is negative or not finite, `lo` is not below `hi`, `steps` is not
            positive, or `start` or `norm` is none of those.
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
        """Whether a trained pass of the view can give the first step."""
        return (self.start, self.norm) == ("view", "train")

    def begin(self, x0: Tensor) -> Tensor:
        """Where the first step starts, random by the global generator of `x0`'s device."""
        return x0 if self.start == "view" else self.random_start(x0)

    def step(
        self,
        x: Tensor,  # [N, C, ...]
        grad: Tensor,  # as x
        x0: Tensor | None = None,  # as x
    ) -> Tensor:
        """One signed step from `x` along `grad`, projected; one launch.

        Args:
            x: Where the step starts.
            grad: Gradient of the loss at `x`; the sign of NaN is 0.
            x0: Centre of the ball; None takes `x`.

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
        """`step` along the input gradient of a convolution, which is not stored; one launch.

        Args:
            x: Where the step starts, and the centre of the ball.
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
        # number by number: CUDA graphs capture no copy of them to the device
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
    """Marks a view for attack: the backward pass that reaches it leaves `twin.x_adv` behind.

    The forward is the identity. The backward turns the input gradient into the adversarial view
    in one launch and stores no gradient; nothing flows on to `x`. When several backward passes
    reach the view, the last one counts.

    The pair attack in anybody's loop, 9 units where plain training takes 6, needs one cut: the
    anchor's embedding becomes a leaf that both losses write into, and the anchor's encoder pass is
    taken back once, last.

    Args:
        x: The view.
        eps: Radius, a number or one per channel.
        step_size: Length of the step, a number or one per channel; None takes `eps`.
        lo: Lower end of the range of values; None leaves it open.
        hi: Upper end of the range of values; None leaves it open.
        impl: Implementation of `clae_fast.linf_step`.

    Returns:
        The view to give to the encoder, and its twin.

    Raises:
        TypeError: If `x` is not a tensor of fp32, fp16 or fp64; bf16 is too coarse for eps.
        ValueError: If a length is negative or not finite, `lo` is not below `hi`, or there are not
            as many lengths as channels.

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
    """The numbers in a length given as a number or one per channel."""
    numbers = list(value) if isinstance(value, (list, tuple)) else [value]
    if not numbers or any(not isinstance(number, (int, float)) for number in numbers):
        raise TypeError(f"{name} must be a number or one number per channel, got {value!r}")
    return numbers
