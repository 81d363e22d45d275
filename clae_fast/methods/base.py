"""What a training loop knows of a method."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, ClassVar, get_type_hints

from torch import nn

from clae_fast.attack import LinfAttack
from clae_fast.methods.options import Temperature, check_bounds
from clae_fast.nn.twins import adversarial_twin
from clae_fast.steps.batch import Batch
from clae_fast.steps.options import StepCost, StepOptions, StepResult


class _Units:
    """Reads the units of a method's steps off its `cost`, for an attack of one move."""

    def __get__(self, method: "Method | None", cls: type["Method"]) -> dict[str, int]:
        attack = LinfAttack(eps=1.0)
        costs = {kind: cls.cost(StepOptions(kind=kind, attack=attack)) for kind in cls.kinds}
        return {kind: round(cost.units()) for kind, cost in costs.items()}


class Method(nn.Module, ABC):
    """Encoders, a loss at their embeddings, and the state that a method trains with.

    A method knows its formulas and chooses a schedule of `clae_fast.steps.schedules`, which decides
    which pass runs when. All of its state is in parameters, buffers and submodules, so that
    `state_dict()` is its checkpoint. Its settings are the fields of its `Options`, a frozen
    dataclass that inherits those of its base class; a run sets them by `--options NAME=VALUE`.

    Args:
        encoder: The encoder f, from views to raw projections. Its BatchNorm layers see clean views
            only.
        adversarial: Whether to build the adversarial twin of the encoder, where attacks need one.
        options: Settings, as the fields of `Options`.

    Raises:
        TypeError: If there is no such setting, or its value is of another type.
        ValueError: If a setting is out of bounds.

    Attributes:
        name: Name of the method in configurations.
        kinds: The kinds of step that it takes, as `StepOptions.kind`.
        units: Cost of a step of each kind, in encoder passes over one view of the batch.
        views: How many large views of an image a step takes.
        small_crops: Whether it takes small crops as well.
        needs_labels: Whether it takes the classes of the images.
        needs_teacher: Whether it takes `teacher`, a frozen encoder [N, C, H, W] -> [N, F].
        has_twin: Whether attacks need an adversarial twin of the encoder.
        twin_momentum: Momentum of the running statistics of the twin's BatchNorm layers.
        fractions: Whether it has the approximations `adv_fraction` and `adv_replace`.
        options: Its settings.
        temperature: The temperature among them.
        encoder: The encoder f.
        adv_encoder: Its adversarial twin f_adv; None where there is none.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Settings of every method.

        Attributes:
            temperature: T, by which the softmax divides similarities.
        """

        temperature: Temperature = 0.5

        def __post_init__(self) -> None:
            check_bounds(self)

    name: ClassVar[str]
    kinds: ClassVar[tuple[str, ...]] = ("none", "pair")
    units = _Units()
    views: ClassVar[int] = 2
    small_crops: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = False
    needs_teacher: ClassVar[bool] = False
    has_twin: ClassVar[bool] = True
    twin_momentum: ClassVar[float] = 0.01
    fractions: ClassVar[bool] = False

    options: Options
    adv_encoder: nn.Module | None

    def __init__(self, encoder: nn.Module, *, adversarial: bool = False, **options: Any) -> None:
        super().__init__()
        self.options = self.Options(**options)
        self.temperature = self.options.temperature
        self.encoder = encoder
        self.adv_encoder = None
        if adversarial and self.has_twin:
            self.adv_encoder = adversarial_twin(encoder, self.twin_momentum)

    @classmethod
    def own_options(cls) -> dict[str, tuple[type, Any]]:
        """Type and default of each setting, apart from the temperature, which all methods have."""
        kinds = get_type_hints(cls.Options)
        own = [field for field in fields(cls.Options) if field.name != "temperature"]
        return {field.name: (kinds[field.name], field.default) for field in own}

    @classmethod
    def own_temperature(cls) -> float:
        """The temperature where a run sets none."""
        return cls.Options.temperature

    def step(self, batch: Batch, options: StepOptions) -> StepResult:
        """Computes the losses of one step, and adds its gradients to `.grad` as `backward()` does.

        Args:
            batch: The views, and the labels where the method needs them.
            options: How the step is taken.

        Raises:
            TypeError: If an argument is of another kind.
            ValueError: If the method has no such kind of step or option, if it takes another number
                of views, or if labels or the adversarial encoder are missing.
        """
        kind = options.kind
        if kind not in self.kinds:
            raise ValueError(f"kind must be {_either(self.kinds)} for {self.name}, got {kind!r}")
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
        """Takes the step once `step` has checked its arguments."""

    @classmethod
    @abstractmethod
    def cost(cls, options: StepOptions, *, small_crops: float = 0.0, **own: Any) -> StepCost:
        """What a step costs.

        Args:
            options: How the step is taken.
            small_crops: Pixels of an image's small crops, in those of a large view.
            own: Settings of the method, as the fields of `Options`.
        """

    @property
    def phase(self) -> str:
        """The name of what steps do now, where that changes during a run."""
        return ""

    def before_step(self, progress: float) -> None:
        """Runs on the host before every step, also before one that is replayed as a CUDA graph.

        What follows a schedule, such as a momentum, is written here into tensors on the device.

        Args:
            progress: The part of the run that is done, from 0 to below 1.
        """

    def after_step(self) -> None:
        """Runs after the optimizer has moved the weights, as momentum encoders need it."""


def _either(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else last
