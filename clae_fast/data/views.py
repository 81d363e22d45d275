"""Makes the views of a training run, from images on the device or from a loader."""

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
    """Iterates over a run's batches, from some step to the last.

    The seed, the epoch, the image's index in the training split and the number of the view
    determine a view. A view does not depend on loader processes, on the number of training
    processes, or on where the images are.

    Attributes:
        where: Where the images are, in a few words.
        steps_per_epoch: How many full batches an epoch has.
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
        """How many batches are still to come."""
        return len(self._schedule)

    def __iter__(self) -> Iterator[Batch]:
        """Yields views in 0..1, channels_last, and labels if asked for, on the device."""
        large, small = self._sizes
        for images, params, rows, labels in self._batches:
            views: list[Tensor] = []
            for table in params.split(VIEWS):
                size = small if views else large
                views += self._augment(images, table, rows=rows, size=size)
            yield Batch(tuple(views), labels)


def view_source(
    split: Split,
    schedule: BatchSchedule,
    recipe: Recipe,
    *,
    image_size: int,
    device: torch.device,
    dtype: torch.dtype,
    workers: int,
    resident: str,
    labels: bool = False,
    small_crops: int = 0,
    small_crop_size: int = 96,
    small_crop_scale: tuple[float, float] = (0.05, 0.14),
    progress: bool = True,
) -> ViewSource:
    """Makes the views of a run from images that stay on the device, or from a loader.

    Small crops come in pairs. They are drawn like the large views, but take a smaller part of the
    image (Caron et al., "Unsupervised learning of visual features by contrasting cluster
    assignments", NeurIPS 2020).

    Args:
        split: The training images.
        schedule: Which images make up each batch; its seed is also that of the views.
        recipe: How views are drawn.
        image_size: Side of the large views in pixels.
        device: The device that makes the views.
        dtype: Type of the views, fp32 or fp16.
        workers: How many processes decode, at most one for each core; 0 decodes in this one.
        resident: "yes" decodes all images once, to bytes that stay on the device. "no" decodes them
            for each batch. "auto" keeps them if they take at most a third of a GPU's free memory
            and half of the free main memory, or a quarter of the free main memory on the CPU.
        labels: Whether batches have the classes of their images.
        small_crops: How many further views each image has. They come in pairs, and an odd one is
            dropped.
        small_crop_size: Side of the small crops in pixels.
        small_crop_scale: The smallest and the largest part of the image's area that they take.
        progress: Whether the first process shows how far decoding is, if it takes a while.

    Raises:
        DataError: An image cannot be read. If such images are skipped: no image can be read.
        ValueError: An argument is out of range, the images must stay on the device but do not fit,
            or labels are asked for and some images have none.
    """
    if resident not in RESIDENT:
        raise ValueError(f"resident must be one of {', '.join(RESIDENT)}, got {resident!r}")
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
    draw = partial(_tables, [partial(augment_params, seed=schedule.seed, **pair) for pair in pairs])
    stays = resident_bytes(split, resident, device=device, world=schedule.world) is not None
    source = partial(Resident, bar=progress and schedule.rank == 0) if stays else Streamed
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
    """Estimates how many bytes the decoded images take if they stay on the device.

    Args:
        split: The training images.
        resident: "auto", "yes" or "no", as in `view_source`.
        device: The device that they would stay on.
        world: How many processes there are. Each would hold all images.

    Returns:
        The number of bytes, or None if the images do not stay.

    Raises:
        ValueError: They must stay but do not fit.
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
    """Whether the images fit comfortably; raises if they `must` stay and do not fit at all."""
    # each process of a run holds all images, and those of one machine share its memory
    main = "main memory", free_bytes(torch.device("cpu")) // world
    # a place, its free bytes, and by what to divide these to get the part that may be taken
    rooms = [(*main, 4)]
    if device.type == "cuda":
        # they are decoded in main memory, but do not stay there
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
