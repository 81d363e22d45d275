"""Data sets of the Hugging Face hub, or of a folder in its layout, by the package `datasets`."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clae_fast.data.encoded import decode, dimensions
from clae_fast.data.split import Split, Splits
from clae_fast.errors import DataError


@dataclass(frozen=True)
class Table:
    """The encoded images of a `datasets.Dataset`, which memory-maps them.

    Attributes:
        name: What an error calls the set.
        records: The data set.
        column: The column that holds the images.
    """

    name: str
    records: Any
    column: str

    def __len__(self) -> int:
        return len(self.records)

    def open(self, row: int) -> Image.Image:
        """Image `row` in RGB."""
        return decode(*self._file(row))

    def size(self, row: int) -> tuple[int, int]:
        """Height and width of image `row`."""
        return dimensions(*self._file(row))

    def _file(self, row: int) -> tuple[BytesIO | Path, str]:
        """Encoded image `row`, and what an error calls it."""
        name = f"{self.name}, row {row}"
        record = self.records[row][self.column]
        if record is None:
            raise DataError(f"{name}: {self.column} is empty")
        if record["bytes"] is not None:
            return BytesIO(record["bytes"]), name
        return Path(record["path"]), f"{name}, {record['path']}"

    def digest(self, rows: Sequence[int]) -> bytes:
        """A digest of the sizes that `datasets` knows."""
        info = self.records.info
        digest = hashlib.sha256(np.asarray(rows).tobytes())
        digest.update(f"{info.dataset_size} {self.records.split} {len(self)}".encode())
        return digest.digest()


def hub(name: str, cache: Path | None) -> Splits:
    """Loads the split train, and test or, where that has no labels, validation.

    Args:
        name: The data set's name on the hub, or a folder.
        cache: The folder in which `datasets` keeps downloads; its own by default.
    """
    try:
        import datasets
        import huggingface_hub
    except ImportError as error:
        raise DataError(
            f"hf/{name} needs the package datasets: pip install 'clae_fast[hf]'"
        ) from error
    # it would announce each attempt; the last one becomes the error below
    huggingface_hub.logging.set_verbosity_error()
    try:
        found = datasets.load_dataset(name, cache_dir=cache and str(cache))
    except Exception as error:
        # errors come from the package, from the hub and from readers of a dozen formats
        reason = str(error).strip().partition("\n")[0]
        raise DataError(
            f"cannot load hf/{name} ({reason}): check the name and the network, or name a folder "
            f"that holds a copy, hf/FOLDER"
        ) from error
    if "train" not in found:
        raise DataError(f"hf/{name} has no split train, but {', '.join(found)}")
    train = _split(name, found["train"])
    for part in ("test", "validation", "valid", "val"):
        if part in found:
            test = _split(name, found[part])
            # the test set of a challenge has no public labels
            if int(test.labels.min()) >= 0:
                known = train.labels >= 0
                return Splits(train, train if known.all() else train.select(known), test)
    raise DataError(
        f"hf/{name} has no split test or validation with labels, but {', '.join(found)}"
    )


def _split(name: str, records: Any) -> Split:
    from datasets import ClassLabel, Image

    features = records.features
    images = [key for key, kind in features.items() if isinstance(kind, Image)]
    labels = [key for key, kind in features.items() if isinstance(kind, ClassLabel)]
    labels += [key for key in ("label", "labels") if key in features and key not in labels]
    if not images or not labels:
        raise DataError(
            f"hf/{name} needs a column of images and one of class labels, "
            f"has {', '.join(f'{key}: {kind}' for key, kind in features.items())}"
        )
    label = next((key for key in ("label", "labels", "fine_label") if key in labels), labels[0])
    numbers = np.asarray(records.with_format("numpy")[label][:])
    if not len(numbers):
        raise DataError(f"hf/{name}: split {records.split} is empty")
    if not np.issubdtype(numbers.dtype, np.integer):
        raise DataError(f"hf/{name}: {label} must hold class numbers, holds {features[label]}")
    images_only = records.select_columns([images[0]]).cast_column(images[0], Image(decode=False))
    classes = getattr(features[label], "names", None)
    return Split.whole(Table(f"hf/{name}", images_only, images[0]), numbers, classes)
