"""Labelled image sets, as a train and a test split that decode one image at a time."""

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import nn

from clae_fast.data.split import Arrays, DataError, Split, Splits

DATASETS = ("digits", "parquet", "cifar10", "cifar100")


def load(
    name: str,
    *,
    data_dir: str | Path | None = None,
    limit: int | None = None,
    download: bool = False,
) -> Splits:
    """Returns the splits of a data set: to train on, labelled, and to test on.

    Args:
        name: "digits" (scikit-learn's, embedded), "parquet" (train*.parquet and test*.parquet in
            `data_dir`, the Hugging Face image layout), "cifar10" or "cifar100" (torchvision).
        data_dir: folder of the files; CIFAR defaults to ./data.
        limit: keep the first `limit` images of each split.
        download: fetch CIFAR into `data_dir` when it is not there.

    Raises:
        DataError: files are missing, damaged or not laid out as expected.
        ValueError: an unknown name, or a parquet set without `data_dir`.
    """
    if name == "digits":
        train, test = _digits()
    elif name == "parquet":
        if data_dir is None:
            raise ValueError("data_dir is required for the parquet data set")
        train, test = (_parquet(Path(data_dir), split, limit) for split in ("train", "test"))
    elif name in ("cifar10", "cifar100"):
        root = Path(data_dir or "data")
        train, test = (_cifar(name, root, train=t, download=download) for t in (True, False))
    else:
        raise ValueError(f"dataset must be one of {', '.join(DATASETS)}, got {name!r}")
    train, test = (split.select(slice(limit)) for split in (train, test))
    return Splits(train, train, test)


def _digits() -> tuple[Split, Split]:
    """Handwritten digits, 1,797 grey 8x8 images: 1,437 to train on and 360 to test, stratified."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    grey = torch.from_numpy(digits.images).float().unsqueeze(1) / 16  # [N, 1, 8, 8]
    grey = nn.functional.interpolate(grey, size=(16, 16), mode="bilinear")
    images = grey.expand(-1, 3, -1, -1).contiguous()  # [N, 3, 16, 16]
    whole = Split.whole(Arrays(images), digits.target, [str(name) for name in digits.target_names])
    rows = train_test_split(
        range(len(whole)), test_size=0.2, stratify=digits.target, random_state=0
    )
    train, test = (whole.select(row) for row in rows)
    return train, test


def _cifar(name: str, root: Path, *, train: bool, download: bool) -> Split:
    from torchvision import datasets

    cifar = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    try:
        data = cifar(str(root), train=train, download=download)
    except OSError as error:
        raise DataError(f"cannot fetch {name} into {root}: {error}") from error
    except RuntimeError as error:
        raise DataError(
            f"{name} is not in {root} (or is damaged): unpack it there, or add --download"
        ) from error
    return Split.whole(Arrays(data.data), data.targets, data.classes)


class _Encoded(NamedTuple):
    data: bytes
    file: Path
    row: int


@dataclass(frozen=True)
class _Shards:
    records: list[_Encoded]

    def __len__(self) -> int:
        return len(self.records)

    def open(self, row: int) -> Image.Image:
        image = self.records[row]
        try:
            return Image.open(io.BytesIO(image.data)).convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"{image.file}, row {image.row}: damaged image ({error})") from error

    def digest(self, rows: Sequence[int]) -> bytes:
        sizes = [len(self.records[row].data) for row in rows]
        return hashlib.sha256(repr(sizes).encode()).digest()


def _parquet(folder: Path, name: str, limit: int | None) -> Split:
    """Encoded images of `name`.parquet, or of the shards `name`*.parquet in the order of names."""
    if not folder.is_dir():
        raise DataError(f"data_dir: there is no folder {folder}")
    whole = folder / f"{name}.parquet"
    files = [whole] if whole.is_file() else sorted(folder.glob(f"{name}*.parquet"))
    if not files:
        raise DataError(f"data_dir: {folder} holds no {name}.parquet and no {name}*.parquet shards")
    images: list[_Encoded] = []
    labels: list[int] = []
    for file in files:
        wanted = None if limit is None else limit - len(images)
        if wanted == 0:
            break
        _read_parquet(file, wanted, images, labels)
    if not images:
        raise DataError(f"{files[0]}: no rows")
    return Split.whole(_Shards(images), labels)


def _read_parquet(
    file: Path, wanted: int | None, images: list[_Encoded], labels: list[int]
) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file) as table:
            columns = table.schema_arrow.names
            column = next((name for name in ("img", "image") if name in columns), None)
            if column is None or "label" not in columns:
                raise DataError(
                    f"{file}: needs a column img (or image) and a column label, "
                    f"has {', '.join(columns)}"
                )
            row = 0
            for batch in table.iter_batches(batch_size=1024, columns=[column, "label"]):
                for image, label in zip(
                    batch.column(column).to_pylist(), batch.column("label").to_pylist(), strict=True
                ):
                    if row == wanted:
                        return
                    data = image.get("bytes") if isinstance(image, dict) else None
                    if data is None:
                        raise DataError(f"{file}, row {row}: {column} holds no bytes")
                    if not isinstance(label, int) or label < 0:
                        raise DataError(
                            f"{file}, row {row}: label must be a class number, got {label!r}"
                        )
                    images.append(_Encoded(data, file, row))
                    labels.append(label)
                    row += 1
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: not a readable parquet file ({error})") from error
