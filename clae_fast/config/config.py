"""Every setting of a training run, in groups, and what they have to agree on."""

import dataclasses
import difflib
import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, get_type_hints

from clae_fast.config import fields
from clae_fast.config.fields import Group, field
from clae_fast.data.datasets import DATASETS, require_dataset
from clae_fast.methods import METHODS


@dataclass(frozen=True)
class Data(Group):
    """Which images a run reads, and how."""

    dataset: str = field("digits", f"data set: {', '.join(DATASETS)}")
    data_dir: str | None = field(None, "folder of the data set")
    download: bool = field(False, "fetch a published data set that is not in the data folder")
    limit: int | None = field(None, "use only N images of each split", above=0)
    on_corrupt: str = field(
        "fail",
        "at an image that cannot be read, fail ends the run, and skip leaves it out and counts it",
        choices=("fail", "skip"),
    )
    workers: int = field(
        0, "loader processes, at most one per core; 0 loads in the main process", least=0
    )
    resident: str = field(
        "auto",
        "keep the decoded training images on the device; auto keeps them where they fit easily",
        choices=("auto", "yes", "no"),
    )

    def _check(self) -> None:
        require_dataset(self.dataset, self.data_dir)


@dataclass(frozen=True)
class Views(Group):
    """How views are drawn from an image, and what the encoder first does to their pixels."""

    image_size: int = field(16, "height and width of a view in pixels", above=0)
    crop_min_scale: float = field(0.4, "smallest part of an image in a crop", above=0, most=1)
    interpolation: str = field("bilinear", "how crops are resized", choices=("bilinear", "bicubic"))
    flip: bool = field(False, "mirror views left and right at random")
    color_jitter: tuple[float, float, float, float] = field(
        (0.0, 0.0, 0.0, 0.0), "strengths of brightness, contrast, saturation, hue", least=0
    )
    color_jitter_prob: float = field(0.8, "probability of the color jitter", least=0, most=1)
    grey_prob: float = field(0.0, "probability of a gray view", least=0, most=1)
    blur_prob: tuple[float, float] = field(
        (0.0, 0.0), "probability of Gaussian blur, of view p and of view q", least=0, most=1
    )
    solarize_prob: tuple[float, float] = field(
        (0.0, 0.0), "probability of solarization, of view p and of view q", least=0, most=1
    )
    small_crops: int = field(0, "small crops of an image, besides its two views", least=0)
    small_crop_size: int = field(96, "height and width of a small crop in pixels", above=0)
    small_crop_scale: tuple[float, float] = field(
        (0.05, 0.14), "smallest and largest part of an image in a small crop", above=0, most=1
    )
    mean: tuple[float, float, float] = field(
        (0.5, 0.5, 0.5), "mean of each color, which the encoder subtracts from pixels in 0..1"
    )
    std: tuple[float, float, float] = field(
        (0.5, 0.5, 0.5), "deviation of each color, by which the encoder then divides", above=0
    )

    def _check(self) -> None:
        if self.color_jitter[3] > 0.5:
            raise ValueError(
                f"color_jitter must have a hue of at most 0.5, got {self.color_jitter}"
            )
        if self.small_crops % 2:
            raise ValueError(f"small_crops must be even, got {self.small_crops}")
        if self.small_crop_scale[0] > self.small_crop_scale[1]:
            raise ValueError(f"small_crop_scale must not decrease, got {self.small_crop_scale}")


@dataclass(frozen=True)
class Objective(Group):
    """What the encoder learns from; the method completes what nobody gave."""

    method: str = field("simclr", "contrastive method", choices=tuple(METHODS))
    options: Mapping[str, int | float | bool | str] = field(
        {}, "settings that only the method has, listed below"
    )
    teacher: str | None = field(
        None,
        "frozen encoder that the method learns from, where it needs one: a run folder, "
        "torchvision/NAME or timm/NAME",
    )
    temperature: float | None = field(
        None, "temperature of the softmax; each method has its own default", above=0
    )

    def _check(self) -> None:
        method = METHODS[self.method]
        own = method.own_options()
        for name in self.options:
            if name not in own:
                has = f"it has {', '.join(own)}" if own else "it has none"
                raise ValueError(f"options: {self.method} has no {name!r}, {has}")
        options = {
            name: fields.convert(f"options: {name}", kind, self.options.get(name, default))
            for name, (kind, default) in own.items()
        }
        object.__setattr__(self, "options", options)
        if self.temperature is None:
            object.__setattr__(self, "temperature", method.own_temperature())
        if method.needs_teacher != (self.teacher is not None):
            wanted = "be given" if method.needs_teacher else "not be given"
            raise ValueError(f"teacher must {wanted} for {self.method}, got {self.teacher!r}")


