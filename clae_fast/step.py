"""The schedules: which forward and backward pass of the encoder runs when.

One unit is one forward pass of the encoder over one view of the batch; the matching backward
passes, to activations and to weights, are one unit each. With f the encoder and f_adv its twin that
has BatchNorm layers of its own:

    plain_step      6   L(f(x_p), f(x_q))
    pair_step       9   the same + w L(f(x_p), f_adv(x_adv)), x_q attacked inside the clean pair
    self_step      11   the same, x_p attacked against itself through f_adv, as CLAE's code does
    released_step  15   what self_step computes, in the order of CLAE's code; its Plain takes 18

A schedule is a list of passes, see `clae_fast.passes`. Losses are taken at embeddings that are
leaves, and leave their gradients there; each pass is taken back once, for all of them. Common
options of the first three:

    scale           of the loss, as fp16 needs it: multiplies gradients, whose signs an attack takes
    micro_batch     encodes views in chunks, whose activations alone are alive, once to have all
                    embeddings and again to take them back: 8, 12 and 15 units. Equal to the whole
                    batch but for BatchNorm, whose statistics are then a chunk's
    last_backward   makes a context for the last backward pass, after which gradients are complete

and of pair_step and self_step, approximations that attack the first rows of a batch alone, a
fraction f of it; batches are random permutations:

    adv_fraction    adds an adversarial view to f of the rows: 6 + 3f units, or 6 + 5f
    adv_replace     puts it in the place of view q there: 6 + 2f units, for either attack

An attack's backward pass ends at the first convolution where that alone sees the attacked view and
`clae_fast.stem_step` has a kernel for it.

Every step adds to the `.grad` of whatever the losses depend on, as `backward()` does, and leaves
zeroing and the optimiser to the caller. None waits for the device. CLAE is Ho and Vasconcelos,
Contrastive Learning with Adversarial Examples, NeurIPS 2020; the fractions are after Mei et al.,
Fast AdvProp, ICLR 2022.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from clae_fast.attack import LinfAttack
from clae_fast.distributed import World
from clae_fast.methods import Method
from clae_fast.nn.grouped_norm import grouped_norm
from clae_fast.passes import Around, AttackedPass, InputPass, Pass, frozen, run

Loss = Callable[[Tensor, Tensor], Tensor]


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


def plain_step(
    encoder: nn.Module,
    x_p: Tensor,  # [N, C, ...]
    x_q: Tensor,  # as x_p
    loss: Loss,
    *,
    batched: bool = False,
    scale: Tensor | None = None,  # []
    micro_batch: int | None = None,
    last_backward: Around = nullcontext,
) -> StepResult:
    """Loss and gradients of a clean pair: 6 units, L(f(x_p), f(x_q)).

    Args:
        encoder: f, any module.
        x_p: First view.
        x_q: Second view.
        loss: `loss(z_a, z_b) -> scalar`, differentiable.
        batched: Encode both views in one pass of 2N rows, BatchNorm one after the other: the same
            result from half as many and larger operations. The other schedules have no such option.
            pair_step takes q back before p, for p's other loss is still to come: together they
            would go back twice, 11 units. self_step's 11 units would stay, but both views and the
            adversarial one would be alive at once, half as much memory again.
        scale: What gradients are multiplied by.
        micro_batch: Rows of a chunk; None takes the batch at once.
        last_backward: Makes a context for the last backward pass.

    Raises:
        TypeError: If an argument is of another kind.
        ValueError: If the views' batch sizes differ, an option is out of range or excludes another,
            or the loss is not a scalar.
    """
    _check_pair(x_p, x_q)
    parts = _Parts(loss, scale, micro_batch)
    if batched:
        if micro_batch is not None or x_p.shape != x_q.shape:
            raise ValueError("batched takes views of one shape, and no micro_batch")
        with grouped_norm(encoder, 2):
            both = Pass(encoder, torch.cat((x_p, x_q)))
        z_p, z_q = both.z.chunk(2)
        clean = parts.backward(z_p, z_q)
        both.back(last_backward)
        return StepResult(clean)
    p = parts.run(Pass, encoder, x_p)
    q = parts.run(Pass, encoder, x_q)
    clean = parts.backward(p.z, q.z)
    q.back()
    p.back(last_backward)
    return StepResult(clean)


def pair_step(
    encoder: nn.Module,
    adv_encoder: nn.Module,
    x_p: Tensor,  # [N, C, ...]
    x_q: Tensor,  # as x_p
    loss: Loss,
    *,
    attack: LinfAttack,
    adv_weight: float = 1.0,
    adv_fraction: float = 1.0,
    adv_replace: bool = False,
    scale: Tensor | None = None,  # []
    micro_batch: int | None = None,
    last_backward: Around = nullcontext,
) -> StepResult:
    """Contrastive training with an adversarial view, the pair attack: 9 units.

        x_adv = attack(x_q, gradient of L(f(x_p), f(x_q)) to x_q)
        total = L(f(x_p), f(x_q)) + adv_weight L(f(x_p), f_adv(x_adv)),    x_adv constant

    The clean pass of x_q supplies its weight gradients and the attack in one backward pass (3
    units), then x_adv (3), and x_p is taken back once for both losses (3). Nothing is computed
    twice, and never are more than two views' activations alive: the peak is plain training's. Equal
    to autograd of the formula above. The main BatchNorm sees x_p, then x_q; the twin's sees x_adv.

    With an `adv_fraction`, x_adv and L(f(x_p), f_adv(x_adv)) are those of its rows [:m] alone. With
    `adv_replace` the step has one loss, and the clean view of these rows is no part of it:

        x_adv = attack(x_q[:m], gradient of L(f(x_p)[:m], f(x_q[:m])) to x_q[:m])
        total = L(f(x_p), [f_adv(x_adv), f(x_q[m:])]),    x_adv constant

    The attack then is a pass of its own, 2m/N units, of which BatchNorm's running statistics see
    nothing, and view q costs as much as in plain training.

    Args:
        encoder: f, any module.
        adv_encoder: f_adv, `clae_fast.nn.adversarial_twin(encoder)`.
        x_p: The anchor's view, not attacked.
        x_q: The view to attack, fp32, fp16 or fp64.
        loss: `loss(z_a, z_b) -> scalar`, differentiable, such as `clae_fast.nt_xent`.
        attack: How far the attack goes.
        adv_weight: Weight of the adversarial loss; none is there with `adv_replace`.
        adv_fraction: The attacked rows' part of the batch, in (0, 1], rounded to m rows, at least
            2 of them.
        adv_replace: Whether x_adv replaces the clean view of its rows or is added to it.
        scale: What gradients are multiplied by.
        micro_batch: Rows of a chunk; None takes the batch at once.
        last_backward: Makes a context for the last backward pass.

    Raises:
        TypeError: If a view cannot be attacked or an argument is of another kind.
        ValueError: If the views' batch sizes differ, a number is out of range, or the loss is not a
            scalar.

    Example:
        >>> adv_encoder = clae_fast.nn.adversarial_twin(encoder)
        >>> attack = clae_fast.attack.LinfAttack(eps=8 / 255, lo=0.0, hi=1.0)
        >>> optimizer.zero_grad()
        >>> pair_step(encoder, adv_encoder, x_p, x_q, clae_fast.nt_xent, attack=attack)
        >>> optimizer.step()
    """
    _check_pair(x_p, x_q)
    _check_attack(attack, x_q, "x_q", adv_weight)
    m = _attacked_rows(adv_fraction, len(x_q))
    parts = _Parts(loss, scale, micro_batch)
    p = parts.run(Pass, encoder, x_p)
    if adv_replace:
        anchor = _first(m, p.z).detach()
        x_adv = parts.attacked(
            encoder, _first(m, x_q), attack, lambda z: _gradient(loss, anchor, z)
        )
        clean = parts.replaced(encoder, adv_encoder, p, x_adv, x_q, last_backward)
        return StepResult(clean, None, x_adv)
    q = parts.run(AttackedPass, encoder, x_q, attack)
    clean = parts.backward(p.z, q.z)
    q.back()
    x_adv = _first(m, q.x_adv)
    a = parts.run(Pass, adv_encoder, x_adv)
    adv = parts.backward(_first(m, p.z), a.z, adv_weight)
    a.back()
    p.back(last_backward)
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
    adv_fraction: float = 1.0,
    adv_replace: bool = False,
    scale: Tensor | None = None,  # []
    micro_batch: int | None = None,
    last_backward: Around = nullcontext,
) -> StepResult:
    """Contrastive training with an adversarial view, the self attack of CLAE's code: 11 units.

        x_adv = attack(x_p, gradient of L(f_adv(x_p), f_adv(x)) to x at x = x_p)
        total = L(f(x_p), f(x_q)) + adv_weight L(f(x_p), f_adv(x_adv)),    x_adv constant

    Both operands of the attacked loss have the same value: one forward pass through f_adv serves
    both, `attack_grad` gives the gradient at the embedding, and one backward pass goes to the input
    alone (2 units); then come the three trained passes (9). x_adv, losses and gradients are those
    of `released_step`, the peak of activations is plain training's, and the twin's BatchNorm
    buffers see x_adv only.

    With an `adv_fraction`, x_adv and L(f(x_p), f_adv(x_adv)) are those of its rows [:m] alone, of
    which the attack knows no others. With `adv_replace` the step has one loss, and view q of these
    rows is no part of it: total = L(f(x_p), [f_adv(x_adv), f(x_q[m:])]).

    Args:
        encoder: f, any module.
        adv_encoder: f_adv, `clae_fast.nn.adversarial_twin(encoder)`.
        x_p: The anchor's view, attacked, fp32, fp16 or fp64.
        x_q: The other view.
        loss: `loss(z_a, z_b) -> scalar`, differentiable.
        attack: How far the attack goes.
        attack_grad: Maps z to the gradient of `loss(z, z_b)` to z_b at z_b = z, up to a positive
            factor; `Method.attack_grad`, `clae_fast.tied_nt_xent`. z is not half precision.
        adv_weight: Weight of the adversarial loss; none is there with `adv_replace`.
        adv_fraction: The attacked rows' part of the batch, in (0, 1], rounded to m rows, at least
            2 of them.
        adv_replace: Whether x_adv replaces view q of its rows or is added to it.
        scale: What gradients are multiplied by.
        micro_batch: Rows of a chunk; None takes the batch at once.
        last_backward: Makes a context for the last backward pass.

    Raises:
        TypeError: If a view cannot be attacked or an argument is of another kind.
        ValueError: If `adv_encoder` has active dropout or stochastic depth, the views' batch sizes
            differ, a number is out of range, or the loss is not a scalar.
    """
    _check_pair(x_p, x_q)
    _check_attack(attack, x_p, "x_p", adv_weight)
    _check_deterministic(adv_encoder)
    m = _attacked_rows(adv_fraction, len(x_p))
    parts = _Parts(loss, scale, micro_batch)
    x_adv = parts.attacked(adv_encoder, _first(m, x_p), attack, attack_grad)
    p = parts.run(Pass, encoder, x_p)
    if adv_replace:
        clean = parts.replaced(encoder, adv_encoder, p, x_adv, x_q, last_backward)
        return StepResult(clean, None, x_adv)
    q = parts.run(Pass, encoder, x_q)
    clean = parts.backward(p.z, q.z)
    q.back()
    a = parts.run(Pass, adv_encoder, x_adv)
    adv = parts.backward(_first(m, p.z), a.z, adv_weight)
    a.back()
    p.back(last_backward)
    return StepResult(clean, adv, x_adv)


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
    scale: Tensor | None = None,  # []
    last_backward: Around = nullcontext,
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
        scale: What gradients are multiplied by.
        last_backward: Makes a context for the last backward pass, which takes all back.

    Raises:
        TypeError: If a view cannot be attacked or an argument is of another kind.
        ValueError: If the views' batch sizes differ, `adv_weight` is negative or not finite, or the
            loss is not a scalar.
    """
    _check_pair(x_p, x_q)
    _check_attack(attack, x_p, "x_p", adv_weight)
    _check_scale(scale)
    z_p = encoder(x_p)
    # no leaf, to which torch's FLOP counter cannot follow
    x = x_p.detach().requires_grad_().view_as(x_p)
    attacked = _scaled(_scalar(loss, adv_encoder(x_p), adv_encoder(x)), scale)
    weights = [weight for weight in adv_encoder.parameters() if weight.requires_grad]
    dx, *_ = torch.autograd.grad(attacked, [x, *weights], allow_unused=True)
    x_adv = attack.step(x_p, dx)
    del x, attacked, dx
    clean = _scalar(loss, z_p, encoder(x_q))
    anchor = encoder(x_p) if reforward_anchor else z_p
    adv = _scalar(loss, anchor, adv_encoder(x_adv))
    with last_backward():
        _scaled(clean + adv_weight * adv, scale).backward()
    return StepResult(clean.detach(), adv.detach(), x_adv)


