"""What a run consists of, built from its settings: data, views, method, attack."""

from typing import Any

import torch
from torch import nn

from clae_fast import data
from clae_fast.attack import LinfAttack
from clae_fast.config import Config, Data, Run
from clae_fast.distributed import World
from clae_fast.methods import METHODS, Method
from clae_fast.steps.options import StepOptions
from clae_fast.training import encoders


def load_data(settings: Data) -> data.Splits:
    """The data set of a run.

    Raises:
        DataError: The data set cannot be used.
    """
    return data.load(
        settings.dataset,
        data_dir=settings.data_dir,
        limit=settings.limit,
        download=settings.download,
        on_corrupt=settings.on_corrupt,
    )


def hold_out(run: Run, splits: data.Splits) -> tuple[data.Splits, data.Split | None]:
    """Takes the validation images out of the training images.

    Args:
        run: How many are held out, and the seed that chooses them.
        splits: The data set.

    Returns:
        The data set without them, and they themselves; None without `val_size`.

    Raises:
        ValueError: Fewer images have labels.
    """
    if not run.val_size:
        return splits, None
    labeled = splits.labeled
    if run.val_size >= len(labeled):
        raise ValueError(
            f"val_size must be below the {len(labeled)} labeled images, got {run.val_size}"
        )
    rest, held = data.hold_out(labeled, run.val_size, run.seed)
    # in some data sets only a part of the training images has labels
    train = splits.train.select(~torch.isin(splits.train.rows, held.rows))
    return data.Splits(train, rest, splits.test), held


def build_schedule(config: Config, images: int, **part: int) -> data.BatchSchedule:
    """The batches of a run over this many images, or the `part` that `BatchSchedule` names.

    Raises:
        ValueError: There are fewer images than a batch takes.
    """
    batch_size, epochs = config.optimization.batch_size, config.optimization.epochs
    return data.BatchSchedule(images, batch_size, epochs=epochs, seed=config.run.seed, **part)


def build_views(
    config: Config,
    train: data.Split,
    world: World,
    *,
    start: int,
    dtype: torch.dtype,
    progress: bool,
) -> data.ViewSource:
    """The views of all steps from `start` on; arguments and errors are those of `view_source`."""
    views = config.views
    return data.view_source(
        train,
        build_schedule(config, len(train), start=start, rank=world.rank, world=world.size),
        data.Recipe.of(views),
        image_size=views.image_size,
        device=world.device,
        dtype=dtype,
        workers=config.data.workers,
        resident=config.data.resident,
        labels=METHODS[config.objective.method].needs_labels,
        small_crops=views.small_crops,
        small_crop_size=views.small_crop_size,
        small_crop_scale=views.small_crop_scale,
        progress=progress,
    )


def build_method(config: Config, device: torch.device | str = "cpu") -> Method:
    """The method and its encoders on `device`, initialized from torch's global generator.

    Raises:
        ValueError: The architecture is unknown or does not take images of this size, or the teacher
            cannot be loaded or does not fit.
        RuntimeError: A package that is needed is not installed.
    """
    objective = config.objective
    encoder = encoders.build(config, device)
    given: dict[str, Any] = {"temperature": objective.temperature, **objective.options}
    if objective.teacher is not None:
        given["teacher"] = _teacher(objective.teacher, config.views.image_size, encoder, device)
    adversarial = config.adversary.attack != "none"
    return METHODS[objective.method](encoder, adversarial=adversarial, **given)


def _teacher(source: str, size: int, encoder: nn.Module, device: torch.device | str) -> nn.Module:
    """The encoder that is learned from, which has as many features as `encoder` projections."""
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
    """The attack, in pixels of 0..1: the encoder normalizes views itself."""
    adversary, std = config.adversary, config.views.std
    course: dict[str, Any] = {
        "steps": adversary.attack_steps,
        "start": adversary.attack_start,
        "norm": adversary.attack_norm,
    }
    eps, step_size = adversary.eps, adversary.step_size
    if adversary.eps_space == "pixel":
        return LinfAttack(eps=eps, step_size=step_size, lo=0.0, hi=1.0, **course)
    radii = tuple(eps * s for s in std)
    moves = radii if step_size is None else tuple(step_size * s for s in std)
    return LinfAttack(eps=radii, step_size=moves, **course)


def step_options(config: Config) -> StepOptions:
    """How an adversarial step of a run is taken; the device adds what only it knows."""
    return StepOptions(
        kind=config.adversary.attack,
        attack=build_attack(config),
        adv_weight=config.adversary.adv_weight,
        adv_fraction=config.adversary.adv_fraction,
        adv_replace=config.adversary.adv_replace,
        batched=config.engine.batch_views,
        micro_batch=config.engine.micro_batch,
    )
