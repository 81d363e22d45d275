"""Starts loader processes, and loads a split once for evaluation."""

import os
import signal
import sys
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms import v2

from clae_fast.data.split import Split
from clae_fast.errors import DataError


def eval_transform(image_size: int) -> v2.Compose:
    """Crops the middle of an image, as a float tensor [3, image_size, image_size] in [0, 1]."""
    middle = [v2.Resize(image_size), v2.CenterCrop(image_size)]
    as_floats = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()]
    return v2.Compose([*middle, *as_floats])


class Batches:
    """Batches of tensors; skipped images are named on stderr as their batches arrive."""

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
            raise self._split.nothing_readable()


def image_loader(
    split: Split,
    transform: v2.Compose,
    *,
    batch_size: int,
    workers: int,
    pin_memory: bool = False,
) -> Batches:
    """Loads a split once, in order: batches of images [N, 3, H, W] and labels [N].

    At most `workers` processes decode, and at most one for each core. Where corrupt images are
    skipped, batches leave them out.
    """
    images = _Images(split, transform)
    loader = make_loader(
        images,
        workers=workers,
        pin_memory=pin_memory,
        batch_size=batch_size,
        collate_fn=_collate,
    )
    return Batches(loader, split)


def make_loader(dataset: Dataset, *, workers: int, **settings: Any) -> DataLoader:
    """Makes a DataLoader whose processes ignore Ctrl-C, which this process handles.

    Args:
        dataset: The data set.
        workers: How many processes load, but at most one for each core; 0 loads in this one.
        settings: Further arguments of DataLoader.
    """
    return DataLoader(
        dataset,
        num_workers=min(workers, _cores()),
        worker_init_fn=_leave_interrupts_to_the_parent,
        # a loader draws a seed that nothing here uses: it must not move the global generator
        generator=torch.Generator(),
        **settings,
    )


def _cores() -> int:
    """How many cores this process may use; more loader processes would only compete for them."""
    return len(os.sched_getaffinity(0))


def _leave_interrupts_to_the_parent(_: int) -> None:
    # Ctrl-C reaches every process of a terminal, and the parent ends its workers itself
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # SIGTERM may reach all as well: a worker that fails would end the parent in mid-step
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    sys.excepthook = _print_unless_parent_left


def _print_unless_parent_left(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    # a parent that was interrupted leaves a batch half fetched, which nobody needs to know
    if not issubclass(kind, ConnectionError):
        sys.__excepthook__(kind, error, trace)


def _collate(items: list[tuple[Any, ...]]) -> tuple[list[Tensor], list[str]]:
    """Stacks the tensors of items (*tensors, errors); items without tensors are left out."""
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
