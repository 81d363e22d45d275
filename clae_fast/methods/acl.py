"""ACL: clean and adversarial views in two streams, each with BatchNorm layers of its own."""

from typing import Any

import torch
from torch import Tensor

from clae_fast.methods.base import Method
from clae_fast.ops.nt_xent import nt_xent
from clae_fast.steps.batch import Batch
from clae_fast.steps.checks import check_attack, check_pair
from clae_fast.steps.options import StepCost, StepOptions, StepResult
from clae_fast.steps.runner import PassRunner, gradient


class ACL(Method):
    r"""Adversarial contrastive learning, its dual stream (Jiang et al., NeurIPS 2020).

    SimCLR is trained twice over the same weights, on clean views and on adversarial ones, which go
    through BatchNorm layers of their own. Both views of all images, x, are attacked and encoded
    together, 2N rows:

    .. math:: x_{adv} = \mathrm{attack}(x, \nabla_{x} L(f_{adv}(x))), \quad
        \frac{1}{2} (L(f(x)) + L(f_{adv}(x_{adv})))

    L is `clae_fast.nt_xent`, and `adv_weight` multiplies the second loss. An attack of k moves
    makes a step cost 12 + 4 k units.
    """

    name = "acl"
    # an attack in eval mode needs statistics that keep up with the encoder's
    twin_momentum = 0.1

    @classmethod
    def cost(cls, options: StepOptions, *, small_crops: float = 0.0, **own: Any) -> StepCost:
        """Counts two clean views, two adversarial ones, and every move of the attack on both."""
        if options.attack is None or options.kind == "none":
            return StepCost(trained=2)
        return StepCost(trained=4, attacked=2 * options.attack.steps)

    def _step(self, batch: Batch, options: StepOptions) -> StepResult:
        check_pair(*batch.views)
        x = torch.cat(batch.views)
        runner = PassRunner(options.scale, options.micro_batch)

        def nt_xent_of_all(z_a: Tensor, z_b: Tensor) -> Tensor:
            return nt_xent(z_a, z_b, temperature=self.temperature)

        def loss(z: Tensor) -> Tensor:
            return options.world.gather_loss(nt_xent_of_all)(*z.chunk(2))

        if options.kind == "none":
            both = runner.run(self.encoder, x)
            clean = runner.backward(loss(both.z))
            both.back(options.last_backward)
            return StepResult(clean)
        assert self.adv_encoder is not None
        assert options.attack is not None
        check_attack(options.attack, x, "x", options.adv_weight)
        x_adv = runner.attack(self.adv_encoder, x, options.attack, lambda z: gradient(loss, z))
        both = runner.run(self.encoder, x)
        clean = runner.backward(loss(both.z), 0.5)
        both.back()
        attacked = runner.run(self.adv_encoder, x_adv)
        adv = runner.backward(loss(attacked.z), 0.5 * options.adv_weight)
        attacked.back(options.last_backward)
        return StepResult(clean, adv, x_adv)
