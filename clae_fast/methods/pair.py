"""Methods whose two views meet in one loss."""

from abc import abstractmethod
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from clae_fast.methods.base import Method
from clae_fast.steps.batch import Batch
from clae_fast.steps.options import ALONE, StepContext, StepCost, StepOptions, StepResult
from clae_fast.steps.schedules import pair_step, plain_step, released_step, self_step


class PairMethod(Method):
    """A method whose two views meet in one loss; a subclass defines that loss and no more.

    Attributes:
        reforward_anchor: Whether CLAE's code encodes the anchor anew for the adversarial loss.
    """

    kinds = ("none", "pair", "self", "released")
    fractions = True
    reforward_anchor: ClassVar[bool] = False

    @abstractmethod
    def loss(self, z_a: Tensor, z_b: Tensor, context: StepContext = ALONE) -> Tensor:
        """The loss of a pair of views at their raw projections.

        Args:
            z_a: Projections of the anchor's view, of all processes' rows, [N, D].
            z_b: Projections of the other view, clean or adversarial, [N, D].
            context: What else of the step the loss may need.

        Returns:
            A scalar, differentiable in both.
        """

    def attack_grad(self, z: Tensor, context: StepContext = ALONE) -> Tensor:
        """Gradient of `loss(z, z_b)` by z_b alone at z_b = z, which the self attack follows.

        Args:
            z: Projections through the adversarial encoder, of all processes' rows, [N, D].
            context: As of `loss`.

        Returns:
            The gradient at the projections, [N, D].
        """
        z = z.detach()
        z_b = z.clone().requires_grad_()
        with torch.enable_grad():
            (dz,) = torch.autograd.grad(self.loss(z, z_b, context), z_b)
        return dz

    @classmethod
    def cost(cls, options: StepOptions, *, small_crops: float = 0.0, **own: Any) -> StepCost:
        """Counts the passes of the schedule that a step of this kind takes."""
        kind, attack, part = options.kind, options.attack, options.adv_fraction
        if kind == "none" or attack is None:
            return StepCost(trained=2)
        if kind == "released":
            # both sides of the attack go back to the weights, too
            return StepCost(trained=5 + cls.reforward_anchor)
        # a trained pass of view q takes the attack's first move, unless x_adv replaces the view
        free = kind == "pair" and attack.begins_in_training and not options.adv_replace
        return StepCost(
            trained=2 if options.adv_replace else 2 + part,
            constant=part if kind == "self" and attack.start != "view" else 0,
            attacked=part * (attack.steps - free),
        )

    def _step(self, batch: Batch, options: StepOptions) -> StepResult:
        (x_p, x_q), kind, world = batch.views, options.kind, options.world

        def context(rows: int) -> StepContext:
            # the loss may be of the first rows alone, see adv_fraction
            labels = batch.labels[:rows] if self.needs_labels and batch.labels is not None else None
            return StepContext(world, None if labels is None else world.all_gather(labels))

        def loss(z_a: Tensor, z_b: Tensor) -> Tensor:
            return world.gather_loss(partial(self.loss, context=context(len(z_a))))(z_a, z_b)

        def attack_grad(z: Tensor) -> Tensor:
            return world.gather_grad(partial(self.attack_grad, context=context(len(z))))(z)

        given: dict[str, Any] = {"scale": options.scale, "last_backward": options.last_backward}
        chunks = {"micro_batch": options.micro_batch}
        if kind == "none":
            given |= chunks | {"batched": options.batched}
            return plain_step(self.encoder, x_p, x_q, loss, **given)
        assert self.adv_encoder is not None
        both = (self.encoder, self.adv_encoder, x_p, x_q, loss)
        given |= {"attack": options.attack, "adv_weight": options.adv_weight}
        approximate = {"adv_fraction": options.adv_fraction, "adv_replace": options.adv_replace}
        if kind == "released":
            if options.micro_batch is not None or tuple(approximate.values()) != (1, False):
                raise ValueError("kind='released' has no adv_fraction, adv_replace or micro_batch")
            return released_step(*both, reforward_anchor=self.reforward_anchor, **given)
        given |= chunks | approximate
        if kind == "pair":
            return pair_step(*both, **given)
        return self_step(*both, attack_grad=attack_grad, **given)
