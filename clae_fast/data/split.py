"""A split of a data set: images that open one at a time, their labels, and their digest."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike
from PIL import Image
from torch import Tensor

from clae_fast.data.corrupt import CorruptImages
from clae_fast.errors import DataError


class Images(Protocol):
    """Stored images. The object that opens them can be pickled and works in any process."""

    def __len__(self) -> int: ...

    def open(self, row: int) -> Any:
        """Image `row` as a PIL image in RGB or a float tensor [3, H, W].

        Raises:
            DataError: It cannot be read; the message names it.
        """

    def size(self, row: int) -> tuple[int, int]:
        """Height and width of image `row`, without decoding it. It raises as `open` does."""

    def digest(self, rows: Sequence[int]) -> bytes:
        """Bytes that are cheap to compute and change with the stored images `rows`."""


@dataclass(frozen=True)
class Split:
    """Images with their labels, chosen from the images that are stored.

    Attributes:
        images: The stored images.
        labels: Class numbers [N], int64, from 0; -1 for an image without a label.
        rows: The numbers of the stored images that belong to the split, [N].
        classes: Names of the classes by number, if they are known.
        corrupt: The unreadable images found so far, in any split of the data set.
    """

    images: Images
    labels: Tensor  # [N]
    rows: Tensor  # [N]
    classes: tuple[str, ...] | None = None
    corrupt: CorruptImages = field(default_factory=CorruptImages, compare=False)

    @classmethod
    def whole(
        cls, images: Images, labels: ArrayLike, classes: Sequence[str] | None = None
    ) -> "Split":
        """All of `images`."""
        labels = torch.as_tensor(np.asarray(labels, dtype=np.int64))
        return cls(images, labels, torch.arange(len(images)), tuple(classes) if classes else None)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.images.open(int(self.rows[index]))

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of an image, without decoding it."""
        return self.images.size(int(self.rows[index]))

    def select(self, indices: Any) -> "Split":
        """The part of the split at `indices`, which may be anything that indexes a tensor."""
        return replace(self, labels=self.labels[indices], rows=self.rows[indices])

    def evenly(self, count: int) -> "Split":
        """At most `count` images, evenly spaced."""
        count = min(count, len(self))
        return self.select(torch.arange(count) * len(self) // count)

    def nothing_readable(self, errors: Sequence[str] = ()) -> DataError:
        """The error that no image can be read, with the first reason."""
        return DataError("; ".join([f"none of the {len(self)} images can be read", *errors[:1]]))

    def fingerprint(self) -> str:
        """A digest of images and labels that does not depend on where they are stored.

        For encoded images it uses names and sizes, because reading the contents takes too long.
        """
        digest = hashlib.sha256(self.labels.numpy().tobytes())
        digest.update(self.images.digest(self.rows.tolist()))
        return digest.hexdigest()


class Splits(NamedTuple):
    """The splits of a data set by their use.

    Attributes:
        train: The images that contrastive training reads.
        labeled: The training images with labels, which evaluation uses. In most sets, all have
            labels.
        test: The test images, which no training touches.
    """

    train: Split
    labeled: Split
    test: Split


def hold_out(split: Split, size: int, seed: int) -> tuple[Split, Split]:
    """Splits off a validation part with the same share of every class, to within one image.

    Args:
        split: Labeled images.
        size: How many images are held out.
        seed: Decides which ones.

    Returns:
        The rest and the held-out part, each in the order of `split`.

    Raises:
        ValueError: One of the two parts would be empty.
    """
    held = stratified(split.labels, size, seed)
    return split.select(~held), split.select(held)


def stratified(labels: Tensor, size: int, seed: int) -> Tensor:  # [N] -> [N]
    """Marks `size` of the images, the same share of every class to within one image.

    Args:
        labels: Classes of the images.
        size: How many images are marked.
        seed: Decides which ones.

    Returns:
        True for each image that is marked.

    Raises:
        ValueError: No image or every image would be marked.
    """
    total = len(labels)
    if not 0 < size < total:
        raise ValueError(f"size must be from 1 to {total - 1}, got {size}")
    order = np.random.default_rng(seed).permutation(total)
    order = order[np.argsort(labels.numpy()[order], kind="stable")]
    # every (total / size)-th image in an order by class, which is shuffled within each class
    held = np.zeros(total, dtype=bool)
    held[order[(2 * np.arange(size) + 1) * total // (2 * size)]] = True
    return torch.from_numpy(held)


@dataclass(frozen=True)
class Arrays:
    """Decoded images in memory: a float tensor [N, 3, H, W], or bytes [N, H, W, 3]."""

    pixels: Tensor | np.ndarray

    def __len__(self) -> int:
        return len(self.pixels)

    def open(self, row: int) -> Any:
        """Image `row`: a tensor, or a PIL image of bytes."""
        image = self.pixels[row]
        return image if isinstance(image, Tensor) else Image.fromarray(image)

    def size(self, row: int) -> tuple[int, int]:
        """Height and width of image `row`."""
        height, width = self.pixels.shape[2 if isinstance(self.pixels, Tensor) else 1 :][:2]
        return height, width

    def digest(self, rows: Sequence[int]) -> bytes:
        """A digest of the pixels themselves."""
        digest = hashlib.sha256()
        for row in rows:
            digest.update(np.asarray(self.pixels[row]).tobytes())
        return digest.digest()
