"""Run configuration: every setting of a training run, checked."""

import dataclasses
import difflib
import functools
import math
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from clae_fast.data.datasets import DATASETS, require_dataset
from clae_fast.methods import METHODS


def _option(default: Any, text: str, choices: tuple[str, ...] | None = None) -> Any:
    return dataclasses.field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class Config:
    """Settings of a training run; each field is a flag of `python -m clae_fast.train`.

    Raises:
        TypeError: a value of another type than the field's; the message names the field.
        ValueError: a value is out of range; the message names the field.
    """

    dataset: str = _option("digits", f"data set: {', '.join(DATASETS)}")
    data_dir: str | None = _option(None, "folder of the data set")
    download: bool = _option(False, "fetch a published data set that is not in the data folder")
    limit: int | None = _option(None, "use N images of each split")
    on_corrupt: str = _option(
        "fail",
        "what an unreadable image does: end the run, or be left out and counted",
        choices=("fail", "skip"),
    )
    workers: int = _option(0, "loader processes, at most one a core; 0 loads in the main process")
    resident: str = _option(
        "auto",
        "keep the decoded training images on the device; auto: where they fit comfortably",
        choices=("auto", "yes", "no"),
    )

    image_size: int = _option(16, "side of a view in pixels")
    crop_min_scale: float = _option(0.4, "smallest part of the image a crop takes")
    interpolation: str = _option(
        "bilinear", "how crops are resized", choices=("bilinear", "bicubic")
    )
    flip: bool = _option(False, "mirror views left and right at random")
    color_jitter: tuple[float, float, float, float] = _option(
        (0.0, 0.0, 0.0, 0.0), "strengths of brightness, contrast, saturation, hue"
    )
    color_jitter_prob: float = _option(0.8, "probability of the colour jitter")
    grey_prob: float = _option(0.0, "probability of a grey view")
    blur_prob: tuple[float, float] = _option(
        (0.0, 0.0), "probability of Gaussian blur, of view p and of view q"
    )
    solarize_prob: tuple[float, float] = _option(
        (0.0, 0.0), "probability of solarization, of view p and of view q"
    )
    small_crops: int = _option(0, "small crops of an image, besides its two views")
    small_crop_size: int = _option(96, "side of a small crop in pixels")
    small_crop_scale: tuple[float, float] = _option(
        (0.05, 0.14), "smallest and largest part of the image that a small crop takes"
    )
    mean: tuple[float, float, float] = _option(
        (0.5, 0.5, 0.5), "mean that the encoder subtracts from pixels in 0..1"
    )
    std: tuple[float, float, float] = _option((0.5, 0.5, 0.5), "and what it then divides by")

    method: str = _option("simclr", "contrastive method", choices=tuple(METHODS))
    options: dict[str, int | float | bool | str] = dataclasses.field(
        default_factory=dict,
        metadata={"help": "settings of the method's own, listed below", "choices": None},
    )
    teacher: str | None = _option(
        None,
        "frozen encoder, for a method that learns from one: a run folder, torchvision/NAME "
        "or timm/NAME",
    )
    temperature: float | None = _option(
        None, "temperature of the softmax; the method's own by default"
    )

    attack: str = _option("pair", "who is attacked", choices=("none", "pair", "self"))
    adv_weight: float = _option(1.0, "weight of the adversarial loss")
    adv_every: int = _option(1, "steps of which one is adversarial, the others are plain")
    adv_fraction: float = _option(1.0, "part of the batch that gets an adversarial view")
    adv_replace: bool = _option(
        False, "the adversarial view replaces view q instead of being added"
    )
    eps: float = _option(0.06, "radius of the attack")
    attack_steps: int = _option(1, "steps of the attack")
    step_size: float | None = _option(None, "length of a step of the attack; eps by default")
    attack_start: str = _option(
        "view",
        "where the attack starts: at the view, or at a random point of the ball around it",
        choices=("view", "random"),
    )
    attack_norm: str = _option(
        "train",
        "mode of the encoder in passes that serve the attack alone",
        choices=("train", "eval"),
    )
    eps_space: str = _option(
        "pixel",
        "units of eps: pixel (0..1, views stay in 0..1) or normalized (divided by std, unbounded)",
        choices=("pixel", "normalized"),
    )

    arch: str = _option("resnet-narrow", "resnet-narrow, resnet18|34|50|101|152 or timm/NAME")
    head_layers: int = _option(
        2, "linear layers of the projection head, with ReLU between them; 0 leaves the features"
    )
    head_norm: str = _option(
        "none",
        "BatchNorm in the projection head: between its layers, or after all",
        choices=("none", "hidden", "all"),
    )
    hidden_dim: int = _option(128, "hidden units of the projection head")
    proj_dim: int = _option(64, "length of the projection")

    optimizer: str = _option("adam", "optimiser", choices=("adam", "adamw", "sgd", "lars"))
    lr: float = _option(3e-3, "learning rate after warm-up")
    momentum: float = _option(0.9, "momentum of sgd and lars")
    weight_decay: float = _option(0.0, "weight decay")
    decay_1d: bool = _option(True, "apply weight decay to biases and BatchNorm too")
    schedule: str = _option("cosine", "learning rate", choices=("cosine", "step", "constant"))
    warmup_epochs: int = _option(1, "epochs of linear warm-up")
    milestones: tuple[int, ...] = _option((), "epochs at which the step schedule changes")
    factors: tuple[float, ...] = _option((), "the rate from each milestone on, relative to lr")
    epochs: int = _option(30, "passes over the training set")
    batch_size: int = _option(128, "images in a batch, of all processes together")

    micro_batch: int | None = _option(
        None, "images encoded at once, where a batch is too large for memory"
    )
    batch_views: bool = _option(
        False, "encode both views of a plain step at once, each with statistics of its own"
    )
    device: str = _option("auto", "cpu, cuda, cuda:N, or auto: a GPU if there is one")
    precision: str = _option(
        "auto",
        "numbers that encoders compute with; auto: fp16 on a GPU, fp32 on the CPU",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    compile: str = _option(
        "auto", "compile the encoders; auto: on a GPU", choices=("auto", "yes", "no")
    )
    capture: str = _option(
        "auto",
        "replay the step as a CUDA graph; auto: on a GPU, where it can be",
        choices=("auto", "yes", "no"),
    )
    sync_norm: bool = _option(True, "synchronise BatchNorm over processes")

    seed: int = _option(0, "seed of weights, order and augmentation")
    log_every: int = _option(10, "steps between log points")
    checkpoint_every: int | None = _option(None, "steps between checkpoints within an epoch")
    keep_every: int | None = _option(None, "epochs between checkpoints that stay")
    val_size: int = _option(
        0, "labelled training images held out, never trained on; best.pt does best on them"
    )
    val_every: int = _option(1, "epochs between validations")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            # a frozen dataclass leaves no other way
            object.__setattr__(self, field.name, convert(field.name, getattr(self, field.name)))
            choices = field.metadata["choices"]
            if choices and getattr(self, field.name) not in choices:
                got = getattr(self, field.name)
                raise ValueError(f"{field.name} must be one of {', '.join(choices)}, got {got!r}")
        for name in _POSITIVE:
            self._require(name, lambda v: v > 0, "positive")
        for name in _NOT_NEGATIVE:
            self._require(name, lambda v: v >= 0, "0 or more")
        for name in ("color_jitter_prob", "grey_prob", "blur_prob", "solarize_prob"):
            self._require(name, lambda v: v <= 1, "at most 1")
        for name in ("crop_min_scale", "small_crop_scale", "adv_fraction"):
            self._require(name, lambda v: v <= 1, "at most 1")
        if self.small_crop_scale[0] > self.small_crop_scale[1]:
            raise ValueError(f"small_crop_scale must not decrease, got {self.small_crop_scale}")
        if self.color_jitter[3] > 0.5:
            raise ValueError(
                f"color_jitter must have a hue of at most 0.5, got {self.color_jitter}"
            )
        if self.head_layers > 3:
            raise ValueError(f"head_layers must be at most 3, got {self.head_layers}")
        require_dataset(self.dataset, self.data_dir)
        self._require_method()
        if self.warmup_epochs > self.epochs:
            raise ValueError(
                f"warmup_epochs must be at most epochs ({self.epochs}), got {self.warmup_epochs}"
            )
        if self.micro_batch is not None:
            for name, value in (("batch_views", True), ("capture", "yes")):
                if getattr(self, name) == value:
                    raise ValueError(f"{name} must not be {value} with micro_batch")
        if len(self.milestones) != len(self.factors):
            raise ValueError(
                f"factors must match milestones, got {len(self.factors)} for {len(self.milestones)}"
            )
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"milestones must increase, got {self.milestones}")

    def _require_method(self) -> None:
        """Completes the method's own settings, and raises where it has not what others ask for."""
        method = METHODS[self.method]
        own = method.own_options()
        for name in self.options:
            if name not in own:
                has = f"it has {', '.join(own)}" if own else "it has none"
                raise ValueError(f"options: {self.method} has no {name!r}, {has}")
        options = {
            name: _convert(f"options: {name}", kind, self.options.get(name, default))
            for name, (kind, default) in own.items()
        }
        object.__setattr__(self, "options", options)
        if self.temperature is None:
            object.__setattr__(self, "temperature", method.own_temperature())
        if self.attack not in method.units:
            kinds = [kind for kind in method.units if kind != "released"]
            raise ValueError(
                f"attack must be {' or '.join(kinds)} for {self.method}, got {self.attack!r}"
            )
        if not method.fractions and (self.adv_fraction, self.adv_replace) != (1, False):
            raise ValueError(f"{self.method} has no adv_fraction and no adv_replace")
        if self.small_crops % 2:
            raise ValueError(f"small_crops must be even, got {self.small_crops}")
        if self.small_crops and not method.small_crops:
            raise ValueError(f"small_crops must be 0 for {self.method}, got {self.small_crops}")
        if method.needs_teacher != (self.teacher is not None):
            wanted = "be given" if method.needs_teacher else "not be given"
            raise ValueError(f"teacher must {wanted} for {self.method}, got {self.teacher!r}")

    def _require(self, name: str, holds: Any, wanted: str) -> None:
        value = getattr(self, name)
        for v in value if isinstance(value, tuple) else (value,):
            if v is not None and not (math.isfinite(v) and holds(v)):
                raise ValueError(f"{name} must be {wanted}, got {value}")

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Config":
        """The inverse of `to_dict`, also after a round through JSON.

        Raises:
            TypeError: a value of another type than the setting's.
            ValueError: an unknown setting, or a value out of range.
        """
        for name in values:
            require_known(name)
        return cls(**values)

    def resumed(self, changes: Mapping[str, Any]) -> "Config":
        """The settings of a run that goes on, where it runs and how long it lasts changed.

        Under the constant and the step schedule a run extended to more epochs equals one that
        began with them.

        Args:
            changes: settings of `MAY_CHANGE`; others as long as they are what they were.

        Raises:
            TypeError: a setting of the wrong type.
            ValueError: a setting that decides what was trained so far, or a value out of range.
        """
        changed = [name for name in changes if convert(name, changes[name]) != getattr(self, name)]
        fixed = [name for name in changed if name not in MAY_CHANGE]
        if fixed:
            raise ValueError(
                f"a run goes on with its own {', '.join(fixed)}; only {', '.join(MAY_CHANGE)} may "
                "change"
            )
        if "epochs" in changed and self.schedule == "cosine":
            raise ValueError(
                "epochs cannot change under the cosine schedule: the learning rate of every step "
                "so far depended on them"
            )
        return dataclasses.replace(self, **changes)