@dataclass(frozen=True)
class Adversary(Group):
    """Who is attacked and how far, and how much the adversarial views count."""

    attack: str = field(
        "pair",
        "pair attacks one view of an image inside its pair, self a view against itself",
        choices=("none", "pair", "self"),
    )
    adv_weight: float = field(1.0, "weight of the adversarial loss", least=0)
    adv_every: int = field(1, "one of N steps is adversarial, the others are plain", above=0)
    adv_fraction: float = field(
        1.0, "part of the batch that gets an adversarial view", above=0, most=1
    )
    adv_replace: bool = field(False, "the adversarial view replaces view q instead of being added")
    eps: float = field(0.06, "radius of the attack", least=0)
    attack_steps: int = field(1, "moves of the attack", above=0)
    step_size: float | None = field(None, "length of a move of the attack; by default eps", least=0)
    attack_start: str = field(
        "view",
        "where the attack starts: at the view, or at a random point of the ball around it",
        choices=("view", "random"),
    )
    attack_norm: str = field(
        "train",
        "mode of the encoder in passes that only the attack needs",
        choices=("train", "eval"),
    )
    eps_space: str = field(
        "pixel",
        "units of eps: pixel (0..1, and views stay in 0..1) or normalized (divided by std, and "
        "views may leave 0..1)",
        choices=("pixel", "normalized"),
    )


@dataclass(frozen=True)
class Encoder(Group):
    """The backbone and its projection head."""

    arch: str = field("resnet-narrow", "resnet-narrow, resnet18|34|50|101|152 or timm/NAME")
    head_layers: int = field(
        2,
        "linear layers of the projection head, with ReLU between them; 0 leaves the features",
        least=0,
        most=3,
    )
    head_norm: str = field(
        "none",
        "BatchNorm in the projection head: hidden between its layers, all after each layer",
        choices=("none", "hidden", "all"),
    )
    hidden_dim: int = field(128, "hidden units of the projection head", above=0)
    proj_dim: int = field(64, "length of the projection", above=0)


@dataclass(frozen=True)
class Optimization(Group):
    """The optimizer, its learning rate over time, and how long it runs."""

    optimizer: str = field("adam", "optimizer", choices=("adam", "adamw", "sgd", "lars"))
    lr: float = field(3e-3, "learning rate after the warm-up", above=0)
    momentum: float = field(0.9, "momentum of sgd and lars", least=0)
    weight_decay: float = field(0.0, "weight decay", least=0)
    decay_1d: bool = field(True, "apply weight decay to biases and BatchNorm too")
    schedule: str = field(
        "cosine", "course of the learning rate", choices=("cosine", "step", "constant")
    )
    warmup_epochs: int = field(1, "epochs of linear warm-up", least=0)
    milestones: tuple[int, ...] = field((), "epochs at which the step schedule changes", least=0)
    factors: tuple[float, ...] = field((), "rate from each milestone on, relative to lr", least=0)
    epochs: int = field(30, "passes over the training set", above=0)
    batch_size: int = field(128, "images in a batch, of all processes together", above=0)

    def _check(self) -> None:
        if self.warmup_epochs > self.epochs:
            raise ValueError(
                f"warmup_epochs must be at most epochs ({self.epochs}), got {self.warmup_epochs}"
            )
        if len(self.milestones) != len(self.factors):
            raise ValueError(
                f"factors must match milestones, got {len(self.factors)} for {len(self.milestones)}"
            )
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"milestones must increase, got {self.milestones}")


