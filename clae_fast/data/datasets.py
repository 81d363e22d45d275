"""Loads data sets by name."""

from dataclasses import replace
from pathlib import Path

import torch

from clae_fast.data import folders, hub, published, shards
from clae_fast.data.corrupt import CorruptImages
from clae_fast.data.split import Split, Splits
from clae_fast.errors import DataError

DATASETS = (
    "digits", "cifar10", "cifar100", "stl10", "tiny_imagenet", "imagenet100", "folder", "parquet",
    "hf/NAME",
)  # fmt: skip
_NEED_FOLDER = ("imagenet100", "folder", "parquet")


def load(
    name: str,
    *,
    data_dir: str | Path | None = None,
    limit: int | None = None,
    download: bool = False,
    on_corrupt: str = "fail",
) -> Splits:
    """Loads the splits of a data set: the training images, those with labels, and the test images.

    Args:
        name: Which data set:
            "digits" comes with scikit-learn.
            "cifar10", "cifar100", "stl10" and "tiny_imagenet" are unpacked in `data_dir`.
            "imagenet100" is `data_dir`/train/WNID and val/WNID, 100 classes or all of ImageNet.
            "folder" is `data_dir`/train/CLASS, and test/CLASS or val/CLASS.
            "parquet" is train*.parquet and test*.parquet in `data_dir`, as Hugging Face lays them
            out.
            "hf/NAME" is a set of the Hugging Face hub, which the package `datasets` downloads.
        data_dir: Folder of the files. Sets that can be downloaded are in ./data by default.
        limit: How many images of each split are used; None for all. They are the first ones. If
            images are stored class by class, they are evenly spaced ones instead.
        download: Whether a published set is downloaded into `data_dir` when it is not there.
        on_corrupt: What happens to an unreadable image, as in `CorruptImages`.

    Raises:
        DataError: Files are missing, damaged or not laid out as expected.
        ValueError: The name is unknown, or the set needs `data_dir` and none is given.
    """
    require_dataset(name, data_dir)
    root = Path(data_dir or "data")
    if name == "digits":
        splits = published.digits()
    elif name in ("cifar10", "cifar100"):
        splits = published.cifar(name, root, download=download)
    elif name == "stl10":
        splits = published.stl10(root, download=download)
    elif name == "tiny_imagenet":
        splits = published.tiny_imagenet(root, download=download)
    elif name == "imagenet100":
        splits = folders.imagenet100(root)
    elif name == "folder":
        splits = folders.image_folder(root)
    elif name == "parquet":
        splits = shards.parquet(root)
    else:
        splits = hub.hub(name.removeprefix("hf/"), Path(data_dir) if data_dir else None)
    corrupt = CorruptImages(on_corrupt)
    train = _limited(splits.train, limit, corrupt)
    same = splits.labeled is splits.train
    labeled = train if same else _limited(splits.labeled, limit, corrupt)
    if len(labeled.labels.unique()) < 2:
        raise DataError(f"{name}: all labeled images are of one class, evaluation needs two")
    return Splits(train, labeled, _limited(splits.test, limit, corrupt))


def require_dataset(name: str, data_dir: str | Path | None) -> None:
    """Raises ValueError for a name that `load` refuses before it looks for any file."""
    by_name = name.startswith("hf/") and name != "hf/"
    if not by_name and name not in DATASETS[:-1]:
        raise ValueError(f"dataset must be one of {', '.join(DATASETS)}, got {name!r}")
    if name in _NEED_FOLDER and data_dir is None:
        raise ValueError(f"data_dir is required for the {name} data set")


def _limited(split: Split, limit: int | None, corrupt: CorruptImages) -> Split:
    split = replace(split, corrupt=corrupt)
    if limit is None or limit >= len(split):
        return split
    by_class = bool((split.labels.diff() >= 0).all())
    return split.select(torch.arange(limit) * len(split) // limit if by_class else slice(limit))
