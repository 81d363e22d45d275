"""What schedules are composed of: options, passes and losses in the order that a step wants."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from clae_fast.attack import LinfAttack
from clae_fast.distributed import World
from clae_fast.passes import Around, AttackedPass, InputPass, Pass, frozen, run

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """How a step is taken, whatever the method.

    Attributes:
        kind: "none" (plain), "pair", "self" or "released".
        attack: How far the attack goes; needed unless `kind` is "none".
        adv_weight: Weight of the adversarial loss.
        adv_fraction: As in `pair_step`.
        adv_replace: As in `pair_step`.
        batched: As in `plain_step`, which alone heeds it.
        scale: What gradients are multiplied by.
        micro_batch: Rows of a chunk; None takes the batch at once.
        last_backward: Makes a context for the last backward pass.
        world: Processes that have other rows of the batch, all of which the losses see.
    """

    kind: str = "none"
    attack: LinfAttack | None = None
    adv_weight: float = 1.0
    adv_fraction: float = 1.0
    adv_replace: bool = False
    batched: bool = False
    scale: Tensor | None = None  # []
    micro_batch: int | None = None
    last_backward: Around = nullcontext
    world: World = field(default_factory=World.single)


class StepCost(NamedTuple):
    """What a step costs, as the views of its batch that go through an encoder and how far back.

    Attributes:
        trained: Views that are taken back to the weights, 3 units each.
        constant: Views that are not taken back, 1 unit each.
        attacked: Views that are taken back to themselves, counted once for each step of an attack
            that is not part of a trained pass, 2 units each.
    """

    trained: float
    constant: float = 0.0
    attacked: float = 0.0

    def units(self, *, chunks: bool = False) -> float:
        """Units of the step, of a view's forward pass; with `micro_batch`, `chunks`."""
        # a chunk that is taken back is encoded once more
        once_more = (self.trained + self.attacked) * chunks
        return 3 * self.trained + self.constant + 2 * self.attacked + once_more


class StepResult(NamedTuple):
    """What a step leaves behind besides gradients; constants, still on the device.

    Attributes:
        loss: The clean loss.
        adv_loss: The adversarial loss before its weight, None without one of its own.
        x_adv: The adversarial view of the rows that are attacked, None without an attack.
    """

    loss: Tensor  # []
    adv_loss: Tensor | None = None  # []
    x_adv: Tensor | None = None  # [N or fewer, C, ...]


class Parts:
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


def scalar(value: Any) -> Tensor:
    """The value of a loss, which has to be one number."""
    if not isinstance(value, Tensor) or value.dim() != 0:
        got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"loss must return a scalar tensor, got {got}")
    return value


def check_pair(x_p: Tensor, x_q: Tensor) -> None:
    """Raises unless both can be views of one batch."""
    for name, x in (("x_p", x_p), ("x_q", x_q)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x_p.shape[0] != x_q.shape[0]:
        raise ValueError(
            f"x_p and x_q must be views of one batch, got {x_p.shape[0]} and {x_q.shape[0]} rows"
        )


def check_attack(attack: LinfAttack, x: Tensor, name: str, adv_weight: float) -> None:
    """Raises unless the view `x`, called `name`, can be attacked and its loss weighted."""
    if not isinstance(attack, LinfAttack):
        raise TypeError(f"attack must be a LinfAttack, got {type(attack).__name__}")
    attack.check(name, x)
    if not isinstance(adv_weight, (int, float)):
        raise TypeError(f"adv_weight must be a number, got {type(adv_weight).__name__}")
    if not math.isfinite(adv_weight) or adv_weight < 0:
        raise ValueError(f"adv_weight must be finite and not negative, got {adv_weight}")


def check_scale(scale: Tensor | None) -> None:
    """Raises unless it can be a loss scale."""
    if scale is None:
        return
    if not isinstance(scale, Tensor):
        raise TypeError(f"scale must be a tensor, got {type(scale).__name__}")
    if scale.dim() != 0:
        raise ValueError(f"scale must be a scalar tensor, got shape {list(scale.shape)}")


def attacked_rows(adv_fraction: float, rows: int) -> int:
    """How many rows are attacked."""
    if not isinstance(adv_fraction, (int, float)):
        raise TypeError(f"adv_fraction must be a number, got {type(adv_fraction).__name__}")
    if not 0 < adv_fraction <= 1:
        raise ValueError(f"adv_fraction must be in (0, 1], got {adv_fraction}")
    # BatchNorm has no statistics of one
    return min(rows, max(2, round(adv_fraction * rows)))


def check_deterministic(module: nn.Module) -> None:
    """Raises ValueError naming the first submodule that would draw random numbers."""
    for name, child in module.named_modules():
        rate = _drop_rate(child) if child.training else 0.0
        if rate > 0:
            raise ValueError(
                "the self attack stands one forward pass for two, which random layers would tell "
                f"apart: set the rate of adv_encoder's {name or 'root'} "
                f"({type(child).__name__}, {rate:g}) to 0, or use the pair attack"
            )


def _drop_rate(module: nn.Module) -> float:
    """The rate of dropout or stochastic depth that `module` itself applies in training."""
    names = ["drop_prob", "drop_rate", "dropout", "attention_dropout"]
    # torchvision's and timm's layers are told by their names: neither library need be installed
    kind = type(module).__name__
    if isinstance(module, _DropoutNd) or "Drop" in kind or kind == "StochasticDepth":
        names += ["p", "prob"]
    rates = [vars(module).get(name) for name in names]
    return max((float(rate) for rate in rates if isinstance(rate, (int, float))), default=0.0)
