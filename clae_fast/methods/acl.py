"""ACL: clean and adversarial views in two streams, each with BatchNorm of its own."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from clae_fast.methods.base import Method
from clae_fast.nn.twins import adversarial_twin
from clae_fast.ops.nt_xent import nt_xent
from clae_fast.steps.batch import Batch
from clae_fast.steps.checks import check_attack, check_pair
from clae_fast.steps.options import StepCost, StepOptions, StepResult
from clae_fast.steps.runner import PassRunner, gradient


class ACL(Method):
    r"""Adversarial contrastive learning, its dual stream (Jiang et al., NeurIPS 2020).

    .. math:: x_{adv} = \mathrm{attack}(x, \nabla_{x} L(f_{adv}(x))), \quad
        \frac{1}{2} (L(f(x)) + L(f_{adv}(x_{adv})))

    x are both views of all images, 2N rows that are attacked and encoded together, and L is
    :func:`clae_fast.nt_xent` of them. `adv_weight` multiplies the second loss.

    Units of k steps: 12 and 4 k.

    Args:
        encoder: f, from views to raw projections.
        temperature: Temperature of the softmax.
        adversarial: Whether to build the adversarial twin that attacks need.
    """

    name: ClassVar[str] = "acl"
    units: ClassVar[Mapping[str, int]] = {"none": 6, "pair": 16}

    def __init__(
        self, encoder: nn.Module, *, temperature: float = 0.5, adversarial: bool = False
    ) -> None:
        super().__init__(encoder, temperature=temperature, adversarial=False)
        # an attack in eval mode needs statistics that keep up with the encoder's
        self.adv_encoder = adversarial_twin(encoder, momentum=0.1) if adversarial else None

    @classmethod
    def cost(cls, options: StepOptions, *, small_crops: float = 0.0, **own: Any) -> StepCost:
        """Of two views, clean and, each attacked, adversarial."""
        if options.attack is None or options.kind == "none":
            return StepCost(trained=2)
        return StepCost(trained=4, attacked=2 * options.attack.steps)

    def _step(self, batch: Batch, options: StepOptions) -> StepResult:
        check_pair(*batch.views)
        x = torch.cat(batch.views)
        runner = PassRunner(options.scale, options.micro_batch)
        of_pair = options.world.gather_loss(self._nt_xent)

        def loss(z: Tensor) -> Tensor:
            return of_pair(*z.chunk(2))

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

    def _nt_xent(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        return nt_xent(z_a, z_b, temperature=self.temperature)
