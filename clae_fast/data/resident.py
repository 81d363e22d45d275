"""Decodes the training images once, to bytes that stay on the device."""

from collections import deque
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from clae_fast._ragged import RaggedImages
from clae_fast.data.loaders import make_loader
from clae_fast.data.memory import readable
from clae_fast.data.pixels import pack, sides, to_bytes, unpack
from clae_fast.data.schedule import BatchSchedule
from clae_fast.data.split import Split
from clae_fast.errors import DataError

# how many images a worker decodes at a time
_CHUNK = 64
_NOTHING = np.empty((0, 0, 3), dtype=np.uint8)
# for so many samples at a time parameters are drawn, which takes about 5 KB each meanwhile
_DRAWN = 2**14


class Resident:
    """Batches of images that lie decoded on the device, with the parameters of their views.

    Where corrupt images are skipped, each is replaced by the next readable one.

    Args:
        split: The training images.
        schedule: Which images make up each batch.
        draw: Draws the tables of `augment_params` for all V views, with the run's settings.
        device: The device that the images stay on.
        workers: How many processes decode them, at most one for each core.
        labels: Whether batches have labels.
        bar: Whether a bar on stderr shows how far decoding is, if it takes a while.

    Raises:
        DataError: An image cannot be read; or no image can, where such images are skipped.
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
        bar: bool,
    ) -> None:
        self._schedule = schedule
        self._draw = draw
        pixels, sizes = _decode(split, device, workers=workers, bar=bar)
        decoded = sizes[:, 0] > 0  # [S]
        images = unpack(pixels, sizes[decoded])
        self._images = images.to(device)
        found = decoded.nonzero().flatten()
        # the place of each image, or that of the next readable one
        rows = torch.searchsorted(found, torch.arange(len(split))) % len(found)
        self._rows = rows.to(device)  # [S]
        self._labels = split.labels[decoded].to(device) if labels else None
        self.where = f"on {pixels.device}, {readable(len(pixels))}"

    def __iter__(self) -> Iterator[tuple[Tensor | RaggedImages, Tensor, Tensor, Tensor | None]]:
        """Yields all images, and for each batch parameters [V, n, 16], rows [n] and labels [n]."""
        n = self._schedule.batch_size // self._schedule.world
        for epoch, block in self._schedule.blocks(max(_DRAWN // n, 1)):
            ids = _to_device(torch.from_numpy(block).flatten(), self._rows.device)
            rows = self._rows[ids]
            height, width = sides(self._images, rows)
            params = self._draw(ids, epoch=epoch, height=height, width=width)
            for table, own in zip(params.split(n, dim=1), rows.split(n), strict=True):
                labels = None if self._labels is None else self._labels[own]
                yield self._images, table, own, labels


def _to_device(ids: Tensor, device: torch.device) -> Tensor:
    # a copy from memory that is not pinned would wait until the GPU has finished its work
    ids = ids.pin_memory() if device.type == "cuda" else ids
    return ids.to(device, non_blocking=True)


def _decode(
    split: Split, device: torch.device, *, workers: int, bar: bool
) -> tuple[Tensor, Tensor]:  # [bytes], [S, 2]
    """The pixels of all readable images, and the sizes of all images: 0 for an unreadable one."""
    chunks = _Chunks(split)
    loader = make_loader(chunks, workers=workers, batch_size=None)
    parts: deque[Tensor] = deque()
    sizes: list[Tensor] = []
    reasons: list[str] = []
    with tqdm(
        total=len(split), desc="decoding", unit="img", leave=False, delay=2, disable=not bar
    ) as done:
        for pixels, found, errors in loader:
            reasons += errors
            # copied, since a tensor from a worker keeps a file open
            parts.append(pixels.clone())
            sizes.append(found.clone())
            done.update(len(found))
    # done after the bar is closed, since a message would make it appear
    split.corrupt.add(reasons)
    total = sum(len(part) for part in parts)
    if not total:
        raise split.nothing_readable(reasons)
    whole = torch.empty(total, dtype=torch.uint8, device=device)
    end = total
    while parts:
        # each part is freed as soon as it is in its place
        part = parts.pop()
        whole[end - len(part) : end] = part
        end -= len(part)
    return whole, torch.cat(sizes)


class _Chunks(Dataset):
    """Runs of neighboring images: their pixels, their sizes, and the errors of skipped ones."""

    def __init__(self, split: Split) -> None:
        self.split = split

    def __len__(self) -> int:
        return -(-len(self.split) // _CHUNK)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor, list[str]]:
        images, errors = [], []
        for index in range(number * _CHUNK, min((number + 1) * _CHUNK, len(self.split))):
            try:
                images.append(to_bytes(self.split[index]))
            except DataError as error:
                if not self.split.corrupt.skip:
                    raise
                images.append(_NOTHING)
                errors.append(str(error))
        return *pack(images), errors
