"""Loaders: the batches of a whole training run, and of one pass for evaluation."""

import os
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import v2

from clae_fast.data.augment import TwoViews
from clae_fast.data.split import Split


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


def view_loader(
    views: TwoViews, batches: BatchSchedule, *, workers: int, pin_memory: bool
) -> DataLoader:
    """Loads the scheduled batches as pairs of views, [N, 3, H, W] each, with `workers` or fewer."""
    return DataLoader(
        views,
        batch_sampler=batches,
        num_workers=min(workers, _cores()),
        pin_memory=pin_memory,
        # the loader's own seed, unused here, must not move the global generator on a resume
        generator=torch.Generator(),
    )


def _cores() -> int:
    """Cores that this process may use; more loader processes than that get in each other's way."""
    return len(os.sched_getaffinity(0))


class _Images(Dataset):
    def __init__(self, split: Split, transform: v2.Compose) -> None:
        self.split = split
        self.transform = transform

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.transform(self.split[index]), self.split.labels[index]


def image_loader(
    split: Split, transform: v2.Compose, *, batch_size: int, workers: int
) -> DataLoader:
    """Loads a split once, in order, with `workers` or fewer: images [N, 3, H, W] and labels [N]."""
    return DataLoader(
        _Images(split, transform),
        batch_size=batch_size,
        num_workers=min(workers, _cores()),
        generator=torch.Generator(),
    )
