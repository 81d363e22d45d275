"""LARS, the optimiser of large-batch SimCLR."""

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer


class LARS(Optimizer):
    r"""SGD with momentum whose step is scaled, tensor by tensor, to the weights it moves.

    .. math::
        g \leftarrow g + \lambda w, \quad
        r = \eta \frac{\|w\|}{\|g\|} \text{ (1 where a norm is 0)}, \quad
        v \leftarrow \mu v + r g, \quad
        w \leftarrow w - \gamma v

    Biases and normalisation weights (1-D tensors) take neither weight decay nor the scale.
    You et al., "Large batch training of convolutional networks", 2017.

    As with torch's fused optimisers, `torch.amp.GradScaler` leaves to it to undo the loss scale and
    to stand still where a gradient is not finite, so that the host waits for neither. Learning
    rates may be tensors, which CUDA graphs can replay with another value.

    Args:
        params: parameters or parameter groups.
        lr: learning rate gamma.
        momentum: mu.
        weight_decay: lambda.
        trust_coefficient: eta.

    Raises:
        ValueError: a negative argument.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
        }
        for name, value in defaults.items():
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        super().__init__(params, defaults)
        # what GradScaler asks for
        self._step_supports_amp_scaling = True

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Moves the parameters by one step; returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scale = getattr(self, "grad_scale", None)
        found_inf = getattr(self, "found_inf", None)
        for group in self.param_groups:
            for w in group["params"]:
                if w.grad is not None:
                    grad = w.grad if scale is None else w.grad / scale
                    self._move(w, grad, group, found_inf)
        return loss

    def _move(
        self, w: Tensor, grad: Tensor, group: dict[str, Any], found_inf: Tensor | None
    ) -> None:
        if w.ndim > 1:
            grad = grad.add(w, alpha=group["weight_decay"])
            w_norm, grad_norm = w.norm(), grad.norm()
            ratio = group["trust_coefficient"] * w_norm / grad_norm
            grad = grad * torch.where((w_norm > 0) & (grad_norm > 0), ratio, 1.0)
        state = self.state[w]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(w)
        velocity = state["momentum_buffer"]
        moved = velocity * group["momentum"] + grad
        if found_inf is not None:
            moved = torch.where(found_inf > 0, velocity, moved)
            w.sub_(torch.where(found_inf > 0, 0.0, group["lr"] * moved))
        else:
            w.sub_(group["lr"] * moved)
        velocity.copy_(moved)
