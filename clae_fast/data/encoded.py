"""Decodes encoded images when they are asked for. Every kind of pixel becomes RGB bytes."""

import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from clae_fast.errors import DataError

# PIL looks at contents, not at names: without a list, PostScript would start Ghostscript
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
# EXIF's number of the orientation; from 5 on it exchanges height and width
_ORIENTATION = 0x0112
# the longest side of an image that `augment_params` can draw crops of
_LARGEST = 2**15


def decode(file: IO[bytes] | Path, name: str) -> Image.Image:
    """Decodes an image to RGB bytes. Transparency is dropped, and 16-bit gray is scaled to 8 bits.

    Args:
        file: The encoded image.
        name: What an error calls it.

    Raises:
        DataError: It cannot be read, or is not a whole image.
    """
    with _opened(file, name) as image:
        image = to_rgb(image)
    if max(image.size) > _LARGEST:
        raise DataError(f"{name}: sides must be at most {_LARGEST} pixels, got {image.size}")
    return image


def dimensions(file: IO[bytes] | Path, name: str) -> tuple[int, int]:
    """Reads the height and width of an image from its header.

    Raises:
        DataError: It cannot be read, or is no image.
    """
    with _opened(file, name) as image:
        upright = image.getexif().get(_ORIENTATION, 1) < 5
        return (image.height, image.width) if upright else (image.width, image.height)


@contextmanager
def _opened(file: IO[bytes] | Path, name: str) -> Iterator[Image.Image]:
    """Opens an image and reads its header; every failure becomes a DataError that names it."""
    try:
        if isinstance(file, Path) and not stat.S_ISREG(file.stat().st_mode):
            raise DataError(f"{name}: not a regular file")
        with Image.open(file, formats=_FORMATS) as image:
            yield image
    except UnidentifiedImageError as error:
        raise DataError(f"{name}: damaged image (of no known format)") from error
    except OSError as error:
        # an OSError of PIL's own has no number
        if error.errno is None:
            raise DataError(f"{name}: damaged image ({error})") from error
        raise DataError(f"{name}: {error.strerror}") from error
    except (MemoryError, DataError):
        raise
    except Exception as error:
        # decoders can raise anything on damaged bytes
        raise DataError(f"{name}: damaged image ({error})") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts an image to RGB bytes, turned upright as its EXIF data says.

    Transparency is dropped, and 16-bit gray is scaled to 8 bits.
    """
    if image.getexif().get(_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        # PIL would clip 16-bit values at 255
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    elif "transparency" in image.info:
        # PIL would warn about palettes with transparency
        image = image.convert("RGBA")
    return image.convert("RGB")


@dataclass(frozen=True)
class Files:
    """Image files below a folder.

    Attributes:
        root: The folder.
        names: Paths relative to it, in one array of bytes. Each loader process would get copies of
            Python objects, since counting references writes to them.
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
        """A digest of the files' names and sizes."""
        digest = hashlib.sha256()
        root = os.fsencode(self.root)
        for name in self.names[np.asarray(rows, dtype=np.int64)].tolist():
            try:
                size = os.stat(os.path.join(root, name)).st_size
            except OSError:
                size = -1
            digest.update(b"%s %d\n" % (name, size))
        return digest.digest()