# settings that do not decide what was trained so far
MAY_CHANGE = (
    "epochs", "data_dir", "download", "on_corrupt", "workers", "resident", "device",
    "log_every", "checkpoint_every", "keep_every",
)  # fmt: skip
_POSITIVE = (
    "limit", "image_size", "crop_min_scale", "small_crop_size", "small_crop_scale", "std",
    "temperature", "hidden_dim", "proj_dim", "lr", "epochs", "batch_size", "micro_batch",
    "attack_steps", "adv_every", "adv_fraction", "log_every", "checkpoint_every", "keep_every",
    "val_every",
)  # fmt: skip
_NOT_NEGATIVE = (
    "color_jitter", "color_jitter_prob", "grey_prob", "blur_prob", "solarize_prob", "small_crops",
    "workers", "adv_weight", "eps", "step_size", "head_layers", "momentum", "weight_decay",
    "warmup_epochs", "milestones", "factors", "seed", "val_size",
)  # fmt: skip

# the first setting of each group of settings, as the command line's help has them
_GROUPS = {
    "dataset": "data",
    "image_size": "views",
    "method": "method",
    "attack": "attack",
    "arch": "encoder",
    "optimizer": "optimiser",
    "micro_batch": "engine",
    "seed": "run",
}

_WANTED = {str: "text", bool: "true or false", int: "a whole number", float: "a number"}
_SEVERAL = {int: "whole numbers", float: "numbers"}


