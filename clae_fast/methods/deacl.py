"""DeACL: a student learns a frozen teacher's features, and to keep its own under attack."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clae_fast import _check
from clae_fast.methods.base import Method
from clae_fast.steps.batch import Batch
from clae_fast.steps.checks import check_attack
from clae_fast.steps.options import StepCost, StepOptions, StepResult
from clae_fast.steps.runner import PassRunner, gradient


class DeACL(Method):
    r"""Decoupled adversarial contrastive learning, stage 2 (Zhang et al., ECCV 2022).

    .. math:: x_{adv} = \mathrm{attack}(x, -\nabla_{x'} \cos(f(x'), g(x))), \quad
        -\cos(f(x), g(x)) - \gamma \cos(f(x_{adv}), f(x))

    averaged over the images. g is the teacher, which any method trained (stage 1). Both rows of the
    second cosine are trained, and both views go through f at once. There is no pair of an image's
    views, no other image in a loss, and in the paper no projection: f gives as many numbers as g.

    Units of k steps: 6, 1 for g(x), and 2 k.

    Args:
        encoder: f, from views to what is compared with the teacher's features.
        teacher: g, from views to features; it is not trained.
        temperature: There is no softmax: of no effect.
        adversarial: Whether there will be attacks; they need no twin.
        gamma: Weight of the second cosine; `adv_weight` multiplies it.

    Raises:
        ValueError: If `gamma` is negative or not finite.
    """

    name: ClassVar[str] = "deacl"
    units: ClassVar[Mapping[str, int]] = {"none": 4, "pair": 9}
    views: ClassVar[int] = 1
    needs_teacher: ClassVar[bool] = True
    has_twin: ClassVar[bool] = False

    def __init__(
        self,
        encoder: nn.Module,
        *,
        teacher: nn.Module,
        temperature: float = 0.5,
        adversarial: bool = False,
        gamma: float = 2.0,
    ) -> None:
        super().__init__(encoder, temperature=temperature, adversarial=adversarial)
        _check.in_range("gamma", gamma, 0)
        self.teacher = teacher
        self.gamma = gamma

    @classmethod
    def cost(cls, options: StepOptions, *, small_crops: float = 0.0, **own: Any) -> StepCost:
        """Of one view and the teacher's, and its attack and adversarial view."""
        if options.attack is None or options.kind == "none":
            return StepCost(trained=1, constant=1)
        return StepCost(trained=2, constant=1, attacked=options.attack.steps)

    def _step(self, batch: Batch, options: StepOptions) -> StepResult:
        (x,) = batch.views
        runner = PassRunner(options.scale, options.micro_batch)
        distance = options.world.gather_loss(_distance)
        goal = runner.constant(self.teacher, x, "eval")
        if options.kind == "none":
            student = runner.run(self.encoder, x)
            clean = runner.backward(distance(student.z, goal))
            student.back(options.last_backward)
            return StepResult(clean)
        attack = options.attack
        assert attack is not None
        check_attack(attack, x, "x", options.adv_weight)

        def from_goal(z: Tensor) -> Tensor:
            return distance(z, goal)

        x_adv = runner.attack(self.encoder, x, attack, lambda z: gradient(from_goal, z))
        both = runner.run(self.encoder, torch.cat((x, x_adv)))
        z, z_adv = both.z.chunk(2)
        clean = runner.backward(distance(z, goal))
        adv = runner.backward(distance(z_adv, z), options.adv_weight * self.gamma)
        both.back(options.last_backward)
        return StepResult(clean, adv, x_adv)


def _distance(a: Tensor, b: Tensor) -> Tensor:  # [N, F] each
    """The negative cosine of rows, on average."""
    wide = torch.promote_types(a.dtype, torch.float32)
    return -F.cosine_similarity(a.to(wide), b.to(wide)).mean()
