"""Decodes training images in loader processes whenever a batch needs them."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from clae_fast._ragged import RaggedImages
from clae_fast.data.loaders import make_loader
from clae_fast.data.pixels import pack, sides, to_bytes, unpack
from clae_fast.data.schedule import BatchSchedule
from clae_fast.data.split import Split
from clae_fast.errors import DataError

# the images of a batch, the parameters of their views [V, n, 16] and, if asked for, labels [n]
_Batch = tuple[Tensor | RaggedImages, Tensor, Tensor | None]


class Streamed:
    """Batches of images that workers decode ahead of the step, with the parameters of their views.

    The workers live from the first batch to the last, and each is two batches ahead. A batch for a
    GPU is copied one batch ahead, from pinned memory and on a stream of its own. Where corrupt
    images are skipped, each is replaced by the next readable one.

    Args:
        split: The training images.
        schedule: Which images make up each batch.
        draw: Draws the tables of `augment_params` for all V views, with the run's settings.
        device: The device that the batches go to.
        workers: How many processes decode, at most one for each core.
        labels: Whether batches have labels.
    """

    def __init__(
        self,
        split: Split,
        schedule: BatchSchedule,
        draw: Callable[..., Tensor],
        *,
        device: torch.device,
        workers: int,
        labels: bool,
    ) -> None:
        self._split = split
        self._device = device
        self._loader = make_loader(
            _Batches(split, draw, labels=labels),
            workers=workers,
            pin_memory=device.type == "cuda",
            batch_size=None,
            sampler=schedule,
        )
        count = self._loader.num_workers
        self.where = f"streamed, {count or 'no'} worker{'s' * (count != 1)}"

    def __iter__(self) -> Iterator[tuple[Tensor | RaggedImages, Tensor, None, Tensor | None]]:
        """Yields images, parameters and labels of each batch; None says that rows are in order."""
        on_gpu = self._device.type == "cuda"
        batches = self._decoded()
        for images, params, labels in _copied_ahead(batches, self._device) if on_gpu else batches:
            yield images, params, None, labels

    def _decoded(self) -> Iterator[_Batch]:
        for images, params, labels, errors in self._loader:
            self._split.corrupt.add(errors)
            yield images, params, labels


def _copied_ahead(batches: Iterable[_Batch], device: torch.device) -> Iterator[_Batch]:
    """Yields the batches on a GPU; each is copied there while the one before it is used."""
    stream = torch.cuda.Stream(device)
    ahead: tuple[_Batch, torch.cuda.Event] | None = None
    for images, params, labels in batches:
        with torch.cuda.stream(stream):
            batch = (
                _to(images, device),
                params.to(device, non_blocking=True),
                None if labels is None else labels.to(device, non_blocking=True),
            )
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
    """Has the current stream wait for the batch and keep its memory."""
    images, params, labels = batch
    stream = torch.cuda.current_stream(params.device)
    stream.wait_event(copied)
    of_images = images if isinstance(images, RaggedImages) else (images,)
    for tensor in (*of_images, params, labels):
        if tensor is not None:
            tensor.record_stream(stream)
    return batch


class _Batches(Dataset):
    """Loads a batch of the schedule; with it come the errors that are new."""

    def __init__(self, split: Split, draw: Callable[..., Tensor], *, labels: bool) -> None:
        self.split = split
        self.draw = draw
        self.labels = labels
        self._corrupt: set[int] = set()

    def __getitem__(
        self, key: tuple[int, np.ndarray]
    ) -> tuple[Tensor | RaggedImages, Tensor, Tensor | None, list[str]]:
        epoch, indices = key
        found: list[int] = []
        pixels: list[np.ndarray] = []
        errors: list[str] = []
        for index in indices.tolist():
            at, image = self._readable(index, errors)
            found.append(at)
            pixels.append(to_bytes(image))
        images = unpack(*pack(pixels))
        height, width = sides(images)
        # drawn on the CPU, since a GPU would need hundreds of small launches for it
        params = self.draw(torch.from_numpy(indices), epoch=epoch, height=height, width=width)
        labels = self.split.labels[found] if self.labels else None
        return images, params, labels, errors

    def _readable(self, index: int, errors: list[str]) -> tuple[int, Any]:
        """The first readable image from `index` on, and its index; errors on the way are added."""
        for offset in range(len(self.split)):
            at = (index + offset) % len(self.split)
            # an image that failed before is not tried again
            if at in self._corrupt:
                continue
            try:
                return at, self.split[at]
            except DataError as error:
                if not self.split.corrupt.skip:
                    raise
                self._corrupt.add(at)
                errors.append(str(error))
        raise self.split.nothing_readable(errors)
