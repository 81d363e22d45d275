"""Encoded images, decoded when they are asked for: any kind of pixel becomes RGB bytes."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, UnidentifiedImageError

from clae_fast.errors import DataError

# what `augment_params` draws crops of
_LARGEST = 2**15


def decode(file: IO[bytes] | Path, name: str) -> Image.Image:
    """The image as RGB bytes; transparency is dropped, 16-bit grey scaled.

    Args:
        file: the encoded image.
        name: what an error calls it.

    Raises:
        DataError: it cannot be read, or is no whole image.
    """
    with _opened(file, name) as image:
        image = to_rgb(image)
    if max(image.size) > _LARGEST:
        raise DataError(f"{name}: sides must be at most {_LARGEST} pixels, got {image.size}")
    return image


def dimensions(file: IO[bytes] | Path, name: str) -> tuple[int, int]:
    """Height and width of the image, from its header.

    Raises:
        DataError: it cannot be read, or is no image.
    """
    with _opened(file, name) as image:
        return image.height, image.width


@contextmanager
def _opened(file: IO[bytes] | Path, name: str) -> Iterator[Image.Image]:
    """The image, of which nothing but the header has been read; names what goes wrong with it."""
    try:
        with Image.open(file) as image:
            yield image
    except UnidentifiedImageError as error:
        raise DataError(f"{name}: damaged image (of no known format)") from error
    except OSError as error:
        # PIL's own have no number
        if error.errno is None:
            raise DataError(f"{name}: damaged image ({error})") from error
        raise DataError(f"{name}: {error.strerror}") from error
    except MemoryError:
        raise
    except Exception as error:
        # decoders raise anything on bytes that are not what they claim to be
        raise DataError(f"{name}: damaged image ({error})") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """The image as RGB bytes; transparency is dropped, 16-bit grey scaled."""
    if image.mode.startswith("I"):
        # PIL would clip 16 bits at 255
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    elif "transparency" in image.info:
        # or PIL warns of what it does to palettes
        image = image.convert("RGBA")
    return image.convert("RGB")


@dataclass(frozen=True)
class Files:
    """Image files below a folder.

    Attributes:
        root: the folder.
        names: paths relative to it, as fixed-width bytes: a million take no Python objects, which
            worker processes would copy by counting references.
    """

    root: Path
    names: np.ndarray  # [M]

    @classmethod
    def below(cls, root: Path, paths: Sequence[str]) -> "Files":
        """The files at `paths`, which begin with `root`."""
        prefix = len(os.path.join(root, ""))
        return cls(root, np.array([os.fsencode(path[prefix:]) for path in paths]))

    def __len__(self) -> int:
        return len(self.names)

    def open(self, row: int) -> Image.Image:
        """Image `row` in RGB."""
        path = self._path(row)
        return decode(path, str(path))

    def size(self, row: int) -> tuple[int, int]:
        """Height and width of image `row`."""
        path = self._path(row)
        return dimensions(path, str(path))

    def _path(self, row: int) -> Path:
        return self.root / os.fsdecode(self.names[row])

    def digest(self, rows: Sequence[int]) -> bytes:
        """Of names and sizes."""
        digest = hashlib.sha256()
        root = os.fsencode(self.root)
        for name in self.names[np.asarray(rows, dtype=np.int64)].tolist():
            try:
                size = os.stat(os.path.join(root, name)).st_size
            except OSError:
                size = -1
            digest.update(b"%s %d\n" % (name, size))
        return digest.digest()
