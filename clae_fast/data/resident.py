"""Training images that are decoded once and stay on the device."""

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

# images that a worker decodes at a time
_CHUNK = 64
_NOTHING = np.empty((0, 0, 3), dtype=np.uint8)
# samples whose parameters are drawn at a time, which takes about 5 KB each meanwhile
_DRAWN = 2**14


class Resident:
    """Batches of images that lie decoded on the device, and how each is augmented.

    Where corrupt images are skipped, the next readable ones stand in for them.

    Args:
        split: the training images.
        schedule: which of them make up each batch.
        draw: the tables of `augment_params` with the run's settings, for V views.
        device: where the images stay.
        workers: processes that decode them, at most one a core.
        labels: whether batches have them.
        bar: whether to show on stderr how far decoding is, where that takes longer.

    Raises:
        DataError: an image cannot be read, or where such are skipped, none can.
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
        # the place of each image, or of the next one that could be read
        rows = torch.searchsorted(found, torch.arange(len(split))) % len(found)
        self._rows = rows.to(device)  # [S]
        self._labels = split.labels[decoded].to(device) if labels else None
        self.where = f"on {pixels.device}, {readable(len(pixels))}"

    def __iter__(self) -> Iterator[tuple[Tensor | RaggedImages, Tensor, Tensor, Tensor | None]]:
        """The images of all batches; parameters [V, n, 16], rows and labels [n] of each batch."""
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
    # a copy from pageable memory would wait for the GPU to finish all it has
    ids = ids.pin_memory() if device.type == "cuda" else ids
    return ids.to(device, non_blocking=True)


def _decode(
    split: Split, device: torch.device, *, workers: int, bar: bool
) -> tuple[Tensor, Tensor]:  # [bytes], [S, 2]
    """The pixels of all readable images, and the sizes of all: those of the others are 0.

    With `bar` it shows on stderr how far it is, where that takes longer.
    """
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
            # a copy, since what a worker sends keeps a file open
            parts.append(pixels.clone())
            sizes.append(found.clone())
            done.update(len(found))
    # not within the bar, which would show at once
    split.corrupt.add(reasons)
    total = sum(len(part) for part in parts)
    if not total:
        raise split.nothing_readable(reasons)
    whole = torch.empty(total, dtype=torch.uint8, device=device)
    end = total
    while parts:
        # each part is freed when it is in its place
        part = parts.pop()
        whole[end - len(part) : end] = part
        end -= len(part)
    return whole, torch.cat(sizes)


class _Chunks(Dataset):
    """Runs of neighbouring images: pixels, sizes, and errors of those that are skipped."""

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
