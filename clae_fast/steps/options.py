"""How a step is taken, what it costs and what it leaves behind."""

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from clae_fast.attack import LinfAttack
from clae_fast.distributed import World
from clae_fast.steps.passes import Around


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """How a step is taken, whatever the method.

    Attributes:
        kind: "none" (plain), "pair", "self" or "released".
        attack: How far the attack goes; needed unless `kind` is "none".
        adv_weight: Weight of the adversarial loss.
        adv_fraction: As in `pair_step`.
        adv_replace: As in `pair_step`.
        batched: As in `plain_step`, which alone heeds it.
        scale: What gradients are multiplied by.
        micro_batch: Rows of a chunk; None takes the batch at once.
        last_backward: Makes a context for the last backward pass.
        world: Processes that have other rows of the batch, all of which the losses see.
    """

    kind: str = "none"
    attack: LinfAttack | None = None
    adv_weight: float = 1.0
    adv_fraction: float = 1.0
    adv_replace: bool = False
    batched: bool = False
    scale: Tensor | None = None  # []
    micro_batch: int | None = None
    last_backward: Around = nullcontext
    world: World = field(default_factory=World.single)


class StepContext(NamedTuple):
    """What a loss may know of its step besides the projections of all processes' rows.

    Attributes:
        world: The processes, which have equal parts of the rows, in the order of their ranks.
        labels: The classes of the rows, int64 [N], for a method that takes them.
    """

    world: World = World.single()
    labels: Tensor | None = None


# of a loss that is computed outside a step, by one process
ALONE = StepContext()


class StepCost(NamedTuple):
    """What a step costs, as the views of its batch that go through an encoder and how far back.

    Attributes:
        trained: Views that are taken back to the weights, 3 units each.
        constant: Views that are not taken back, 1 unit each.
        attacked: Views that are taken back to themselves, counted once for each step of an attack
            that is not part of a trained pass, 2 units each.
    """

    trained: float
    constant: float = 0.0
    attacked: float = 0.0

    def units(self, *, chunks: bool = False) -> float:
        """Units of the step, of a view's forward pass; with `micro_batch`, `chunks`."""
        # a chunk that is taken back is encoded once more
        once_more = (self.trained + self.attacked) * chunks
        return 3 * self.trained + self.constant + 2 * self.attacked + once_more


class StepResult(NamedTuple):
    """What a step leaves behind besides gradients; constants, still on the device.

    Attributes:
        loss: The clean loss.
        adv_loss: The adversarial loss before its weight, None without one of its own.
        x_adv: The adversarial view of the rows that are attacked, None without an attack.
    """

    loss: Tensor  # []
    adv_loss: Tensor | None = None  # []
    x_adv: Tensor | None = None  # [N or fewer, C, ...]
