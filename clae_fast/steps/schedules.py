"""The schedules of a training step: which forward and backward pass of the encoder runs when.

A unit is one forward pass of the encoder over one view of the batch. A backward pass costs one unit
for the gradient of the activations, and one for the gradient of the weights. To take a view back
means to run its backward pass. f is the encoder, and f_adv is its adversarial twin, which has
BatchNorm layers of its own. w is the weight of the adversarial loss.

    schedule       units  loss
    plain_step         6  L(f(x_p), f(x_q))
    pair_step          9  L(f(x_p), f(x_q)) + w L(f(x_p), f_adv(x_adv)), x_adv made from x_q
    self_step         11  the same with x_adv made from x_p, which f_adv compares with itself
    released_step     15  the loss of self_step in the order of CLAE's code; 18 as in its Plain
    query_step       3 V  sum_v L_v(f(x_v)) over V views; an attack on the first view adds 3

A schedule makes passes (`clae_fast.steps.passes`). Losses leave their gradients at the passes'
embeddings, and each pass is taken back through the encoder once, for all of its losses.

Three options are common to plain_step, pair_step, self_step and query_step:

    scale           The loss scale that fp16 needs. It multiplies all gradients. An attack only
                    takes their signs.
    micro_batch     The views are encoded in chunks of this many rows. Each chunk is encoded once
                    for the embeddings, and once more before it is taken back. So only one chunk's
                    activations are alive at a time. plain_step then costs 8 units, pair_step 12 and
                    self_step 15. The result is that of the whole batch, except that BatchNorm uses
                    the statistics of a chunk.
    last_backward   Makes a context that the last backward pass runs in. After that pass all
                    gradients are complete.

pair_step and self_step can attack only a fraction F of the batch, its first rows. A batch is in
random order, so these rows are a random choice. This is an approximation:

    adv_fraction    These rows get an adversarial view: 6 + 3 F units in pair_step, 6 + 5 F in
                    self_step.
    adv_replace     The adversarial view replaces their view q: 6 + 2 F units in both.

An attack of k moves adds 2 (k - 1) units, since a move computes no gradients of weights. The first
move is free if a training pass makes it. If `LinfAttack.start` or `LinfAttack.norm` rule that out,
the first move costs 2 units in pair_step and query_step, and a random start costs 1 unit in
self_step. A backward pass to the view ends at the encoder's first convolution if nothing else takes
the view and `clae_fast.stem_step` has a kernel for that convolution (`clae_fast.steps.stem`).

Every schedule adds to the `.grad` of all that its losses depend on, as `backward()` does. The
caller zeroes the gradients and runs the optimizer. No schedule waits for the device.

Sources: Ho and Vasconcelos, Contrastive Learning with Adversarial Examples, NeurIPS 2020 (CLAE);
Mei et al., Fast AdvProp, ICLR 2022 (the fractions).
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from clae_fast.attack import LinfAttack
from clae_fast.nn.grouped_norm import grouped_norm
from clae_fast.steps.checks import (
    attacked_rows,
    check_attack,
    check_deterministic,
    check_encoders,
    check_pair,
    check_scale,
    scalar,
)
from clae_fast.steps.options import StepResult
from clae_fast.steps.passes import Around, Pass
from clae_fast.steps.runner import Loss, PassRunner, first, gradient, scaled

QueryLoss = Callable[[Tensor, int], Tensor]


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
    """Plain contrastive training, L(f(x_p), f(x_q)): 6 units.

    Args:
        encoder: f, any module.
        x_p: First view.
        x_q: Second view.
        loss: `loss(z_a, z_b) -> scalar`, differentiable.
        batched: Whether both views are encoded in one pass of 2N rows, in which BatchNorm treats
            the views one after the other. The result is the same, but it takes half as many
            operations, which are larger. The other schedules have no such option. pair_step would
            need 11 units, since it takes q back before the other loss of p is known. self_step
            would hold the activations of three views instead of two.
        scale: The loss scale; None for none.
        micro_batch: How many rows are encoded at once; None encodes the batch at once.
        last_backward: Makes a context that the last backward pass runs in.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: The views' batch sizes differ, an option is out of range or excludes another, or
            the loss is not a scalar.
    """
    check_encoders(encoder)
    check_pair(x_p, x_q)
    runner = PassRunner(scale, micro_batch)
    if batched:
        if micro_batch is not None or x_p.shape != x_q.shape:
            raise ValueError("batched takes views of one shape, and no micro_batch")
        with grouped_norm(encoder, 2):
            both = Pass(encoder, torch.cat((x_p, x_q)))
        z_p, z_q = both.z.chunk(2)
        clean = runner.backward(loss(z_p, z_q))
        both.back(last_backward)
        return StepResult(clean)
    p = runner.run(encoder, x_p)
    q = runner.run(encoder, x_q)
    clean = runner.backward(loss(p.z, q.z))
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

    ::

        x_adv = attack(x_q, gradient of L(f(x_p), f(x)) to x)
        total = L(f(x_p), f(x_q)) + adv_weight L(f(x_p), f_adv(x_adv)),    x_adv constant

    The backward pass of x_q gives both the weight gradients and the gradient for the attack (3
    units with the forward pass). Then x_adv is trained on (3 units), and x_p is taken back once for
    both losses (3 units with its forward pass). Nothing is computed twice. At most two views'
    activations are alive, as in plain training. The result equals autograd of the formula above.
    The encoder's BatchNorm sees x_p and then x_q, and the twin's BatchNorm sees x_adv. Further
    moves of the attack are passes of their own, which do not change BatchNorm's running statistics.
    All of them use the f(x_p) of the training pass.

    With an `adv_fraction` of m rows, only the rows [:m] are attacked, and the adversarial loss is
    taken over these rows. With `adv_replace` the step has one loss, which does not see the clean
    view of these rows::

        x_adv = attack(x_q[:m], gradient of L(f(x_p)[:m], f(x)) to x)
        total = L(f(x_p), [f_adv(x_adv), f(x_q[m:])]),    x_adv constant

    Then no training pass makes a move of the attack. So k moves cost 2 k m / N units, and view q
    costs as much as in plain training.

    Args:
        encoder: f, any module.
        adv_encoder: f_adv, `clae_fast.nn.adversarial_twin(encoder)`.
        x_p: The anchor's view, which is not attacked.
        x_q: The view to attack, fp32, fp16 or fp64.
        loss: `loss(z_a, z_b) -> scalar`, differentiable, such as `clae_fast.nt_xent`.
        attack: How far the attack goes.
        adv_weight: Weight of the adversarial loss; `adv_replace` has no such loss.
        adv_fraction: Which part of the batch is attacked, in (0, 1]. It is rounded to m rows, at
            least 2.
        adv_replace: Whether x_adv replaces the clean view of its rows instead of joining it.
        scale: The loss scale; None for none.
        micro_batch: How many rows are encoded at once; None encodes the batch at once.
        last_backward: Makes a context that the last backward pass runs in.

    Raises:
        TypeError: A view cannot be attacked, or an argument has the wrong type.
        ValueError: The views' batch sizes differ, a number is out of range, or the loss is not a
            scalar.

    Example:
        >>> adv_encoder = clae_fast.nn.adversarial_twin(encoder)
        >>> attack = clae_fast.attack.LinfAttack(eps=8 / 255, lo=0.0, hi=1.0)
        >>> optimizer.zero_grad()
        >>> pair_step(encoder, adv_encoder, x_p, x_q, clae_fast.nt_xent, attack=attack)
        >>> optimizer.step()
    """
    check_encoders(encoder, adv_encoder)
    check_pair(x_p, x_q)
    check_attack(attack, x_q, "x_q", adv_weight)
    m = attacked_rows(adv_fraction, len(x_q))
    runner = PassRunner(scale, micro_batch)
    p = runner.run(encoder, x_p)
    x_0, attack_grad = first(m, x_q), _against(loss, first(m, p.z))
    if adv_replace:
        x_adv = runner.attack(encoder, x_0, attack, attack_grad)
        return _replaced(runner, loss, encoder, adv_encoder, p, x_adv, x_q, last_backward)
    q = runner.run_attackable(encoder, x_q, attack)
    clean = runner.backward(loss(p.z, q.z))
    q.back()
    x_adv = runner.attack(encoder, x_0, attack, attack_grad, q)
    a = runner.run(adv_encoder, x_adv)
    adv = runner.backward(loss(first(m, p.z), a.z), adv_weight)
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

    ::

        x_adv = attack(x_p, gradient of L(f_adv(x_p), f_adv(x)) to x)
        total = L(f(x_p), f(x_q)) + adv_weight L(f(x_p), f_adv(x_adv)),    x_adv constant

    At x = x_p both operands of the attacked loss have the same value. So one forward pass through
    f_adv serves both, `attack_grad` gives the gradient at the embeddings, and one backward pass
    goes to the view alone (2 units in all). Further moves use that f_adv(x_p) as a constant (2
    units each). With a random start, f_adv(x_p) takes a forward pass of its own (1 unit). Then come
    the three training passes (9 units). With one move, x_adv, the losses and the gradients are
    those of `released_step`. At most two views' activations are alive. The twin's BatchNorm
    statistics see only x_adv.

    With an `adv_fraction` of m rows, only the rows [:m] are attacked, the attack sees no others,
    and the adversarial loss is taken over them. With `adv_replace` the step has one loss, which
    does not see view q of these rows: total = L(f(x_p), [f_adv(x_adv), f(x_q[m:])]).

    Args:
        encoder: f, any module.
        adv_encoder: f_adv, `clae_fast.nn.adversarial_twin(encoder)`.
        x_p: The anchor's view, which is attacked, fp32, fp16 or fp64.
        x_q: The other view.
        loss: `loss(z_a, z_b) -> scalar`, differentiable.
        attack: How far the attack goes.
        attack_grad: Maps z to the gradient of `loss(z, z_b)` with respect to z_b at z_b = z, up to
            a positive factor; `clae_fast.tied_nt_xent` for NT-Xent. z is fp32 or fp64.
        adv_weight: Weight of the adversarial loss; `adv_replace` has no such loss.
        adv_fraction: Which part of the batch is attacked, in (0, 1]. It is rounded to m rows, at
            least 2.
        adv_replace: Whether x_adv replaces view q of its rows instead of joining it.
        scale: The loss scale; None for none.
        micro_batch: How many rows are encoded at once; None encodes the batch at once.
        last_backward: Makes a context that the last backward pass runs in.

    Raises:
        TypeError: A view cannot be attacked, or an argument has the wrong type.
        ValueError: `adv_encoder` has active dropout or stochastic depth, so that one pass cannot
            serve in place of two; the views' batch sizes differ; a number is out of range; or the
            loss is not a scalar.
    """
    check_encoders(encoder, adv_encoder)
    check_pair(x_p, x_q)
    check_attack(attack, x_p, "x_p", adv_weight)
    if attack.begins_in_training:
        check_deterministic(adv_encoder)
    m = attacked_rows(adv_fraction, len(x_p))
    runner = PassRunner(scale, micro_batch)
    x_0 = first(m, x_p)
    anchor = None
    if attack.start != "view":
        anchor = runner.constant(adv_encoder, x_0, attack.norm)

    def against_itself(z: Tensor) -> Tensor:
        nonlocal anchor
        if anchor is None:
            anchor = z
            return attack_grad(z)
        return _against(loss, anchor)(z)

    x_adv = runner.attack(adv_encoder, x_0, attack, against_itself)
    p = runner.run(encoder, x_p)
    if adv_replace:
        return _replaced(runner, loss, encoder, adv_encoder, p, x_adv, x_q, last_backward)
    q = runner.run(encoder, x_q)
    clean = runner.backward(loss(p.z, q.z))
    q.back()
    a = runner.run(adv_encoder, x_adv)
    adv = runner.backward(loss(first(m, p.z), a.z), adv_weight)
    a.back()
    p.back(last_backward)
    return StepResult(clean, adv, x_adv)


def query_step(
    encoder: nn.Module,
    x: Sequence[Tensor],  # V of [N, C, ...]
    loss: QueryLoss,
    *,
    adv_encoder: nn.Module | None = None,
    attack: LinfAttack | None = None,
    adv_weight: float = 1.0,
    scale: Tensor | None = None,  # []
    micro_batch: int | None = None,
    last_backward: Around = nullcontext,
) -> StepResult:
    """Training on views that are each compared with constants, as queries with keys: 3 units each.

    ::

        total = sum_v L_v(f(x_v))

    Each view is taken back before the next one is encoded, so only one view's activations are alive
    at a time. An attack adds 3 units. The backward pass of the first view makes the adversarial
    view, which is then compared with the same constants::

        x_adv = attack(x_0, gradient of L_0(f(x)) to x)
        total = sum_v L_v(f(x_v)) + adv_weight L_0(f_adv(x_adv)),    x_adv constant

    Args:
        encoder: f, any module.
        x: The views; their sizes may differ.
        loss: `loss(z, v) -> scalar`, differentiable in the embeddings z of view v.
        adv_encoder: f_adv, `clae_fast.nn.adversarial_twin(encoder)`; needed for an attack.
        attack: How far the attack goes; None for none.
        adv_weight: Weight of the adversarial loss.
        scale: The loss scale; None for none.
        micro_batch: How many rows are encoded at once; None encodes the batch at once.
        last_backward: Makes a context that the last backward pass runs in.

    Raises:
        TypeError: A view cannot be attacked, or an argument has the wrong type.
        ValueError: There is no view, an attack has no `adv_encoder`, a number is out of range, or
            the loss is not a scalar.
    """
    if not x:
        raise ValueError("x must have at least one view, got none")
    check_encoders(encoder, *([] if adv_encoder is None else [adv_encoder]))
    runner = PassRunner(scale, micro_batch)
    if attack is None:
        losses = []
        for v, view in enumerate(x):
            query = runner.run(encoder, view)
            losses.append(runner.backward(loss(query.z, v)))
            query.back(last_backward if v == len(x) - 1 else nullcontext)
        return StepResult(torch.stack(losses).sum())
    if adv_encoder is None:
        raise ValueError("adv_encoder must be given for an attack, got None")
    check_attack(attack, x[0], "x[0]", adv_weight)
    attacked = runner.run_attackable(encoder, x[0], attack)
    losses = [runner.backward(loss(attacked.z, 0))]
    attacked.back()
    for v, view in enumerate(x[1:], 1):
        query = runner.run(encoder, view)
        losses.append(runner.backward(loss(query.z, v)))
        query.back()
    x_adv = runner.attack(
        encoder, x[0], attack, lambda z: gradient(lambda z: loss(z, 0), z), attacked
    )
    a = runner.run(adv_encoder, x_adv)
    adv = runner.backward(loss(a.z, 0), adv_weight)
    a.back(last_backward)
    return StepResult(torch.stack(losses).sum(), adv, x_adv)


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
    """The step of `self_step` in the order of CLAE's code: 15 units, or 18.

    Benchmarks and tests compare with it. The attack encodes x_p twice with f_adv. It also computes
    weight gradients for both passes, and throws them away (6 units). The twin's BatchNorm
    statistics see the clean view twice. Then come the three training passes (9 units, or 12 if the
    anchor is encoded again). Their activations stay alive until one backward pass at the end.

    Args:
        encoder: f, any module.
        adv_encoder: f_adv, `clae_fast.nn.adversarial_twin(encoder)`.
        x_p: The anchor's view, which is attacked, fp32, fp16 or fp64.
        x_q: The other view.
        loss: `loss(z_a, z_b) -> scalar`, differentiable.
        attack: How far the attack goes, in one move.
        adv_weight: Weight of the adversarial loss.
        reforward_anchor: Whether f(x_p) is computed again for the adversarial loss, as the Plain
            variant of the code does.
        scale: The loss scale; None for none.
        last_backward: Makes a context that the backward pass to the weights runs in.

    Raises:
        TypeError: A view cannot be attacked, or an argument has the wrong type.
        ValueError: The views' batch sizes differ, `adv_weight` is negative or not finite, the loss
            is not a scalar, or the attack makes several moves or does not start at the view in
            train mode.
    """
    check_encoders(encoder, adv_encoder)
    check_pair(x_p, x_q)
    check_attack(attack, x_p, "x_p", adv_weight)
    if attack.steps > 1 or not attack.begins_in_training:
        raise ValueError(
            "released_step needs an attack of one step, from the view in train mode, got "
            f"steps={attack.steps}, start={attack.start!r}, norm={attack.norm!r}"
        )
    check_scale(scale)
    z_p = encoder(x_p)
    # torch's FLOP counter does not see a backward pass that ends at a leaf
    x = x_p.detach().requires_grad_().view_as(x_p)
    attacked = scaled(scalar(loss(adv_encoder(x_p), adv_encoder(x))), scale)
    weights = [weight for weight in adv_encoder.parameters() if weight.requires_grad]
    dx, *_ = torch.autograd.grad(attacked, [x, *weights], allow_unused=True)
    x_adv = attack.step(x_p, dx)
    del x, attacked, dx
    clean = scalar(loss(z_p, encoder(x_q)))
    anchor = encoder(x_p) if reforward_anchor else z_p
    adv = scalar(loss(anchor, adv_encoder(x_adv)))
    with last_backward():
        scaled(clean + adv_weight * adv, scale).backward()
    return StepResult(clean.detach(), adv.detach(), x_adv)


def _replaced(
    runner: PassRunner,
    loss: Loss,
    encoder: nn.Module,
    adv_encoder: nn.Module,
    p: Pass,
    x_adv: Tensor,  # [m, C, ...]
    x_q: Tensor,  # [N, C, ...]
    last_backward: Around,
) -> StepResult:
    """Trains on p and on q, with the adversarial view as q's first rows: one loss, 5 units."""
    passes = [runner.run(adv_encoder, x_adv)]
    if len(x_adv) < len(x_q):
        passes.append(runner.run(encoder, x_q[len(x_adv) :]))
    value = runner.backward(loss(p.z, torch.cat([view.z for view in passes])))
    for view in passes:
        view.back()
    p.back(last_backward)
    return StepResult(value, None, x_adv)


def _against(loss: Loss, anchor: Tensor) -> Callable[[Tensor], Tensor]:
    """A function of embeddings: the gradient of their loss against a constant anchor."""
    anchor = anchor.detach()
    return lambda z: gradient(lambda z: loss(anchor.to(z.dtype), z), z)
