"""What a run consists of, built from its settings: method, attack, held out images."""

from typing import Any

import torch
from torch import nn

from clae_fast import data
from clae_fast.attack import LinfAttack
from clae_fast.config import Config
from clae_fast.methods import METHODS, Method
from clae_fast.training import encoders


def build_method(config: Config, device: torch.device | str = "cpu") -> Method:
    """The method and its encoders on `device`, initialised from torch's global generator.

    Raises:
        ValueError: an unknown architecture, or one that does not take images of this size; a
            teacher that cannot be had or does not fit.
        RuntimeError: it needs a package that is not installed.
    """
    encoder = encoders.build(config, device)
    given: dict[str, Any] = {
        "temperature": config.objective.temperature,
        **config.objective.options,
    }
    if config.objective.teacher is not None:
        given["teacher"] = _teacher(config.objective.teacher, config, encoder, device)
    return METHODS[config.objective.method](
        encoder, adversarial=config.adversary.attack != "none", **given
    )


def _teacher(
    source: str, config: Config, encoder: nn.Module, device: torch.device | str
) -> nn.Module:
    """Whom the encoder learns from, with as many features as it has projections."""
    size = config.views.image_size
    try:
        teacher = encoders.load_encoder(source, image_size=size, device=device)
    except ValueError as error:
        raise ValueError(f"teacher: {error}") from error
    projections, features = encoders.width(encoder, size), teacher.dim
    if projections != features:
        raise ValueError(
            f"teacher has {features} features and the encoder {projections}, but they are compared:"
            f" set proj_dim to {features}, or head_layers to 0 where the backbones are alike"
        )
    return teacher


def build_attack(config: Config) -> LinfAttack:
    """The attack, in pixels of 0..1: views are normalised inside the encoder."""
    course: dict[str, Any] = {
        "steps": config.adversary.attack_steps,
        "start": config.adversary.attack_start,
        "norm": config.adversary.attack_norm,
    }
    if config.adversary.eps_space == "pixel":
        return LinfAttack(
            eps=config.adversary.eps, step_size=config.adversary.step_size, lo=0.0, hi=1.0, **course
        )
    step_size = (
        config.adversary.eps if config.adversary.step_size is None else config.adversary.step_size
    )
    return LinfAttack(
        eps=tuple(config.adversary.eps * std for std in config.views.std),
        step_size=tuple(step_size * std for std in config.views.std),
        **course,
    )


def hold_out(config: Config, splits: data.Splits) -> tuple[data.Splits, data.Split | None]:
    """Takes the validation images out of what is trained on.

    Args:
        config: how many, and the seed that chooses them.
        splits: the data set.

    Returns:
        The data set without them, and they themselves; None without `val_size`.

    Raises:
        ValueError: not that many images have labels.
    """
    if not config.run.val_size:
        return splits, None
    labelled = splits.labelled
    if config.run.val_size >= len(labelled):
        raise ValueError(
            f"val_size must be below the {len(labelled)} labelled images, got {config.run.val_size}"
        )
    rest, held = data.hold_out(labelled, config.run.val_size, config.run.seed)
    # a part of the training images where some have no labels
    train = splits.train.select(~torch.isin(splits.train.rows, held.rows))
    return data.Splits(train, rest, splits.test), held
