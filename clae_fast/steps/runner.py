"""Runs the passes of a step with the options that are the same for all of them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from clae_fast.attack import LinfAttack
from clae_fast.steps.checks import check_micro_batch, check_scale, scalar
from clae_fast.steps.passes import AttackedPass, CachedPass, InputPass, Pass, frozen

Loss = Callable[[Tensor, Tensor], Tensor]


class PassRunner:
    """Runs views through encoders and takes losses back to their embeddings.

    Args:
        scale: The loss scale, which multiplies every gradient; None for none.
        micro_batch: How many rows are encoded at once; None encodes the batch at once.

    Raises:
        TypeError: `scale` is no tensor, or `micro_batch` no integer.
        ValueError: `scale` is no scalar, or `micro_batch` is below 1.
    """

    def __init__(self, scale: Tensor | None = None, micro_batch: int | None = None) -> None:
        check_scale(scale)
        check_micro_batch(micro_batch)
        self._scale = scale
        self._micro_batch = micro_batch

    def run(
        self,
        encoder: nn.Module,
        x: Tensor,  # [N, C, ...]
        kind: Callable[..., Pass] = Pass,
        *options: Any,
    ) -> Pass:
        """Encodes a view: 1 unit.

        Args:
            encoder: The encoder.
            x: The view.
            kind: `Pass`, `AttackedPass` or `InputPass`.
            options: Further arguments of `kind`; a tensor among them has the view's rows.
        """
        if self._micro_batch is None:
            return kind(encoder, x, *options)
        return CachedPass(kind, encoder, x, options, self._micro_batch)

    def run_attackable(
        self,
        encoder: nn.Module,
        x: Tensor,  # [N, C, ...]
        attack: LinfAttack,
    ) -> Pass:
        """Encodes a view whose backward pass also makes the attack's first move, where it can."""
        if attack.begins_in_training:
            return self.run(encoder, x, AttackedPass, attack)
        return self.run(encoder, x)

    def constant(
        self,
        encoder: nn.Module,
        x: Tensor,  # [N, C, ...]
        norm: str,
    ) -> Tensor:  # [N, D]
        """Embeddings without gradients, 1 unit; the encoder is left as it was.

        Args:
            encoder: The encoder.
            x: The view.
            norm: How BatchNorm normalizes, as in `LinfAttack.norm`.
        """
        with torch.no_grad(), frozen(encoder, norm):
            return torch.cat([encoder(chunk) for chunk in x.split(self._micro_batch or len(x))])

    def backward(self, loss: Tensor, weight: float = 1.0) -> Tensor:  # []
        """Takes a loss back to the embeddings, weighted and scaled, and returns its value."""
        loss = scalar(loss)
        scaled(loss if weight == 1 else weight * loss, self._scale).backward()
        return loss.detach()

    def attack(
        self,
        encoder: nn.Module,
        x0: Tensor,  # [N, C, ...]
        attack: LinfAttack,
        attack_grad: Callable[[Tensor], Tensor],  # [N, D] -> [N, D]
        trained: Pass | None = None,
    ) -> Tensor:  # as x0
        """Makes the attack's moves, 2 units each, and returns the adversarial view.

        Each move encodes the view and goes back to the view alone. The encoder's weights get no
        gradient, and its BatchNorm statistics stay as they are.

        Args:
            encoder: The encoder that the attack is against.
            x0: The view, which is the center of the ball.
            attack: How far the attack goes.
            attack_grad: Maps embeddings to the gradient of the attacked loss there. It gets
                embeddings in fp32 or fp64.
            trained: A pass by `run_attackable`, taken back already, whose first rows are `x0`. Its
                backward pass has made the first move.
        """
        x, moves = attack.begin(x0), attack.steps
        if trained is not None and attack.begins_in_training:
            x, moves = first(len(x0), trained.x_adv), moves - 1
        with frozen(encoder, attack.norm):
            for _ in range(moves):
                view = self.run(encoder, x, InputPass, attack, None if x is x0 else x0)
                z = view.z.detach()
                # half precision comes last: the scale keeps small gradients above zero there
                dz = attack_grad(z.to(torch.promote_types(z.dtype, torch.float32)))
                view.z.grad = scaled(dz, self._scale).to(z.dtype)
                view.back()
                x = view.x_adv
        return x


def first(rows: int, x: Tensor) -> Tensor:
    """The first rows of a tensor, and the tensor itself where these are all."""
    return x if rows == len(x) else x[:rows]


def scaled(value: Tensor, scale: Tensor | None) -> Tensor:
    """The value times the loss scale, where there is one."""
    return value if scale is None else scale * value


def gradient(loss: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """The gradient of a loss at embeddings."""
    z = z.detach().requires_grad_()
    (dz,) = torch.autograd.grad(scalar(loss(z)), z)
    return dz
