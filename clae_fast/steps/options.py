"""The options of a step, its cost and its result."""

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from clae_fast.attack import LinfAttack
from clae_fast.distributed import World
from clae_fast.steps.passes import Around


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """The options of a step, which are the same for every method.

    Attributes:
        kind: "none" (plain), "pair", "self" or "released".
        attack: How far the attack goes; needed unless `kind` is "none".
        adv_weight: Weight of the adversarial loss.
        adv_fraction: As in `pair_step`.
        adv_replace: As in `pair_step`.
        batched: As in `plain_step`; other schedules ignore it.
        scale: The loss scale, a scalar tensor; None for none.
        micro_batch: How many rows are encoded at once; None encodes the batch at once.
        last_backward: Makes a context that the last backward pass runs in.
        world: The processes that have the rows of the batch; losses see the rows of all.
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


class StepCost(NamedTuple):
    """The cost of a step: how many views go through an encoder, by how far back they are taken.

    Attributes:
        trained: Passes that are taken back to the weights, 3 units each.
        constant: Passes that are not taken back, 1 unit each.
        attacked: Passes that are taken back to the view alone, 2 units each: one for each move of
            an attack that no training pass makes.
    """

    trained: float
    constant: float = 0.0
    attacked: float = 0.0

    def units(self, *, chunks: bool = False) -> float:
        """The units of the step, with a `micro_batch` where there are `chunks`."""
        # a chunk that is taken back has to be encoded once more
        once_more = (self.trained + self.attacked) * chunks
        return 3 * self.trained + self.constant + 2 * self.attacked + once_more


class StepResult(NamedTuple):
    """The result of a step besides its gradients. All are constants, still on the device.

    Attributes:
        loss: The clean loss.
        adv_loss: The adversarial loss, not yet weighted; None in a step that has none.
        x_adv: The adversarial view of the attacked rows; None without an attack.
    """

    loss: Tensor  # []
    adv_loss: Tensor | None = None  # []
    x_adv: Tensor | None = None  # [N or fewer, C, ...]
