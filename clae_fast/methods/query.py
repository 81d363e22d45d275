"""Methods of queries that each find a target: a key, an entry of a bank."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from clae_fast.methods.base import Method
from clae_fast.steps.batch import Batch
from clae_fast.steps.options import StepCost, StepOptions, StepResult
from clae_fast.steps.schedules import query_step


class QueryMethod(Method):
    """A method that compares each view it trains on with constants, its targets.

    CLAE's attack composes with any of them: the first query view is attacked against its own
    target. Targets, and with them keys, queues and banks, see clean views alone.
    """

    units: ClassVar[Mapping[str, int]] = {"none": 4, "pair": 7}

    def queries(self, batch: Batch) -> tuple[Tensor, ...]:
        """The views that are trained on, the one that is attacked first; one view by default."""
        return batch.views[:1]

    @abstractmethod
    def targets(self, batch: Batch, options: StepOptions) -> Sequence[Any]:
        """What each query view is compared with, in the order of `queries`; without gradients.

        Args:
            batch: The views of this process.
            options: How the step is taken; `options.world` has what the targets of all processes'
                rows need.
        """

    @abstractmethod
    def loss(self, z: Tensor, target: Any) -> Tensor:
        """The loss of a query view, weighted as it is in the sum over all of them.

        Args:
            z: Raw projections of all processes' rows, clean or adversarial, [N, D].
            target: What `targets` gave for this view.

        Returns:
            A scalar, differentiable in `z`.
        """

    def update(self, z: Sequence[Tensor], targets: Sequence[Any]) -> None:
        """Takes queues and banks on, once all losses are taken; without gradients.

        Args:
            z: Clean raw projections of each query view, of all processes' rows, [N, D], from before
                the optimiser's move.
            targets: What `targets` gave.
        """

    @classmethod
    def cost(cls, options: StepOptions, *, small_crops: float = 0.0, **own: Any) -> StepCost:
        """Of a query and a key, or where `own` has "symmetric" two each, and small crops."""
        large = 1 + bool(own.get("symmetric"))
        clean, attack = large + small_crops, options.attack
        if attack is None or options.kind == "none":
            return StepCost(clean, constant=large)
        steps = attack.steps - attack.begins_in_training
        return StepCost(clean + 1, constant=large, attacked=steps)

    def _step(self, batch: Batch, options: StepOptions) -> StepResult:
        queries = self.queries(batch)
        with torch.no_grad():
            targets = self.targets(batch, options)
        clean: list[Tensor] = []

        def loss(z: Tensor, v: int) -> Tensor:
            z = options.world.gather(z)
            # the adversarial view is the last
            if len(clean) < len(queries):
                clean.append(z.detach())
            return self.loss(z, targets[v])

        result = query_step(
            self.encoder,
            queries,
            loss,
            adv_encoder=self.adv_encoder,
            attack=None if options.kind == "none" else options.attack,
            adv_weight=options.adv_weight,
            scale=options.scale,
            micro_batch=options.micro_batch,
            last_backward=options.last_backward,
        )
        with torch.no_grad():
            self.update(clean, targets)
        return result