@functools.cache
def hints() -> dict[str, Any]:
    """The type of each setting, by name."""
    return typing.get_type_hints(Config)


def groups() -> dict[str, list[dataclasses.Field]]:
    """The settings in the order of `Config`, by the group that each belongs to."""
    found: dict[str, list[dataclasses.Field]] = {}
    for field in dataclasses.fields(Config):
        if field.name in _GROUPS:
            found[_GROUPS[field.name]] = members = []
        members.append(field)
    return found


def require_known(name: str) -> None:
    """Raises ValueError where `name` is no setting, with the nearest one that is."""
    if name not in hints():
        raise ValueError(f"unknown setting {name!r}, the nearest is {nearest(name, hints())!r}")


def nearest(name: str, known: Collection[str]) -> str:
    """The one of `known` that begins with `name`, or else the one spelt most like it."""
    longer = [word for word in known if word.startswith(name)]
    return (longer or difflib.get_close_matches(name, known, n=1, cutoff=0.0))[0]


def convert(name: str, value: Any) -> Any:
    """The value as the setting `name` holds it: lists become tuples, whole numbers reals.

    Raises:
        TypeError: it is of another type; the message has the name, the value and what is wanted.
    """
    return _convert(name, hints()[name], value)


def _convert(name: str, hint: Any, value: Any) -> Any:
    inner = [kind for kind in typing.get_args(hint) if kind not in (type(None), ...)]
    if value is None and type(None) in typing.get_args(hint):
        return None
    if typing.get_origin(hint) is dict:
        # each is converted where it is known of which method it is
        if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
            return dict(value)
        wanted = "names and values"
    elif typing.get_origin(hint) is tuple:
        count = None if ... in typing.get_args(hint) else len(inner)
        fits = isinstance(value, (list, tuple)) and count in (None, len(value))
        if fits and all(_is(inner[0], v) for v in value):
            return tuple(inner[0](v) for v in value)
        wanted = f"a list of {f'{count} ' if count else ''}{_SEVERAL[inner[0]]}"
    else:
        kind = inner[0] if inner else hint
        if _is(kind, value):
            return kind(value)
        wanted = _WANTED[kind]
    raise TypeError(f"{name} must be {wanted}, got {value!r}")


def _is(kind: type, value: Any) -> bool:
    """Whether `value` is of a setting's type; true and false are no numbers."""
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)