def method_step(
    method: Method,
    views: Sequence[Tensor],  # of [N, C, ...]
    *,
    kind: str = "none",
    attack: LinfAttack | None = None,
    adv_weight: float = 1.0,
    adv_fraction: float = 1.0,
    adv_replace: bool = False,
    batched: bool = False,
    scale: Tensor | None = None,  # []
    micro_batch: int | None = None,
    last_backward: Around = nullcontext,
    world: World | None = None,
) -> StepResult:
    """One step of a method on its views, under one of the schedules.

    Args:
        method: Encoders, loss and attack gradient.
        views: As many views of one batch as `method.views` says.
        kind: "none" (plain), "pair", "self" or "released".
        attack: How far the attack goes; needed unless `kind` is "none".
        adv_weight: Weight of the adversarial loss.
        adv_fraction: As in `pair_step`; 1 for "released".
        adv_replace: As in `pair_step`; False for "released".
        batched: As in `plain_step`, which alone heeds it.
        scale: What gradients are multiplied by.
        micro_batch: Rows of a chunk; None takes the batch at once, as "released" must.
        last_backward: Makes a context for the last backward pass.
        world: Processes that have other rows of the batch, all of which the losses see.

    Raises:
        TypeError: If an argument is of another kind.
        ValueError: If `kind` is unknown or does not have an option, the number of views is not the
            method's, or the method was built without its adversarial encoder and `kind` needs one.
    """
    if kind not in ("none", "pair", "self", "released"):
        raise ValueError(f"kind must be none, pair, self or released, got {kind!r}")
    if len(views) != method.views:
        raise ValueError(f"views must be {method.views} for {method.name}, got {len(views)}")
    x_p, x_q = views
    world = world or World.single()
    loss = world.gather_loss(method.loss)
    options: dict[str, Any] = {"scale": scale, "last_backward": last_backward}
    if kind == "none":
        return plain_step(
            method.encoder,
            x_p,
            x_q,
            loss,
            batched=batched,
            micro_batch=micro_batch,
            **options,
        )
    if method.adv_encoder is None or attack is None:
        raise ValueError(f"kind={kind!r} needs an attack and a method built with adversarial=True")
    given = (method.encoder, method.adv_encoder, x_p, x_q, loss)
    options |= {"attack": attack, "adv_weight": adv_weight}
    if kind == "released":
        if (adv_fraction, adv_replace, micro_batch) != (1, False, None):
            raise ValueError("kind='released' has no adv_fraction, adv_replace or micro_batch")
        return released_step(*given, reforward_anchor=method.reforward_anchor, **options)
    options |= {
        "adv_fraction": adv_fraction,
        "adv_replace": adv_replace,
        "micro_batch": micro_batch,
    }
    if kind == "pair":
        return pair_step(*given, **options)
    return self_step(*given, attack_grad=world.gather_grad(method.attack_grad), **options)


