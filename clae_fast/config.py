"""Run configuration: every setting of a training run, checked, and the papers' presets.

Settings come from four places, later ones winning: the fields' defaults, which are the run on
scikit-learn's digits; `IMAGE_DEFAULTS` for any other data set; a preset; the caller.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


def _option(default: Any, text: str, choices: tuple[str, ...] | None = None) -> Any:
    return dataclasses.field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class Config:
    """Settings of a training run; each field is a flag of `python -m clae_fast.train`.

    Raises:
        ValueError: a value is out of range; the message names the field.
    """

    dataset: str = _option(
        "digits", "data set", choices=("digits", "parquet", "cifar10", "cifar100")
    )
    data_dir: str | None = _option(None, "folder of the data set")
    download: bool = _option(False, "fetch CIFAR when it is not in the data folder")
    limit: int | None = _option(None, "use the first N images of each split")
    image_size: int = _option(16, "side of a view in pixels")
    crop_min_scale: float = _option(0.4, "smallest part of the image a crop takes")
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
    mean: tuple[float, float, float] = _option(
        (0.5, 0.5, 0.5), "mean that the encoder subtracts from pixels in 0..1"
    )
    std: tuple[float, float, float] = _option((0.5, 0.5, 0.5), "and what it then divides by")
    on_corrupt: str = _option(
        "fail",
        "what an unreadable image does: end the run, or be left out and counted",
        choices=("fail", "skip"),
    )
    workers: int = _option(0, "loader processes, at most one a core; 0 loads in the main process")

    method: str = _option("simclr", "contrastive method", choices=("simclr", "plain", "uel"))
    temperature: float = _option(0.5, "temperature of the softmax")
    attack: str = _option("pair", "who is attacked", choices=("none", "pair", "self"))
    adv_weight: float = _option(1.0, "weight of the adversarial loss")
    eps: float = _option(0.06, "radius of the attack")
    step_size: float | None = _option(None, "step of the attack; eps by default")
    eps_space: str = _option(
        "pixel",
        "units of eps: pixel (0..1, views stay in 0..1) or normalized (divided by std, unbounded)",
        choices=("pixel", "normalized"),
    )

    arch: str = _option("resnet-narrow", "resnet-narrow, resnet18|34|50|101|152 or timm/NAME")
    hidden_dim: int = _option(128, "hidden units of the projection head; 0 for one linear layer")
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
    batch_size: int = _option(128, "images in a batch")

    seed: int = _option(0, "seed of weights, order and augmentation")
    device: str = _option("auto", "cpu, cuda, cuda:N, or auto: a GPU if there is one")
    log_every: int = _option(10, "steps between log points")
    checkpoint_every: int | None = _option(None, "steps between checkpoints within an epoch")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
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
        self._require("crop_min_scale", lambda v: v <= 1, "at most 1")
        if self.color_jitter[3] > 0.5:
            raise ValueError(
                f"color_jitter must have a hue of at most 0.5, got {self.color_jitter}"
            )
        if self.dataset == "parquet" and self.data_dir is None:
            raise ValueError("data_dir is required for the parquet data set")
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
            ValueError: an unknown setting, or a value out of range.
        """
        unknown = set(values) - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(f"unknown settings: {', '.join(sorted(unknown))}")
        settings: dict[str, Any] = dict(values)
        for name, value in settings.items():
            if isinstance(value, list):
                settings[name] = tuple(value)
        return cls(**settings)


_POSITIVE = (
    "limit", "image_size", "crop_min_scale", "std", "temperature", "proj_dim", "lr", "epochs",
    "batch_size", "log_every", "checkpoint_every",
)  # fmt: skip
_NOT_NEGATIVE = (
    "color_jitter", "color_jitter_prob", "grey_prob", "blur_prob", "solarize_prob", "workers",
    "adv_weight", "eps", "step_size",
    "hidden_dim", "momentum", "weight_decay", "warmup_epochs", "milestones", "factors", "seed",
)  # fmt: skip

IMAGE_DEFAULTS: dict[str, Any] = {
    "image_size": 32,
    "crop_min_scale": 0.2,
    "flip": True,
    "color_jitter": (0.4, 0.4, 0.4, 0.1),
    "grey_prob": 0.2,
    "workers": 2,
    "eps": 8 / 255,
    "arch": "resnet18",
    "hidden_dim": 512,
    "proj_dim": 128,
    "lr": 1e-3,
    "weight_decay": 1e-6,
    "decay_1d": False,
    "epochs": 100,
    "batch_size": 256,
}

# the settings that CLAE's scripts run with (Ho and Vasconcelos, NeurIPS 2020): the self attack, its
# radius in normalised units, no clamp
_CLAE: dict[str, Any] = {
    "attack": "self",
    "adv_weight": 1.0,
    "eps": 0.03,
    "eps_space": "normalized",
    "arch": "resnet18",
    "image_size": 32,
    "flip": True,
    "grey_prob": 0.2,
    "warmup_epochs": 0,
    "decay_1d": True,
}
_CLAE_SIMCLR: dict[str, Any] = _CLAE | {
    "method": "simclr",
    "temperature": 0.5,
    "crop_min_scale": 0.08,
    "color_jitter": (0.8, 0.8, 0.8, 0.2),
    "color_jitter_prob": 0.8,
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "hidden_dim": 512,
    "proj_dim": 64,
    "optimizer": "adam",
    "lr": 3e-4,
    "weight_decay": 0.0,
    "schedule": "constant",
    "epochs": 100,
    "batch_size": 256,
}
_CLAE_SMALL_BATCH: dict[str, Any] = _CLAE | {
    "temperature": 0.1,
    "crop_min_scale": 0.2,
    "color_jitter": (0.4, 0.4, 0.4, 0.4),
    "color_jitter_prob": 1.0,
    # CIFAR-10's, for CIFAR-100 too
    "mean": (0.4914, 0.4822, 0.4465),
    "std": (0.2023, 0.1994, 0.2010),
    "hidden_dim": 0,
    "proj_dim": 128,
    "optimizer": "sgd",
    "lr": 0.03,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "schedule": "step",
    "milestones": (120, 160, 200),
    "factors": (0.1, 0.05, 0.01),
    "epochs": 301,
    "batch_size": 128,
}

PRESETS: dict[str, dict[str, Any]] = {
    f"clae-{method}-{dataset}": settings | {"method": method, "dataset": dataset}
    for method, settings in (
        ("simclr", _CLAE_SIMCLR),
        ("plain", _CLAE_SMALL_BATCH),
        ("uel", _CLAE_SMALL_BATCH),
    )
    for dataset in ("cifar10", "cifar100")
}


def resolve(settings: Mapping[str, Any], preset: str | None = None) -> Config:
    """Completes `settings` with a preset and the defaults of the data set.

    Args:
        settings: values by field name; they win over everything else.
        preset: a name in `PRESETS`.

    Raises:
        ValueError: an unknown preset or setting, or a value out of range.
    """
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    chosen = (PRESETS[preset] if preset else {}) | dict(settings)
    digits = chosen.get("dataset", "digits") == "digits"
    return Config.from_dict(({} if digits else IMAGE_DEFAULTS) | chosen)
