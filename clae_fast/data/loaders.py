"""Loaders: the batches of a whole training run, and of one pass for evaluation."""

import os
import signal
import sys
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from torchvision.transforms import v2

from clae_fast.data.augment import TwoViews
from clae_fast.data.split import DataError, Split


class BatchSchedule(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index) from one step of a run to its last.

    An epoch is a permutation drawn from (seed, epoch), cut into full batches; the rest is dropped.
    One iterator spans the epochs, so that workers never idle at a boundary.
    """

    def __init__(
        self, size: int, batch_size: int, *, epochs: int, seed: int, start: int = 0
    ) -> None:
        if batch_size > size:
            raise ValueError(f"batch_size must be at most the {size} images, got {batch_size}")
        self.size = size
        self.batch_size = batch_size
        self.epochs = epochs
        self.seed = seed
        self.start = start

    @property
    def steps_per_epoch(self) -> int:
        """Full batches in an epoch."""
        return self.size // self.batch_size

    def __len__(self) -> int:
        return self.epochs * self.steps_per_epoch - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        first_epoch, skip = divmod(self.start, self.steps_per_epoch)
        for epoch in range(first_epoch, self.epochs):
            order = np.random.default_rng((self.seed, epoch)).permutation(self.size).tolist()
            for step in range(skip, self.steps_per_epoch):
                rows = order[step * self.batch_size : (step + 1) * self.batch_size]
                yield [(epoch, row) for row in rows]
            skip = 0


class Batches:
    """Batches of tensors; images that were skipped for them are named as the batches come."""

    def __init__(self, loader: DataLoader, split: Split) -> None:
        self._loader = loader
        self._split = split

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[list[Tensor]]:
        readable = False
        for batch, errors in self._loader:
            self._split.corrupt.add(errors)
            if batch:
                readable = True
                yield batch
        if not readable and len(self):
            raise DataError(f"none of the {len(self._split)} images can be read")


def view_loader(
    views: TwoViews, batches: BatchSchedule, *, workers: int, pin_memory: bool
) -> Batches:
    """Loads the scheduled batches as pairs of views, [N, 3, H, W] each, with `workers` or fewer.

    The workers live from the first batch to the last, each two batches ahead.
    """
    loader = _loader(views, workers=workers, pin_memory=pin_memory, batch_sampler=batches)
    return Batches(loader, views.split)


def image_loader(
    split: Split,
    transform: v2.Compose,
    *,
    batch_size: int,
    workers: int,
    pin_memory: bool = False,
) -> Batches:
    """Loads a split once, in order, with `workers` or fewer: images [N, 3, H, W] and labels [N].

    Corrupt images are left out, where they are skipped.
    """
    images = _Images(split, transform)
    loader = _loader(images, workers=workers, pin_memory=pin_memory, batch_size=batch_size)
    return Batches(loader, split)


def _loader(dataset: Dataset, *, workers: int, **settings: Any) -> DataLoader:
    return DataLoader(
        dataset,
        num_workers=min(workers, _cores()),
        collate_fn=_collate,
        worker_init_fn=_leave_interrupts_to_the_parent,
        # the loader's own seed, unused here, must not move the global generator on a resume
        generator=torch.Generator(),
        **settings,
    )


def _cores() -> int:
    """Cores that this process may use; more loader processes than that get in each other's way."""
    return len(os.sched_getaffinity(0))


def _leave_interrupts_to_the_parent(_: int) -> None:
    # Ctrl-C reaches every process of the terminal; the parent ends its workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.excepthook = _print_unless_parent_left


def _print_unless_parent_left(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    # an interrupted parent leaves a batch half fetched, which is no news
    if not issubclass(kind, ConnectionError):
        sys.__excepthook__(kind, error, trace)


def _collate(items: list[tuple[Any, ...]]) -> tuple[list[Tensor], list[str]]:
    """Stacks the tensors of items (*tensors, errors), passing over those that have none."""
    errors = [error for *_, found in items for error in found]
    tensors = [parts for *parts, _ in items if parts]
    return default_collate(tensors) if tensors else [], errors


class _Images(Dataset):
    def __init__(self, split: Split, transform: v2.Compose) -> None:
        self.split = split
        self.transform = transform

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        try:
            image = self.split[index]
        except DataError as error:
            if not self.split.corrupt.skip:
                raise
            return ([str(error)],)
        return self.transform(image), self.split.labels[index], []
