"""What a contrastive method is to the training loop, and what methods of two views share."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, get_type_hints

import torch
from torch import Tensor, nn

from clae_fast import _check
from clae_fast.nn.twins import adversarial_twin
from clae_fast.steps.batch import Batch
from clae_fast.steps.options import StepCost, StepOptions, StepResult
from clae_fast.steps.runner import Loss
from clae_fast.steps.schedules import pair_step, plain_step, released_step, self_step


class Method(nn.Module, ABC):
    """Encoders, losses at their embeddings, a schedule, and whatever state it trains with.

    A method knows formulas and says which of the schedules in `clae_fast.steps.schedules` it takes;
    these know which pass runs when. All a method's state lives in parameters, buffers and
    submodules, so `state_dict()` is its checkpoint. Keyword-only arguments of a method's own, int,
    float, bool or str with a default, are settings of a run: `--option NAME=VALUE`.

    Args:
        encoder: f, from views to raw projections; its BatchNorm layers see clean views only.
        temperature: Temperature of the softmax.
        adversarial: Whether to build the adversarial twin, where attacks need one.

    Attributes:
        name: Name of the method in configurations.
        units: Cost of a step in encoder passes over one view of the batch, by kind of attack.
        views: Large views of an image that a step takes.
        small_crops: Whether it takes small crops besides.
        needs_labels: Whether it takes classes.
        needs_teacher: Whether it takes `teacher`, a frozen encoder [N, C, H, W] -> [N, F].
        has_twin: Whether attacks need an adversarial twin of the encoder.
        fractions: Whether it has the approximations `adv_fraction` and `adv_replace`.
        encoder: f, from views to raw projections.
        adv_encoder: f_adv, None where there is none.
    """

    name: ClassVar[str]
    units: ClassVar[Mapping[str, int]]
    views: ClassVar[int] = 2
    small_crops: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = False
    needs_teacher: ClassVar[bool] = False
    has_twin: ClassVar[bool] = True
    fractions: ClassVar[bool] = False

    adv_encoder: nn.Module | None

    def __init__(self, encoder: nn.Module, *, temperature: float, adversarial: bool) -> None:
        super().__init__()
        _check.temperature(temperature)
        self.temperature = temperature
        self.encoder = encoder
        self.adv_encoder = adversarial_twin(encoder) if adversarial and self.has_twin else None

    @classmethod
    def own_options(cls) -> dict[str, tuple[type, Any]]:
        """The type and the default of each setting of a run that this method alone has."""
        kinds = get_type_hints(cls.__init__)
        return {
            name: (kinds[name], parameter.default)
            for name, parameter in inspect.signature(cls).parameters.items()
            if name not in ("temperature", "adversarial") and kinds[name] in (int, float, bool, str)
        }

    @classmethod
    def own_temperature(cls) -> float:
        """The temperature where a run sets none."""
        default: float = inspect.signature(cls).parameters["temperature"].default
        return default

    def step(self, batch: Batch, options: StepOptions) -> StepResult:
        """Losses and gradients of one step, added to `.grad` as `backward()` does.

        Args:
            batch: Views, and labels where the method needs them.
            options: How the step is taken.

        Raises:
            TypeError: If an argument is of another kind.
            ValueError: If the method has no such kind of step or option, the number of views is not
                its own, or labels or the adversarial encoder are missing.
        """
        kind = options.kind
        if kind not in self.units:
            raise ValueError(f"kind must be {_either(self.units)} for {self.name}, got {kind!r}")
        views = len(batch.views)
        if views < self.views or (views > self.views and not self.small_crops):
            least = "at least " if self.small_crops else ""
            raise ValueError(f"views must be {least}{self.views} for {self.name}, got {views}")
        if self.needs_labels and batch.labels is None:
            raise ValueError(f"labels must be given for {self.name}, got None")
        lacks_twin = self.has_twin and self.adv_encoder is None
        if kind != "none" and (lacks_twin or options.attack is None):
            built = " and a method built with adversarial=True" if self.has_twin else ""
            raise ValueError(f"kind={kind!r} needs an attack{built}")
        if not self.fractions and (options.adv_fraction, options.adv_replace) != (1, False):
            raise ValueError(f"{self.name} has no adv_fraction and no adv_replace")
        return self._step(batch, options)

    @abstractmethod
    def _step(self, batch: Batch, options: StepOptions) -> StepResult:
        """`step`, of what has been checked."""

    @classmethod
    @abstractmethod
    def cost(cls, options: StepOptions, *, small_crops: float = 0.0, **own: Any) -> StepCost:
        """What a step costs with these options: `units`, where they are the defaults.

        Args:
            options: How the step is taken.
            small_crops: Small crops of an image, in large views of as many pixels.
            own: Settings of the method's own.
        """

    @property
    def phase(self) -> str:
        """Names what steps do, where it changes during a run."""
        return ""

    def before_step(self, progress: float) -> None:
        """Runs on the host before every step, also before one that is replayed as a CUDA graph.

        What a schedule changes, such as a momentum, is written here into tensors on the device.

        Args:
            progress: The part of the run that is done, from 0 to below 1.
        """

    def after_step(self) -> None:
        """Runs after every optimiser step: momentum encoders."""


class PairMethod(Method):
    """A method whose two views meet in one loss.

    Attributes:
        reforward_anchor: Whether CLAE's code encodes the anchor anew for the adversarial loss.
    """

    units: ClassVar[Mapping[str, int]] = {"none": 6, "pair": 9, "self": 11, "released": 15}
    fractions: ClassVar[bool] = True
    reforward_anchor: ClassVar[bool] = False

    @abstractmethod
    def loss(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        """The loss of a pair of views at their raw projections.

        Args:
            z_a: Projections of the anchor's view, [N, D].
            z_b: Projections of the other view, clean or adversarial, [N, D].

        Returns:
            A scalar, differentiable in both.
        """

    def attack_grad(self, z: Tensor) -> Tensor:
        """Gradient of `loss(z, z_b)` to z_b alone at z_b = z: what the self attack follows.

        Args:
            z: Projections through the adversarial encoder, [N, D].

        Returns:
            The gradient at the projections, [N, D].
        """
        return tied_gradient(self.loss, z)

    @classmethod
    def cost(cls, options: StepOptions, *, small_crops: float = 0.0, **own: Any) -> StepCost:
        """As `pair_cost`."""
        return pair_cost(cls, options)

    def _step(self, batch: Batch, options: StepOptions) -> StepResult:
        world = options.world
        return pair_schedule(
            self,
            batch,
            options,
            loss=world.gather_loss(self.loss),
            attack_grad=world.gather_grad(self.attack_grad),
            reforward_anchor=self.reforward_anchor,
        )


def tied_gradient(loss: Loss, z: Tensor) -> Tensor:  # [N, D] -> [N, D]
    """Gradient of `loss(z, z_b)` to z_b alone at z_b = z."""
    z = z.detach()
    z_b = z.clone().requires_grad_()
    with torch.enable_grad():
        (dz,) = torch.autograd.grad(loss(z, z_b), z_b)
    return dz


def pair_schedule(
    method: Method,
    batch: Batch,
    options: StepOptions,
    *,
    loss: Loss,
    attack_grad: Callable[[Tensor], Tensor],  # [N, D] -> [N, D]
    reforward_anchor: bool = False,
) -> StepResult:
    """Takes the schedule of `options.kind` on two views that meet in one loss.

    Args:
        method: Whose encoders.
        batch: The views.
        options: How the step is taken.
        loss: Of this process's rows.
        attack_grad: Of this process's rows, as `PairMethod.attack_grad`.
        reforward_anchor: As `PairMethod.reforward_anchor`.

    Raises:
        ValueError: If an option is none of the kind's.
    """
    x_p, x_q = batch.views
    kind = options.kind
    both: dict[str, Any] = {"scale": options.scale, "last_backward": options.last_backward}
    if kind == "none":
        return plain_step(
            method.encoder,
            x_p,
            x_q,
            loss,
            batched=options.batched,
            micro_batch=options.micro_batch,
            **both,
        )
    assert method.adv_encoder is not None
    assert options.attack is not None
    given = (method.encoder, method.adv_encoder, x_p, x_q, loss)
    both |= {"attack": options.attack, "adv_weight": options.adv_weight}
    approximate = {"adv_fraction": options.adv_fraction, "adv_replace": options.adv_replace}
    if kind == "released":
        if options.micro_batch is not None or approximate != NO_APPROXIMATION:
            raise ValueError("kind='released' has no adv_fraction, adv_replace or micro_batch")
        return released_step(*given, reforward_anchor=reforward_anchor, **both)
    both |= approximate | {"micro_batch": options.micro_batch}
    if kind == "pair":
        return pair_step(*given, **both)
    return self_step(*given, attack_grad=attack_grad, **both)


def pair_cost(method: type[Method], options: StepOptions) -> StepCost:
    """What a step by `pair_schedule` costs."""
    kind, attack, part = options.kind, options.attack, options.adv_fraction
    if attack is None or kind in ("none", "released"):
        return StepCost(trained=method.units[kind] / 3)
    # view q's pass is the first step where it is trained on all the same
    free = kind == "pair" and attack.begins_in_training and not options.adv_replace
    return StepCost(
        trained=2 if options.adv_replace else 2 + part,
        constant=part if kind == "self" and attack.start != "view" else 0,
        attacked=part * (attack.steps - free),
    )


NO_APPROXIMATION = {"adv_fraction": 1.0, "adv_replace": False}


def _either(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else last
