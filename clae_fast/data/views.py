"""The views of a whole training run, wherever its images are."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from clae_fast.data.memory import decoded_bytes, free_bytes, readable
from clae_fast.data.recipes import Recipe
from clae_fast.data.resident import Resident
from clae_fast.data.schedule import BatchSchedule
from clae_fast.data.split import Split
from clae_fast.data.streamed import Streamed
from clae_fast.ops.augment import augment
from clae_fast.ops.augment_params import VIEWS, augment_params
from clae_fast.steps.batch import Batch

RESIDENT = ("auto", "yes", "no")


class ViewSource:
    """Iterates over a run's batches, from one step to the last.

    The views of a sample are a function of (seed, epoch, index, view) alone, the index being that
    in the training split: neither of workers, nor of processes, nor of where the images are.

    Attributes:
        where: in a few words, where the images are.
        steps_per_epoch: full batches in an epoch.
    """

    def __init__(
        self,
        batches: Resident | Streamed,
        schedule: BatchSchedule,
        *,
        image_size: int,
        small_crop_size: int,
        interpolation: str,
        dtype: torch.dtype,
    ) -> None:
        self.where = batches.where
        self.steps_per_epoch = schedule.steps_per_epoch
        self._batches = batches
        self._schedule = schedule
        self._sizes = image_size, small_crop_size
        self._augment = partial(
            augment,
            interpolation=interpolation,
            dtype=dtype,
            memory_format=torch.channels_last,
        )

    def __len__(self) -> int:
        """Batches to come."""
        return len(self._schedule)

    def __iter__(self) -> Iterator[Batch]:
        """Views in 0..1, channels_last, and labels where they are asked for, on the device."""
        large, small = self._sizes
        for images, params, rows, labels in self._batches:
            views: list[Tensor] = []
            for table in params.split(VIEWS):
                size = small if views else large
                views += self._augment(images, table, rows=rows, size=size)
            yield Batch(tuple(views), labels)


def view_source(
    split: Split,
    recipe: Recipe,
    *,
    image_size: int,
    batch_size: int,
    epochs: int,
    seed: int,
    start: int,
    device: torch.device,
    dtype: torch.dtype,
    workers: int,
    resident: str,
    labels: bool = False,
    small_crops: int = 0,
    small_crop_size: int = 96,
    small_crop_scale: tuple[float, float] = (0.05, 0.14),
    rank: int = 0,
    world: int = 1,
    progress: bool = True,
) -> ViewSource:
    """Makes the views of a run from the images on the device, or from a loader.

    Small crops come in pairs, which are drawn as the large views are but for the part of the image
    that they take: Caron et al., "Unsupervised learning of visual features by contrasting cluster
    assignments", NeurIPS 2020.

    Args:
        split: the training images.
        recipe: how views are drawn.
        image_size: side of the large views in pixels.
        batch_size: images in a batch, of all processes together.
        epochs: passes over the images in the whole run.
        seed: of the run.
        start: steps that are done already.
        device: where views are made.
        dtype: of the views, fp32 or fp16.
        workers: processes that decode, at most one a core; 0 decodes in this one.
        resident: "yes" to decode all images once, to bytes that stay on the device; "no" to decode
            them for each batch; "auto" for the first where they take at most a third of the GPU's
            free memory, or a quarter of the main memory.
        labels: whether batches have the classes of their images.
        small_crops: further views of each image; the last of an odd number is dropped.
        small_crop_size: side of these in pixels.
        small_crop_scale: smallest and largest part of the image's area that they take.
        rank: whose part of each batch is made.
        world: processes that share a batch.
        progress: whether the first process shows how far decoding is, where that takes longer.

    Raises:
        DataError: an image cannot be read, or where such are skipped, none can.
        ValueError: an argument out of its range, images that do not fit and have to, or labels
            that are asked for and that images do not have.
    """
    if resident not in RESIDENT:
        raise ValueError(f"resident must be one of {', '.join(RESIDENT)}, got {resident!r}")
    schedule = BatchSchedule(
        len(split), batch_size, epochs=epochs, seed=seed, start=start, rank=rank, world=world
    )
    if small_crops < 0:
        raise ValueError(f"small_crops must be 0 or more, got {small_crops}")
    if labels and (missing := int((split.labels < 0).sum())):
        raise ValueError(
            f"labels of all training images are needed, but {missing} of the {len(split)} have none"
        )
    settings = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe)}
    interpolation = settings.pop("interpolation")
    scale = dict(zip(("crop_min_scale", "crop_max_scale"), small_crop_scale, strict=True))
    pairs = [settings]
    for pair in range(1, 1 + small_crops // VIEWS):
        pairs.append({**settings, **scale, "first_view": VIEWS * pair})
    draw = partial(_tables, [partial(augment_params, seed=seed, **pair) for pair in pairs])
    stays = resident_bytes(split, resident, device=device, world=world) is not None
    source = partial(Resident, bar=progress and rank == 0) if stays else Streamed
    return ViewSource(
        source(split, schedule, draw, device=device, workers=workers, labels=labels),
        schedule,
        image_size=image_size,
        small_crop_size=small_crop_size,
        interpolation=interpolation,
        dtype=dtype,
    )


def resident_bytes(
    split: Split, resident: str, *, device: torch.device, world: int = 1
) -> int | None:
    """About how many bytes the decoded images take where they stay on the device.

    Args:
        split: the training images.
        resident: as of `view_source`.
        device: where they would stay.
        world: processes that each have them.

    Returns:
        None where they do not stay.

    Raises:
        ValueError: they do not fit and have to.
    """
    if resident == "no":
        return None
    need = decoded_bytes(split)
    return need if _fits(need, device, world, must=resident == "yes") else None


def _tables(
    draws: Sequence[Callable[..., Tensor]], ids: Tensor, **images: Any
) -> Tensor:  # [V, N, 16]
    """The tables of all pairs of views."""
    return torch.cat([draw(ids, **images) for draw in draws])


def _fits(need: int, device: torch.device, world: int, *, must: bool) -> bool:
    """Whether the decoded images fit comfortably; raises where they `must`, and do not at all."""
    # each process of a run has all images, and on one machine all take from the same memory
    main = "main memory", free_bytes(torch.device("cpu")) // world
    # a place, what is free there, and what part of that is comfortable to take
    rooms = [(*main, 4)]
    if device.type == "cuda":
        # decoded in main memory, where they stay no longer than that
        rooms = [(str(device), free_bytes(device), 3), (*main, 2)]
    if not must:
        return all(need <= free // part for _, free, part in rooms)
    for place, free, _ in rooms:
        if need > free:
            raise ValueError(
                f"resident is 'yes', but decoded the training images take about {readable(need)} "
                f"and {place} has {readable(free)} free: leave it at 'auto'"
            )
    return True
