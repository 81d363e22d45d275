"""Checks of a step's arguments, made before anything is computed."""

import math
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parallel import DistributedDataParallel

from clae_fast.attack import LinfAttack


def scalar(value: Any) -> Tensor:
    """The value itself, once it is known to be a scalar tensor."""
    if not isinstance(value, Tensor) or value.dim() != 0:
        got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"loss must return a scalar tensor, got {got}")
    return value


def check_pair(x_p: Tensor, x_q: Tensor) -> None:
    """Raises unless both are tensors with the same number of rows."""
    for name, x in (("x_p", x_p), ("x_q", x_q)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x_p.shape[0] != x_q.shape[0]:
        raise ValueError(
            f"x_p and x_q must be views of one batch, got {x_p.shape[0]} and {x_q.shape[0]} rows"
        )


def check_encoders(*encoders: nn.Module) -> None:
    """Raises if one is wrapped in DistributedDataParallel, which needs one backward pass a step."""
    for encoder in encoders:
        if isinstance(encoder, DistributedDataParallel):
            raise TypeError(
                "encoder must not be wrapped in DistributedDataParallel: the step takes several "
                "backward passes, so sum gradients by clae_fast.distributed.reducer.GradientReducer"
            )


def check_attack(attack: LinfAttack, x: Tensor, name: str, adv_weight: float) -> None:
    """Raises unless `attack` can attack the view `x`, called `name`, and the weight is valid."""
    if not isinstance(attack, LinfAttack):
        raise TypeError(f"attack must be a LinfAttack, got {type(attack).__name__}")
    attack.check(name, x)
    if not isinstance(adv_weight, (int, float)):
        raise TypeError(f"adv_weight must be a number, got {type(adv_weight).__name__}")
    if not math.isfinite(adv_weight) or adv_weight < 0:
        raise ValueError(f"adv_weight must be finite and not negative, got {adv_weight}")


def check_scale(scale: Tensor | None) -> None:
    """Raises unless it is None or a scalar tensor."""
    if scale is None:
        return
    if not isinstance(scale, Tensor):
        raise TypeError(f"scale must be a tensor, got {type(scale).__name__}")
    if scale.dim() != 0:
        raise ValueError(f"scale must be a scalar tensor, got shape {list(scale.shape)}")


def check_micro_batch(micro_batch: int | None) -> None:
    """Raises unless it can be a number of rows."""
    if micro_batch is None:
        return
    if not isinstance(micro_batch, int):
        raise TypeError(f"micro_batch must be an integer, got {type(micro_batch).__name__}")
    if micro_batch < 1:
        raise ValueError(f"micro_batch must be at least 1, got {micro_batch}")


def attacked_rows(adv_fraction: float, rows: int) -> int:
    """How many rows a fraction of a batch has: at least two, and no more than there are."""
    if not isinstance(adv_fraction, (int, float)):
        raise TypeError(f"adv_fraction must be a number, got {type(adv_fraction).__name__}")
    if not 0 < adv_fraction <= 1:
        raise ValueError(f"adv_fraction must be in (0, 1], got {adv_fraction}")
    # BatchNorm cannot take statistics of one row
    return min(rows, max(2, round(adv_fraction * rows)))


def check_deterministic(module: nn.Module) -> None:
    """Raises ValueError that names the first submodule with active dropout or stochastic depth."""
    for name, child in module.named_modules():
        rate = _drop_rate(child) if child.training else 0.0
        if rate > 0:
            raise ValueError(
                "the self attack uses one forward pass in place of two, but a random layer makes "
                f"the two different: set the rate of adv_encoder's {name or 'root'} "
                f"({type(child).__name__}, {rate:g}) to 0, or use the pair attack"
            )


def _drop_rate(module: nn.Module) -> float:
    """The rate of dropout or stochastic depth that `module` itself applies in training mode."""
    names = ["drop_prob", "drop_rate", "dropout", "attention_dropout"]
    # layers of torchvision and timm are known by name, so that neither has to be installed
    kind = type(module).__name__
    if isinstance(module, _DropoutNd) or "Drop" in kind or kind == "StochasticDepth":
        names += ["p", "prob"]
    rates = [vars(module).get(name) for name in names]
    return max((float(rate) for rate in rates if isinstance(rate, (int, float))), default=0.0)
