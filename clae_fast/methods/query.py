"""Methods of queries that each look for a target, such as a key or an entry of a bank."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clae_fast.methods.base import Method
from clae_fast.steps.batch import Batch
from clae_fast.steps.options import StepCost, StepOptions, StepResult
from clae_fast.steps.schedules import query_step


class QueryMethod(Method):
    """A method that compares each view it trains on with constants, the targets of that view.

    The attack of CLAE goes with any of them: it moves the first query view away from its own
    target. Targets see clean views alone, and so do keys, queues and banks.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options(Method.Options):
        """Settings of a method of queries."""

        @property
        def large_queries(self) -> int:
            """How many of the two large views are queries."""
            return 1

    options: Options

    def queries(self, batch: Batch) -> tuple[Tensor, ...]:
        """The views that are trained on: large ones, of which the first is attacked, then crops."""
        return batch.views[: self.options.large_queries] + batch.views[2:]

    @abstractmethod
    def targets(self, batch: Batch, options: StepOptions) -> Sequence[Any]:
        """What each query view is compared with, in the order of `queries`; without gradients.

        Args:
            batch: The views of this process.
            options: How the step is taken. Its `world` collects the targets of all processes' rows.
        """

    @abstractmethod
    def loss(self, z: Tensor, target: Any) -> Tensor:
        """The loss of a query view, with the weight that it has in the sum over all of them.

        Args:
            z: Raw projections of all processes' rows, clean or adversarial, [N, D].
            target: What `targets` gave for this view.

        Returns:
            A scalar, differentiable in `z`.
        """

    def update(self, z: Sequence[Tensor], targets: Sequence[Any]) -> None:
        """Moves queues and banks on, after all losses of a step; without gradients.

        Args:
            z: Clean raw projections of each query view, of all processes' rows, [N, D], from before
                the optimizer moves the weights.
            targets: What `targets` gave.
        """

    @classmethod
    def cost(cls, options: StepOptions, *, small_crops: float = 0.0, **own: Any) -> StepCost:
        """Counts the large query views, as many target views, the small crops and the attack."""
        large = cls.Options(**own).large_queries
        clean, attack = large + small_crops, options.attack
        if attack is None or options.kind == "none":
            return StepCost(clean, constant=large)
        # the clean pass of the attacked view takes the first move where it can
        moves = attack.steps - attack.begins_in_training
        return StepCost(clean + 1, constant=large, attacked=moves)

    def _step(self, batch: Batch, options: StepOptions) -> StepResult:
        queries = self.queries(batch)
        with torch.no_grad():
            targets = self.targets(batch, options)
        clean: list[Tensor] = []

        def loss(z: Tensor, v: int) -> Tensor:
            z = options.world.gather(z)
            # the schedule takes the clean losses first, then those of the attack
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
