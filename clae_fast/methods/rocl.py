"""RoCL: an adversarial view is one more view of its image."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from clae_fast.distributed import World
from clae_fast.methods.base import Method
from clae_fast.methods.options import NotNegative
from clae_fast.ops.sup_con import sup_con
from clae_fast.steps.batch import Batch
from clae_fast.steps.checks import check_attack, check_pair
from clae_fast.steps.options import StepCost, StepOptions, StepResult
from clae_fast.steps.runner import PassRunner, gradient


class RoCL(Method):
    r"""Robust contrastive learning (Kim, Tack and Hwang, NeurIPS 2020).

    The adversarial view of an image is a third view of it, and a positive of the two clean ones.
    The loss is

    .. math:: x_{adv} = \mathrm{attack}(x_p, \nabla_x L_2(f(x), f(x_q))), \quad
        L_3(f(x_p), f(x_q), f(x_{adv})) + w L_2(f(x_{adv}), f(x_q))

    where L_V sums -log softmax over all other rows, for each ordered pair of an image's V views,
    and divides by the V N rows.

    As in the released code, the other rows are constants, so that the gradient of a row comes from
    its own terms, and all three views go through f at once and share the statistics of BatchNorm.
    An attack of k moves makes a step cost 10 + 2 k units, of which f(x_q) in the mode of the attack
    is 1.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options(Method.Options):
        """Settings of RoCL.

        Attributes:
            reg_weight: The weight w, 1 / lambda in the released code; `adv_weight` multiplies it.
        """

        reg_weight: NotNegative = 1 / 256

    name = "rocl"
    has_twin = False

    options: Options

    @classmethod
    def cost(cls, options: StepOptions, *, small_crops: float = 0.0, **own: Any) -> StepCost:
        """Counts two trained views, or three, the constant f(x_q), and the attack's moves."""
        if options.attack is None or options.kind == "none":
            return StepCost(trained=2)
        return StepCost(trained=3, constant=1, attacked=options.attack.steps)

    def _step(self, batch: Batch, options: StepOptions) -> StepResult:
        x_p, x_q = batch.views
        check_pair(x_p, x_q)
        runner, attack = PassRunner(options.scale, options.micro_batch), options.attack
        loss = partial(self._loss, world=options.world)
        views, adv, x_adv = batch.views, None, None
        if options.kind != "none":
            assert attack is not None
            check_attack(attack, x_p, "x_p", options.adv_weight)
            z_q = runner.constant(self.encoder, x_q, attack.norm)

            def against_q(z: Tensor) -> Tensor:
                return gradient(lambda z: loss(torch.cat((z, z_q)), 2), z)

            x_adv = runner.attack(self.encoder, x_p, attack, against_q)
            views += (x_adv,)
        together = runner.run(self.encoder, torch.cat(views))
        clean = runner.backward(loss(together.z, len(views)))
        if x_adv is not None:
            weight = options.adv_weight * self.options.reg_weight
            # views q and adversarial
            adv = runner.backward(loss(together.z[len(x_p) :], 2), weight)
        together.back(options.last_backward)
        return StepResult(clean, adv, x_adv)

    def _loss(self, z: Tensor, views: int, world: World) -> Tensor:  # [V N, D], V
        """The loss L_V of the rows of all processes."""
        images = torch.arange(world.size * len(z) // views, device=z.device)
        # gathered rows lie process by process, and within one of them view by view
        labels = images.view(world.size, 1, -1).expand(-1, views, -1).flatten()
        # sup_con takes the mean over the other views of a row, and this is the sum
        return (views - 1) * sup_con(
            world.gather(z), labels, temperature=self.temperature, detach_columns=True
        )
