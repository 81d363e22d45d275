"""Training images that are decoded whenever a batch needs them, by other processes."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from clae_fast import RaggedImages
from clae_fast.data.loaders import make_loader
from clae_fast.data.pixels import pack, sides, to_bytes, unpack
from clae_fast.data.schedule import BatchSchedule
from clae_fast.data.split import DataError, Split

# the images of a batch and their parameters [2, n, 16]
_Batch = tuple[Tensor | RaggedImages, Tensor]


class Streamed:
    """Batches of images that workers decode ahead of the step, and how each is augmented.

    The workers live from the first batch to the last, each two batches ahead. On its way to a GPU
    a batch is one more ahead, in pinned memory and on a stream of its own. Where corrupt images are
    skipped, the next readable ones stand in for them.

    Args:
        split: the training images.
        schedule: which of them make up each batch.
        draw: `augment_params` with the run's settings.
        device: where the batches go.
        workers: processes that decode, at most one a core.
    """

    def __init__(
        self,
        split: Split,
        schedule: BatchSchedule,
        draw: Callable[..., Tensor],
        *,
        device: torch.device,
        workers: int,
    ) -> None:
        self._split = split
        self._device = device
        self._loader = make_loader(
            _Batches(split, draw),
            workers=workers,
            pin_memory=device.type == "cuda",
            batch_size=None,
            sampler=schedule,
        )
        count = self._loader.num_workers
        self.where = f"streamed, {count or 'no'} worker{'s' * (count != 1)}"

    def __iter__(self) -> Iterator[tuple[Tensor | RaggedImages, Tensor, None]]:
        """The images of each batch and their parameters; the rows are in order."""
        on_gpu = self._device.type == "cuda"
        batches = self._decoded()
        for images, params in _copied_ahead(batches, self._device) if on_gpu else batches:
            yield images, params, None

    def _decoded(self) -> Iterator[_Batch]:
        for images, params, errors in self._loader:
            self._split.corrupt.add(errors)
            yield images, params


def _copied_ahead(batches: Iterable[_Batch], device: torch.device) -> Iterator[_Batch]:
    """The batches on a GPU, each copied there while the one before it is used."""
    stream = torch.cuda.Stream(device)
    ahead: tuple[_Batch, torch.cuda.Event] | None = None
    for images, params in batches:
        with torch.cuda.stream(stream):
            batch = _to(images, device), params.to(device, non_blocking=True)
            copied = stream.record_event()
        if ahead is not None:
            yield _arrived(*ahead)
        ahead = batch, copied
    if ahead is not None:
        yield _arrived(*ahead)


def _to(images: Tensor | RaggedImages, device: torch.device) -> Tensor | RaggedImages:
    if isinstance(images, RaggedImages):
        return RaggedImages(*(tensor.to(device, non_blocking=True) for tensor in images))
    return images.to(device, non_blocking=True)


def _arrived(batch: _Batch, copied: torch.cuda.Event) -> _Batch:
    """The batch, for the current stream, which waits for it and holds its memory."""
    images, params = batch
    stream = torch.cuda.current_stream(params.device)
    stream.wait_event(copied)
    for tensor in (*images, params) if isinstance(images, RaggedImages) else (images, params):
        tensor.record_stream(stream)
    return batch


class _Batches(Dataset):
    """What each batch of the schedule is made of: images, parameters, and errors that were new."""

    def __init__(self, split: Split, draw: Callable[..., Tensor]) -> None:
        self.split = split
        self.draw = draw
        self._corrupt: set[int] = set()

    def __getitem__(
        self, key: tuple[int, np.ndarray]
    ) -> tuple[Tensor | RaggedImages, Tensor, list[str]]:
        epoch, indices = key
        errors: list[str] = []
        pixels = [to_bytes(self._readable(index, errors)) for index in indices.tolist()]
        images = unpack(*pack(pixels))
        height, width = sides(images)
        # here, since on the way to a GPU it would be hundreds of small launches
        params = self.draw(torch.from_numpy(indices), epoch=epoch, height=height, width=width)
        return images, params, errors

    def _readable(self, index: int, errors: list[str]) -> Any:
        """The first readable image from `index` on; new errors before it are added to `errors`."""
        for offset in range(len(self.split)):
            at = (index + offset) % len(self.split)
            # a folder that is gone is not searched again for each of its images
            if at in self._corrupt:
                continue
            try:
                return self.split[at]
            except DataError as error:
                if not self.split.corrupt.skip:
                    raise
                self._corrupt.add(at)
                errors.append(str(error))
        raise self.split.nothing_readable(errors)