class _Parts:
    """What schedules consist of, with the options that are the same for all parts of a step."""

    def __init__(self, loss: Loss, scale: Tensor | None, micro_batch: int | None) -> None:
        _check_scale(scale)
        if micro_batch is not None:
            if not isinstance(micro_batch, int):
                raise TypeError(f"micro_batch must be an integer, got {type(micro_batch).__name__}")
            if micro_batch < 1:
                raise ValueError(f"micro_batch must be at least 1, got {micro_batch}")
        self._loss = loss
        self._scale = scale
        self._micro_batch = micro_batch

    def run(self, kind: Callable[..., Pass], encoder: nn.Module, x: Tensor, *options: Any) -> Pass:
        """Runs a view, 1 unit."""
        return run(kind, encoder, x, *options, micro_batch=self._micro_batch)

    def backward(self, z_a: Tensor, z_b: Tensor, weight: float = 1.0) -> Tensor:
        """The loss, which leaves its gradients, weighted and scaled, at the embeddings."""
        value = _scalar(self._loss, z_a, z_b)
        _scaled(value if weight == 1 else weight * value, self._scale).backward()
        return value.detach()

    def attacked(
        self,
        encoder: nn.Module,
        x: Tensor,
        attack: LinfAttack,
        gradient: Callable[[Tensor], Tensor],  # [N, D] -> [N, D]
    ) -> Tensor:
        """Runs a view and takes it back to the input alone, 2 units: x_adv."""
        with frozen(encoder):
            view = self.run(InputPass, encoder, x, attack)
            z = view.z.detach()
            # in fp32 until it is scaled
            dz = gradient(z.to(torch.promote_types(z.dtype, torch.float32)))
            view.z.grad = _scaled(dz, self._scale).to(z.dtype)
            view.back()
        return view.x_adv

    def replaced(
        self,
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
        value = self.backward(p.z, torch.cat([view.z for view in passes]))
        for view in passes:
            view.back()
        p.back(last_backward)
        return value


def _first(rows: int, x: Tensor) -> Tensor:
    """The first rows, or the tensor itself where these are all."""
    return x if rows == len(x) else x[:rows]


def _scaled(value: Tensor, scale: Tensor | None) -> Tensor:
    return value if scale is None else scale * value


def _gradient(loss: Loss, z_a: Tensor, z_b: Tensor) -> Tensor:
    """The gradient of a loss by `z_b` alone."""
    z_b = z_b.requires_grad_()
    (dz_b,) = torch.autograd.grad(_scalar(loss, z_a.to(z_b.dtype), z_b), z_b)
    return dz_b


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


def _check_scale(scale: Tensor | None) -> None:
    if scale is None:
        return
    if not isinstance(scale, Tensor):
        raise TypeError(f"scale must be a tensor, got {type(scale).__name__}")
    if scale.dim() != 0:
        raise ValueError(f"scale must be a scalar tensor, got shape {list(scale.shape)}")


def _attacked_rows(adv_fraction: float, rows: int) -> int:
    """How many rows are attacked."""
    if not isinstance(adv_fraction, (int, float)):
        raise TypeError(f"adv_fraction must be a number, got {type(adv_fraction).__name__}")
    if not 0 < adv_fraction <= 1:
        raise ValueError(f"adv_fraction must be in (0, 1], got {adv_fraction}")
    # BatchNorm has no statistics of one
    return min(rows, max(2, round(adv_fraction * rows)))


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
