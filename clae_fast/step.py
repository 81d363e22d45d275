"""The schedules: which forward and backward pass of the encoder runs when.

One unit is one forward pass of the encoder over one view of the batch; the matching backward
passes, to activations and to weights, are one unit each. With f the encoder and f_adv its twin that
has BatchNorm layers of its own:

    plain_step      6   L(f(x_p), f(x_q))
    pair_step       9   the same + w L(f(x_p), f_adv(x_adv)), x_q attacked inside the clean pair
    self_step      11   the same, x_p attacked against itself through f_adv, as CLAE's code does
    released_step  15   what self_step computes, in the order of CLAE's code; its Plain takes 18

An attack's backward pass ends at the first convolution where that alone sees the attacked view and
`clae_fast.stem_step` has a kernel for it.

Every step adds to the `.grad` of whatever the losses depend on, as `backward()` does, and leaves
zeroing and the optimiser to the caller. None waits for the device. CLAE is Ho and Vasconcelos,
Contrastive Learning with Adversarial Examples, NeurIPS 2020.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from clae_fast import stem
from clae_fast.attack import LinfAttack
from clae_fast.methods import Method

Loss = Callable[[Tensor, Tensor], Tensor]


class StepResult(NamedTuple):
    """What a step leaves behind besides gradients; constants, still on the device.

    Attributes:
        loss: The clean loss.
        adv_loss: The adversarial loss before its weight, None without an attack.
        x_adv: The adversarial view, None without an attack.
    """

    loss: Tensor  # []
    adv_loss: Tensor | None = None  # []
    x_adv: Tensor | None = None  # [N, C, ...]


def plain_step(
    encoder: nn.Module,
    x_p: Tensor,  # [N, C, ...]
    x_q: Tensor,  # as x_p
    loss: Loss,
) -> StepResult:
    """Loss and gradients of a clean pair: 6 units, L(f(x_p), f(x_q)).

    Args:
        encoder: f, any module.
        x_p: First view.
        x_q: Second view.
        loss: `loss(z_a, z_b) -> scalar`, differentiable.
    """
    _check_pair(x_p, x_q)
    clean = _scalar(loss, encoder(x_p), encoder(x_q))
    clean.backward()
    return StepResult(clean.detach())


def pair_step(
    encoder: nn.Module,
    adv_encoder: nn.Module,
    x_p: Tensor,  # [N, C, ...]
    x_q: Tensor,  # as x_p
    loss: Loss,
    *,
    attack: LinfAttack,
    adv_weight: float = 1.0,
) -> StepResult:
    """Contrastive training with an adversarial view, the pair attack: 9 units.

        x_adv = attack(x_q, gradient of L(f(x_p), f(x_q)) to x_q)
        total = L(f(x_p), f(x_q)) + adv_weight L(f(x_p), f_adv(x_adv)),    x_adv constant

    The clean pass of x_q supplies its weight gradients and the attack in one backward pass (3
    units), then x_adv (3), and x_p is taken back once for both losses (3). Nothing is computed
    twice, and never are more than two views' activations alive: the peak is plain training's. Equal
    to autograd of the formula above. The main BatchNorm sees x_p, then x_q; the twin's sees x_adv.

    Args:
        encoder: f, any module.
        adv_encoder: f_adv, `clae_fast.nn.adversarial_twin(encoder)`.
        x_p: The anchor's view, not attacked.
        x_q: The view to attack, fp32, fp16 or fp64.
        loss: `loss(z_a, z_b) -> scalar`, differentiable, such as `clae_fast.nt_xent`.
        attack: How far the attack goes.
        adv_weight: Weight of the adversarial loss.

    Raises:
        TypeError: If a view cannot be attacked or an argument is of another kind.
        ValueError: If the views' batch sizes differ, `adv_weight` is negative or not finite, or the
            loss is not a scalar.

    Example:
        >>> adv_encoder = clae_fast.nn.adversarial_twin(encoder)
        >>> attack = clae_fast.attack.LinfAttack(eps=8 / 255, lo=0.0, hi=1.0)
        >>> optimizer.zero_grad()
        >>> pair_step(encoder, adv_encoder, x_p, x_q, clae_fast.nt_xent, attack=attack)
        >>> optimizer.step()
    """
    _check_pair(x_p, x_q)
    _check_attack(attack, x_q, "x_q", adv_weight)
    z_p, anchor = _anchor(encoder, x_p)
    clean, x_adv = _attacked_pair(encoder, anchor, x_q, loss, attack)
    adv = _adversarial_pair(adv_encoder, z_p, anchor, x_adv, loss, adv_weight)
    return StepResult(clean, adv, x_adv)


def self_step(
    encoder: nn.Module,
    adv_encoder: nn.Module,
    x_p: Tensor,  # [N, C, ...]
    x_q: Tensor,  # as x_p
    loss: Loss,
    *,
    attack: LinfAttack,
    attack_grad: Callable[[Tensor], Tensor],  # [N, D] -> [N, D]
    adv_weight: float = 1.0,
) -> StepResult:
    """Contrastive training with an adversarial view, the self attack of CLAE's code: 11 units.

        x_adv = attack(x_p, gradient of L(f_adv(x_p), f_adv(x)) to x at x = x_p)
        total = L(f(x_p), f(x_q)) + adv_weight L(f(x_p), f_adv(x_adv)),    x_adv constant

    Both operands of the attacked loss have the same value: one forward pass through f_adv serves
    both, `attack_grad` gives the gradient at the embedding, and one backward pass goes to the input
    alone (2 units); then come the three trained passes (9). x_adv, losses and gradients are those
    of `released_step`, the peak of activations is plain training's, and the twin's BatchNorm
    buffers see x_adv only.

    Args:
        encoder: f, any module.
        adv_encoder: f_adv, `clae_fast.nn.adversarial_twin(encoder)`.
        x_p: The anchor's view, attacked, fp32, fp16 or fp64.
        x_q: The other view.
        loss: `loss(z_a, z_b) -> scalar`, differentiable.
        attack: How far the attack goes.
        attack_grad: Maps z to the gradient of `loss(z, z_b)` to z_b at z_b = z, up to a positive
            factor; `Method.attack_grad`, `clae_fast.tied_nt_xent`.
        adv_weight: Weight of the adversarial loss.

    Raises:
        TypeError: If a view cannot be attacked or an argument is of another kind.
        ValueError: If `adv_encoder` has active dropout or stochastic depth, the views' batch sizes
            differ, `adv_weight` is negative or not finite, or the loss is not a scalar.
    """
    _check_pair(x_p, x_q)
    _check_attack(attack, x_p, "x_p", adv_weight)
    _check_deterministic(adv_encoder)
    x_adv = _self_attacked(adv_encoder, x_p, attack, attack_grad)
    z_p, anchor = _anchor(encoder, x_p)
    clean = _scalar(loss, anchor, encoder(x_q))
    clean.backward()
    adv = _adversarial_pair(adv_encoder, z_p, anchor, x_adv, loss, adv_weight)
    return StepResult(clean.detach(), adv, x_adv)


def released_step(
    encoder: nn.Module,
    adv_encoder: nn.Module,
    x_p: Tensor,  # [N, C, ...]
    x_q: Tensor,  # as x_p
    loss: Loss,
    *,
    attack: LinfAttack,
    adv_weight: float = 1.0,
    reforward_anchor: bool = False,
) -> StepResult:
    """`self_step` as CLAE's code runs it: 15 units, or 18. The baseline of benchmarks and tests.

    The attack runs x_p through f_adv twice, with weight gradients on both sides that are thrown
    away (6 units), and the twin's BatchNorm buffers see the clean view twice. Then all three
    trained passes (9, or 12 with the anchor's second) stay alive until one backward at the end.

    Args:
        encoder: f, any module.
        adv_encoder: f_adv, `clae_fast.nn.adversarial_twin(encoder)`.
        x_p: The anchor's view, attacked, fp32, fp16 or fp64.
        x_q: The other view.
        loss: `loss(z_a, z_b) -> scalar`, differentiable.
        attack: How far the attack goes.
        adv_weight: Weight of the adversarial loss.
        reforward_anchor: Compute f(x_p) again for the adversarial loss, as the code's Plain does.

    Raises:
        TypeError: If a view cannot be attacked or an argument is of another kind.
        ValueError: If the views' batch sizes differ, `adv_weight` is negative or not finite, or the
            loss is not a scalar.
    """
    _check_pair(x_p, x_q)
    _check_attack(attack, x_p, "x_p", adv_weight)
    z_p = encoder(x_p)
    x = _attackable(x_p)
    attacked = _scalar(loss, adv_encoder(x_p), adv_encoder(x))
    weights = [weight for weight in adv_encoder.parameters() if weight.requires_grad]
    dx, *_ = torch.autograd.grad(attacked, [x, *weights], allow_unused=True)
    x_adv = attack.step(x_p, dx)
    del x, attacked, dx
    clean = _scalar(loss, z_p, encoder(x_q))
    anchor = encoder(x_p) if reforward_anchor else z_p
    adv = _scalar(loss, anchor, adv_encoder(x_adv))
    (clean + adv_weight * adv).backward()
    return StepResult(clean.detach(), adv.detach(), x_adv)


def method_step(
    method: Method,
    views: Sequence[Tensor],  # of [N, C, ...]
    *,
    kind: str = "none",
    attack: LinfAttack | None = None,
    adv_weight: float = 1.0,
) -> StepResult:
    """One step of a method on its views, under one of the schedules.

    Args:
        method: Encoders, loss and attack gradient.
        views: As many views of one batch as `method.views` says.
        kind: "none" (plain), "pair", "self" or "released".
        attack: How far the attack goes; needed unless `kind` is "none".
        adv_weight: Weight of the adversarial loss.

    Raises:
        ValueError: If `kind` is unknown, the number of views is not the method's, or the method was
            built without its adversarial encoder and `kind` needs one.
    """
    if kind not in ("none", "pair", "self", "released"):
        raise ValueError(f"kind must be none, pair, self or released, got {kind!r}")
    if len(views) != method.views:
        raise ValueError(f"views must be {method.views} for {method.name}, got {len(views)}")
    x_p, x_q = views
    if kind == "none":
        return plain_step(method.encoder, x_p, x_q, method.loss)
    if method.adv_encoder is None or attack is None:
        raise ValueError(f"kind={kind!r} needs an attack and a method built with adversarial=True")
    passes = (method.encoder, method.adv_encoder, x_p, x_q, method.loss)
    if kind == "pair":
        return pair_step(*passes, attack=attack, adv_weight=adv_weight)
    if kind == "self":
        return self_step(
            *passes, attack=attack, attack_grad=method.attack_grad, adv_weight=adv_weight
        )
    return released_step(
        *passes, attack=attack, adv_weight=adv_weight, reforward_anchor=method.reforward_anchor
    )


def _attackable(x: Tensor) -> Tensor:
    """The view with a gradient wanted; no leaf, to which torch's FLOP counter cannot follow."""
    return x.detach().requires_grad_().view_as(x)


def _anchor(encoder: nn.Module, x_p: Tensor) -> tuple[Tensor, Tensor]:
    """Runs x_p, 1 unit, and cuts its graph off: it waits at the anchor for both losses."""
    z_p = encoder(x_p)
    return z_p, z_p.detach().requires_grad_()


def _attacked_pair(
    encoder: nn.Module, anchor: Tensor, x_q: Tensor, loss: Loss, attack: LinfAttack
) -> tuple[Tensor, Tensor]:
    """Runs x_q and takes it back, 3 units: the clean loss and x_adv."""
    view, twin = attack.twin(x_q)
    z_q, find_stem = stem.forward(encoder, view, attack.impl)
    clean = _scalar(loss, anchor, z_q)
    found = find_stem(clean)
    if found is None:
        clean.backward()
        return clean.detach(), twin.x_adv
    steps: list[Tensor] = []

    def step(dys: tuple[Tensor | None]) -> None:
        (dy,) = dys
        if dy is None:  # zero
            steps.append(attack.project(x_q, x_q))
        else:
            steps.append(attack.stem_step(x_q, dy, **found.convolution))

    hook = found.node.register_prehook(step)
    # not to the view, so that the convolution computes its weight's gradient alone
    clean.backward(inputs=found.leaves)
    hook.remove()
    (x_adv,) = steps
    return clean.detach(), x_adv


def _self_attacked(
    adv_encoder: nn.Module,
    x_p: Tensor,
    attack: LinfAttack,
    attack_grad: Callable[[Tensor], Tensor],
) -> Tensor:
    """Runs x_p and takes it back to the input alone, 2 units: x_adv."""
    view = _attackable(x_p)
    with _buffers_held(adv_encoder):
        z, find_stem = stem.forward(adv_encoder, view, attack.impl)
    dz = attack_grad(z.detach())
    found = find_stem(z)
    # asked for one gradient alone, autograd computes no weight's
    if found is None:
        (dx,) = torch.autograd.grad(z, view, dz)
        return attack.step(x_p, dx)
    (dy,) = torch.autograd.grad(z, [GradientEdge(found.node, 0)], dz)
    return attack.stem_step(x_p, dy, **found.convolution)


def _adversarial_pair(
    adv_encoder: nn.Module,
    z_p: Tensor,
    anchor: Tensor,
    x_adv: Tensor,
    loss: Loss,
    adv_weight: float,
) -> Tensor:
    """Runs x_adv and takes it back, then x_p for both losses at once: 3 + 2 units."""
    adv = _scalar(loss, anchor, adv_encoder(x_adv))
    (adv_weight * adv).backward()
    if anchor.grad is not None:  # a loss may hold its anchor constant
        z_p.backward(anchor.grad)
    return adv.detach()


@contextmanager
def _buffers_held(module: nn.Module) -> Iterator[None]:
    """Normalises by the batch's statistics without updating the running ones."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def _scalar(loss: Loss, z_a: Tensor, z_b: Tensor) -> Tensor:
    value = loss(z_a, z_b)
    if not isinstance(value, Tensor) or value.dim() != 0:
        got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"loss must return a scalar tensor, got {got}")
    return value


def _check_pair(x_p: Tensor, x_q: Tensor) -> None:
    for name, x in (("x_p", x_p), ("x_q", x_q)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x_p.shape[0] != x_q.shape[0]:
        raise ValueError(
            f"x_p and x_q must be views of one batch, got {x_p.shape[0]} and {x_q.shape[0]} rows"
        )


def _check_attack(attack: LinfAttack, x: Tensor, name: str, adv_weight: float) -> None:
    if not isinstance(attack, LinfAttack):
        raise TypeError(f"attack must be a LinfAttack, got {type(attack).__name__}")
    attack.check(name, x)
    if not isinstance(adv_weight, (int, float)):
        raise TypeError(f"adv_weight must be a number, got {type(adv_weight).__name__}")
    if not math.isfinite(adv_weight) or adv_weight < 0:
        raise ValueError(f"adv_weight must be finite and not negative, got {adv_weight}")


def _check_deterministic(module: nn.Module) -> None:
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
