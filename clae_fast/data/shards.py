"""Encoded images in Parquet shards, laid out as Hugging Face's image data sets are."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clae_fast.data.encoded import decode, dimensions
from clae_fast.data.split import Split, Splits
from clae_fast.errors import DataError

# a split of at most so many bytes is kept in memory; of a larger one, single row groups are read
_IN_MEMORY = 2**31
# row groups above this size are not read one at a time: that would take longer than training
_LARGE_GROUP = 2**26
# a shard ends with its schema and the places and statistics of its columns, within so many bytes
_FOOTER = 2**16


def parquet(folder: Path) -> Splits:
    """The images of train.parquet and test.parquet, or of shards train*.parquet, test*.parquet."""
    if not folder.is_dir():
        raise DataError(f"data_dir: there is no folder {folder}")
    train, test = (_split(folder, name) for name in ("train", "test"))
    return Splits(train, train, test)


@dataclass(frozen=True)
class _Group:
    """Row group `number` of the shard `file`; its rows begin at `start`, images are in `column`."""

    file: Path
    number: int
    column: str
    start: int

    def read(self) -> Any:
        """The encoded images, a pyarrow.ChunkedArray of records."""
        from pyarrow.parquet import ParquetFile

        with _readable(self.file), ParquetFile(self.file) as shard:
            # several worker processes read at once already
            table = shard.read_row_group(
                self.number, columns=[f"{self.column}.bytes"], use_threads=False
            )
        return table.column(self.column)


# evaluation reads in order, so that keeping the last group is enough
_last = lru_cache(maxsize=1)(_Group.read)


@dataclass(frozen=True)
class Shards:
    """Records of encoded images.

    Attributes:
        groups: The row groups.
        starts: The number of the first image in each group, [G].
        total: How many images there are in all.
        records: The groups' contents, where they are kept in memory.
    """

    groups: tuple[_Group, ...]
    starts: np.ndarray
    total: int
    records: tuple[Any, ...] | None

    def __len__(self) -> int:
        return self.total

    def open(self, row: int) -> Image.Image:
        """Image `row` in RGB."""
        return decode(*self._file(row))

    def size(self, row: int) -> tuple[int, int]:
        """Height and width of image `row`."""
        return dimensions(*self._file(row))

    def _file(self, row: int) -> tuple[BytesIO, str]:
        """Encoded image `row`, and what an error calls it."""
        at = int(np.searchsorted(self.starts, row, side="right")) - 1
        group, offset = self.groups[at], row - int(self.starts[at])
        name = f"{group.file}, row {group.start + offset}"
        records = self.records[at] if self.records is not None else _last(group)
        record = records[offset].as_py()
        if record is None or record["bytes"] is None:
            raise DataError(f"{name}: {group.column} holds no bytes")
        return BytesIO(record["bytes"]), name

    def digest(self, rows: Sequence[int]) -> bytes:
        """A digest of the shards' names, sizes and footers."""
        digest = hashlib.sha256(np.asarray(rows).tobytes())
        for file in dict.fromkeys(group.file for group in self.groups):
            size = file.stat().st_size
            digest.update(f"{file.name} {size}\n".encode())
            with file.open("rb") as shard:
                shard.seek(max(size - _FOOTER, 0))
                digest.update(shard.read())
        return digest.digest()


def _split(folder: Path, name: str) -> Split:
    single = folder / f"{name}.parquet"
    files = [single] if single.is_file() else sorted(folder.glob(f"{name}*.parquet"))
    if not files:
        raise DataError(f"data_dir: {folder} holds no {name}.parquet and no {name}*.parquet shards")
    groups: list[_Group] = []
    labels: list[int] = []
    starts: list[int] = []
    sizes: list[int] = []
    for file in files:
        for group, size, found in _groups(file):
            groups.append(group)
            sizes.append(size)
            starts.append(len(labels))
            labels += found
    if not labels:
        raise DataError(f"{files[0]}: no rows")
    keep = sum(sizes) <= _IN_MEMORY or max(sizes) > _LARGE_GROUP
    records = tuple(group.read() for group in groups) if keep else None
    images = Shards(tuple(groups), np.array(starts), len(labels), records)
    return Split.whole(images, labels)


def _groups(file: Path) -> Iterator[tuple[_Group, int, list[int]]]:
    """The row groups of a shard, the bytes that their images take, and their labels."""
    from pyarrow import types
    from pyarrow.parquet import ParquetFile

    with _readable(file), ParquetFile(file) as shard:
        schema = shard.schema_arrow
        column = next((name for name in ("img", "image") if name in schema.names), None)
        if column is None or "label" not in schema.names:
            raise DataError(
                f"{file}: needs a column img (or image) and a column label, "
                f"has {', '.join(schema.names)}"
            )
        kind = schema.field(column).type
        empty = shard.metadata.num_rows == 0
        if not empty and not (types.is_struct(kind) and kind.get_field_index("bytes") >= 0):
            raise DataError(f"{file}: {column} must hold records with bytes, holds {kind}")
        start = 0
        for number in range(shard.num_row_groups):
            labels = shard.read_row_group(number, columns=["label"]).column("label").to_pylist()
            for row, label in enumerate(labels, start):
                if not isinstance(label, int) or label < 0:
                    raise DataError(
                        f"{file}, row {row}: label must be a class number, got {label!r}"
                    )
            chunks = shard.metadata.row_group(number)
            size = sum(
                chunks.column(i).total_uncompressed_size
                for i in range(chunks.num_columns)
                if chunks.column(i).path_in_schema == f"{column}.bytes"
            )
            yield _Group(file, number, column, start), size, labels
            start += len(labels)


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    from pyarrow import ArrowException

    try:
        yield
    except (ArrowException, OSError) as error:
        raise DataError(f"{file}: not a readable parquet file ({error})") from error
