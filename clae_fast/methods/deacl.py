"""DeACL: a student learns a frozen teacher's features, and to keep its own under attack."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clae_fast.methods.base import Method
from clae_fast.methods.options import NotNegative
from clae_fast.steps.batch import Batch
from clae_fast.steps.checks import check_attack
from clae_fast.steps.options import StepCost, StepOptions, StepResult
from clae_fast.steps.runner import PassRunner, gradient


class DeACL(Method):
    r"""Decoupled adversarial contrastive learning, its stage 2 (Zhang et al., ECCV 2022).

    A student f learns to give the features of a frozen teacher g, and to give the same ones for an
    adversarial view. Stage 1 trains the teacher, by any method. The loss is

    .. math:: x_{adv} = \mathrm{attack}(x, -\nabla_{x'} \cos(f(x'), g(x))), \quad
        -\cos(f(x), g(x)) - \gamma \cos(f(x_{adv}), f(x))

    averaged over the images. There is one view of each image, no other image in its loss and no
    softmax, so that the temperature has no effect.

    As in the released code, both rows of the second cosine are trained, and the clean and the
    adversarial view go through f at once. The paper has no projection head; here f has to give as
    many numbers as g. An attack of k moves makes a step cost 7 + 2 k units, of which g(x) is 1.

    Args:
        encoder: The student f, from views to what is compared with the teacher's features.
        teacher: The teacher g, from views to features; it is not trained.
        adversarial: As of `Method`; there is no twin.
        options: As of `Method`.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options(Method.Options):
        """Settings of DeACL.

        Attributes:
            gamma: Weight of the second cosine; `adv_weight` multiplies it.
        """

        gamma: NotNegative = 2.0

    name = "deacl"
    views = 1
    needs_teacher = True
    has_twin = False

    options: Options

    def __init__(
        self, encoder: nn.Module, *, teacher: nn.Module, adversarial: bool = False, **options: Any
    ) -> None:
        super().__init__(encoder, adversarial=adversarial, **options)
        self.teacher = teacher

    @classmethod
    def cost(cls, options: StepOptions, *, small_crops: float = 0.0, **own: Any) -> StepCost:
        """Counts the view, the teacher's pass, the adversarial view and the attack's moves."""
        if options.attack is None or options.kind == "none":
            return StepCost(trained=1, constant=1)
        return StepCost(trained=2, constant=1, attacked=options.attack.steps)

    def _step(self, batch: Batch, options: StepOptions) -> StepResult:
        (x,), attack = batch.views, options.attack
        runner = PassRunner(options.scale, options.micro_batch)
        distance = options.world.gather_loss(_distance)
        goal = runner.constant(self.teacher, x, "eval")
        views, adv, x_adv = batch.views, None, None
        if options.kind != "none":
            assert attack is not None
            check_attack(attack, x, "x", options.adv_weight)

            def from_goal(z: Tensor) -> Tensor:
                return gradient(lambda z: distance(z, goal), z)

            x_adv = runner.attack(self.encoder, x, attack, from_goal)
            views += (x_adv,)
        together = runner.run(self.encoder, torch.cat(views))
        z, *z_adv = together.z.split(len(x))
        clean = runner.backward(distance(z, goal))
        if x_adv is not None:
            weight = options.adv_weight * self.options.gamma
            adv = runner.backward(distance(z_adv[0], z), weight)
        together.back(options.last_backward)
        return StepResult(clean, adv, x_adv)


def _distance(a: Tensor, b: Tensor) -> Tensor:  # [N, F] each
    """The mean negative cosine of rows."""
    wide = torch.promote_types(a.dtype, torch.float32)
    return -F.cosine_similarity(a.to(wide), b.to(wide)).mean()
