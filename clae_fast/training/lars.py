"""LARS, the optimizer of SimCLR in large batches."""

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer


class LARS(Optimizer):
    r"""SGD with momentum that scales the update of each tensor to the size of its weights.

    .. math::
        g \leftarrow g + \lambda w, \quad
        r = \eta \frac{\|w\|}{\|g\|} \text{ (1 where a norm is 0)}, \quad
        v \leftarrow \mu v + r g, \quad
        w \leftarrow w - \gamma v

    Biases and normalization weights (1-D tensors) take neither weight decay nor the scale.
    You et al., "Large batch training of convolutional networks", 2017.

    As torch's fused optimizers do, it undoes the loss scale of `torch.amp.GradScaler` itself, and
    does not move where a gradient is not finite, so that the host waits for neither. A learning
    rate may be a tensor, which a CUDA graph can replay with another value.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate gamma.
        momentum: The factor mu.
        weight_decay: The factor lambda.
        trust_coefficient: The factor eta.

    Raises:
        ValueError: An argument is negative.
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
        # GradScaler looks for this attribute
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