@dataclass(frozen=True)
class Engine(Group):
    """How a device computes a step."""

    micro_batch: int | None = field(
        None, "encode N images at a time, where a whole batch does not fit into memory", above=0
    )
    batch_views: bool = field(
        False, "encode both views of a plain step at once; each keeps its own BatchNorm statistics"
    )
    device: str = field("auto", "cpu, cuda, cuda:N, or auto: a GPU if there is one")
    precision: str = field(
        "auto",
        "numbers that encoders compute with; auto: fp16 on a GPU, fp32 on the CPU",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    compile: str = field(
        "auto", "compile the encoders; auto: on a GPU", choices=("auto", "yes", "no")
    )
    capture: str = field(
        "auto",
        "replay the step as a CUDA graph; auto: on a GPU, where the step can be captured",
        choices=("auto", "yes", "no"),
    )
    sync_norm: bool = field(True, "synchronize BatchNorm over processes")

    def _check(self) -> None:
        if self.micro_batch is not None:
            for name, value in (("batch_views", True), ("capture", "yes")):
                if getattr(self, name) == value:
                    raise ValueError(f"{name} must not be {value} with micro_batch")


@dataclass(frozen=True)
class Run(Group):
    """The seed, and what a run writes and validates, and when."""

    seed: int = field(0, "seed of weights, order and augmentation", least=0)
    log_every: int = field(10, "steps between log points", above=0)
    checkpoint_every: int | None = field(None, "steps between checkpoints within an epoch", above=0)
    keep_every: int | None = field(None, "keep the checkpoint of every Nth epoch", above=0)
    val_size: int = field(
        0,
        "labeled training images that are held out for validation; best.pt is the checkpoint "
        "with the best accuracy on them",
        least=0,
    )
    val_every: int = field(1, "epochs between validations", above=0)


@dataclass(frozen=True)
class Config:
    """Settings of a training run; each field of a group is a flag of `clae_fast.train`.

    Raises:
        ValueError: Settings of two groups contradict each other; the message names them.
    """

    data: Data
    views: Views
    objective: Objective
    adversary: Adversary
    encoder: Encoder
    optimization: Optimization
    engine: Engine
    run: Run

    def __post_init__(self) -> None:
        name, adversary = self.objective.method, self.adversary
        method = METHODS[name]
        if adversary.attack not in method.units:
            kinds = [kind for kind in method.units if kind != "released"]
            raise ValueError(
                f"attack must be {' or '.join(kinds)} for {name}, got {adversary.attack!r}"
            )
        if not method.fractions and (adversary.adv_fraction, adversary.adv_replace) != (1, False):
            raise ValueError(f"{name} has no adv_fraction and no adv_replace")
        if self.views.small_crops and not method.small_crops:
            raise ValueError(f"small_crops must be 0 for {name}, got {self.views.small_crops}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Config":
        """Settings by name, such as a config.json has them; the others take their defaults.

        Raises:
            TypeError: A value has another type than its setting.
            ValueError: There is no such setting, or a value is out of range.
        """
        for name in values:
            require_known(name)
        return cls(
            **{
                name: group(**{key: values[key] for key in get_type_hints(group) if key in values})
                for name, group in get_type_hints(cls).items()
            }
        )

    def to_dict(self) -> dict[str, Any]:
        """The settings by name as plain values, for JSON."""
        groups = dataclasses.asdict(self).values()
        return {name: value for group in groups for name, value in group.items()}

    def replace(self, **changes: Any) -> "Config":
        """The same settings but for these, by name; errors are those of `from_dict`."""
        return self.from_dict(self.to_dict() | changes)

    def resumed(self, changes: Mapping[str, Any]) -> "Config":
        """The settings of a run that continues on another machine, or for longer.

        Under the constant and the step schedule, a run that is extended to more epochs equals one
        that was started with them.

        Args:
            changes: Settings of `MAY_CHANGE`; others only with the value that they had.

        Raises:
            TypeError: A setting has the wrong type.
            ValueError: A setting decides what was trained so far, or a value is out of range.
        """
        before = self.to_dict()
        changed = [name for name in changes if convert(name, changes[name]) != before[name]]
        fixed = [name for name in changed if name not in MAY_CHANGE]
        if fixed:
            raise ValueError(
                f"a run goes on with its own {', '.join(fixed)}; only {', '.join(MAY_CHANGE)} may "
                "change"
            )
        if "epochs" in changed and self.optimization.schedule == "cosine":
            raise ValueError(
                "epochs cannot change under the cosine schedule: the learning rate of every step "
                "so far depended on them"
            )
        return self.replace(**changes)


# settings that do not decide what was trained so far
MAY_CHANGE = (
    "epochs", "data_dir", "download", "on_corrupt", "workers", "resident", "device",
    "log_every", "checkpoint_every", "keep_every",
)  # fmt: skip


@functools.cache
def groups() -> dict[str, list[dataclasses.Field]]:
    """The settings in order, by the name of their group."""
    return {name: list(dataclasses.fields(group)) for name, group in get_type_hints(Config).items()}


@functools.cache
def hints() -> dict[str, Any]:
    """The type of each setting, by name."""
    found = map(get_type_hints, get_type_hints(Config).values())
    return {name: hint for group in found for name, hint in group.items()}


def require_known(name: str) -> None:
    """Raises ValueError where `name` is no setting, with the nearest one that is."""
    if name not in hints():
        raise ValueError(f"unknown setting {name!r}, the nearest is {nearest(name, hints())!r}")


def nearest(name: str, known: Collection[str]) -> str:
    """The one of `known` that begins with `name`, or else the one spelled most like it."""
    longer = [word for word in known if word.startswith(name)]
    return (longer or difflib.get_close_matches(name, known, n=1, cutoff=0.0))[0]


def convert(name: str, value: Any) -> Any:
    """The value as the setting `name` holds it; raises TypeError as `fields.convert`."""
    return fields.convert(name, hints()[name], value)
