"""RoCL: an adversarial view is one more view of its image."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from clae_fast import _check
from clae_fast.distributed import World
from clae_fast.methods.base import Method
from clae_fast.ops.sup_con import sup_con
from clae_fast.steps.batch import Batch
from clae_fast.steps.checks import check_attack, check_pair
from clae_fast.steps.options import StepCost, StepOptions, StepResult
from clae_fast.steps.runner import PassRunner, gradient


class RoCL(Method):
    r"""Robust contrastive learning (Kim, Tack and Hwang, NeurIPS 2020).

    .. math:: x_{adv} = \mathrm{attack}(x_p, \nabla_x L_2(f(x), f(x_q))), \quad
        L_3(f(x_p), f(x_q), f(x_{adv})) + w L_2(f(x_{adv}), f(x_q))

    L_V is the sum over ordered pairs of an image's V views of -log softmax over all other rows,
    divided by the V N rows; columns are constants, so that a row's gradient comes from its own
    terms. All three views go through f at once, and share the statistics of BatchNorm.

    Units of k steps: 9, 1 for f(x_q) in the mode of the attack, and 2 k.

    Args:
        encoder: f, from views to raw projections.
        temperature: Temperature of the softmax.
        adversarial: Whether there will be attacks; they need no twin.
        reg_weight: w, the code's 1 / lambda; `adv_weight` multiplies it.

    Raises:
        ValueError: If `reg_weight` is negative or not finite.
    """

    name: ClassVar[str] = "rocl"
    units: ClassVar[Mapping[str, int]] = {"none": 6, "pair": 12}
    has_twin: ClassVar[bool] = False

    def __init__(
        self,
        encoder: nn.Module,
        *,
        temperature: float = 0.5,
        adversarial: bool = False,
        reg_weight: float = 1 / 256,
    ) -> None:
        super().__init__(encoder, temperature=temperature, adversarial=adversarial)
        _check.in_range("reg_weight", reg_weight, 0)
        self.reg_weight = reg_weight

    @classmethod
    def cost(cls, options: StepOptions, *, small_crops: float = 0.0, **own: Any) -> StepCost:
        """Of two views, or of three, f(x_q) in the attack, and its steps."""
        if options.attack is None or options.kind == "none":
            return StepCost(trained=2)
        return StepCost(trained=3, constant=1, attacked=options.attack.steps)

    def _step(self, batch: Batch, options: StepOptions) -> StepResult:
        x_p, x_q = batch.views
        check_pair(x_p, x_q)
        runner, world = PassRunner(options.scale, options.micro_batch), options.world
        if options.kind == "none":
            both = runner.run(self.encoder, torch.cat((x_p, x_q)))
            clean = runner.backward(self._loss(both.z, 2, world))
            both.back(options.last_backward)
            return StepResult(clean)
        attack = options.attack
        assert attack is not None
        check_attack(attack, x_p, "x_p", options.adv_weight)
        z_q = runner.constant(self.encoder, x_q, attack.norm)

        def against_q(z: Tensor) -> Tensor:
            return self._loss(torch.cat((z, z_q)), 2, world)

        x_adv = runner.attack(self.encoder, x_p, attack, lambda z: gradient(against_q, z))
        views = runner.run(self.encoder, torch.cat((x_p, x_q, x_adv)))
        clean = runner.backward(self._loss(views.z, 3, world))
        _, *others = views.z.chunk(3)
        weight = options.adv_weight * self.reg_weight
        adv = runner.backward(self._loss(torch.cat(others), 2, world), weight)
        views.back(options.last_backward)
        return StepResult(clean, adv, x_adv)

    def _loss(self, z: Tensor, views: int, world: World) -> Tensor:  # [V N, D], V
        """L_V of the rows of all processes."""
        images = torch.arange(world.size * len(z) // views, device=z.device)
        # below one another lie the rows of a process, and its views among them
        labels = images.view(world.size, 1, -1).expand(-1, views, -1).flatten()
        # the mean over the other views of a row is not the sum
        return (views - 1) * sup_con(
            world.gather(z), labels, temperature=self.temperature, detach_columns=True
        )
