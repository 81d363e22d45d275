"""Methods of two views whose loss knows the images' classes."""

from abc import abstractmethod
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from clae_fast.distributed import World
from clae_fast.methods.base import Method, pair_cost, pair_schedule, tied_gradient
from clae_fast.steps.batch import Batch
from clae_fast.steps.options import StepCost, StepOptions, StepResult
from clae_fast.steps.runner import Loss


class SupervisedMethod(Method):
    """A method whose two views and their labels meet in one loss."""

    units: ClassVar[Mapping[str, int]] = {"none": 6, "pair": 9, "self": 11, "released": 15}
    fractions: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = True

    @abstractmethod
    def loss(self, z_a: Tensor, z_b: Tensor, labels: Tensor) -> Tensor:
        """The loss of a pair of views at their raw projections.

        Args:
            z_a: Projections of the anchor's view, [N, D].
            z_b: Projections of the other view, clean or adversarial, [N, D].
            labels: Class numbers [N], int64.

        Returns:
            A scalar, differentiable in both.
        """

    @classmethod
    def cost(cls, options: StepOptions, *, small_crops: float = 0.0, **own: Any) -> StepCost:
        """As `pair_cost`."""
        return pair_cost(cls, options)

    def _step(self, batch: Batch, options: StepOptions) -> StepResult:
        assert batch.labels is not None
        labels, world = batch.labels, options.world

        def loss(z_a: Tensor, z_b: Tensor) -> Tensor:
            return world.gather_loss(self._of(labels[: len(z_a)], world))(z_a, z_b)

        def attack_grad(z: Tensor) -> Tensor:
            here = self._of(labels[: len(z)], world)
            return world.gather_grad(partial(tied_gradient, here))(z)

        return pair_schedule(self, batch, options, loss=loss, attack_grad=attack_grad)

    def _of(self, labels: Tensor, world: World) -> Loss:
        """The loss of all processes' rows, given the labels of this one's."""
        return partial(self.loss, labels=world.all_gather(labels))
