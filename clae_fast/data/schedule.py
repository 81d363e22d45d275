"""Decides which images make up each batch of a training run."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


class BatchSchedule(Sampler[tuple[int, np.ndarray]]):
    """The batches of a run from some step to its last. A batch is an epoch and indices of images.

    Each epoch is a permutation, which (seed, epoch) determines, cut into full batches. The images
    that are left over at its end are dropped. One iterator spans all epochs, so that loader
    processes never idle between two.

    Args:
        size: How many images the training set has.
        batch_size: How many images a batch has, over all processes together.
        epochs: How many passes over the set the whole run makes.
        seed: The run's seed.
        start: How many steps are done already.
        rank: The process whose part of each batch this is.
        world: How many processes share a batch; each gets an equal part.

    Raises:
        ValueError: A batch is empty, is larger than the set, or is not divisible by `world`.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        *,
        epochs: int,
        seed: int,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if not 0 < batch_size <= size:
            wanted = f"at most the {size} images" if batch_size > 0 else "positive"
            raise ValueError(f"batch_size must be {wanted}, got {batch_size}")
        if batch_size % world:
            raise ValueError(
                f"batch_size must be divisible by the {world} processes, got {batch_size}"
            )
        if not 0 <= rank < world:
            raise ValueError(f"rank must be from 0 to {world - 1}, got {rank}")
        self.size = size
        self.batch_size = batch_size
        self.epochs = epochs
        self.seed = seed
        self.start = start
        self.rank = rank
        self.world = world

    @property
    def steps_per_epoch(self) -> int:
        """Full batches in an epoch."""
        return self.size // self.batch_size

    def __len__(self) -> int:
        return max(self.epochs * self.steps_per_epoch - self.start, 0)

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        for epoch, batches in self.blocks(1):
            yield epoch, batches[0]

    def blocks(self, steps: int) -> Iterator[tuple[int, np.ndarray]]:  # [<= steps, n]
        """The same batches, up to `steps` of one epoch at a time."""
        first_epoch, skip = divmod(self.start, self.steps_per_epoch)
        n = self.batch_size // self.world
        mine = slice(self.rank * n, (self.rank + 1) * n)
        for epoch in range(first_epoch, self.epochs):
            order = np.random.default_rng((self.seed, epoch)).permutation(self.size)
            batches = order[: self.steps_per_epoch * self.batch_size].reshape(-1, self.batch_size)
            for step in range(skip, self.steps_per_epoch, steps):
                yield epoch, batches[step : step + steps, mine]
            skip = 0
