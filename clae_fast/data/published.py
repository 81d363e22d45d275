"""Published data sets: scikit-learn's digits, CIFAR and STL-10 by torchvision, Tiny ImageNet."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torchvision import datasets
from torchvision.datasets.utils import download_and_extract_archive

from clae_fast.data.encoded import Files
from clae_fast.data.folders import images_of, require_folder
from clae_fast.data.split import Arrays, Split, Splits
from clae_fast.errors import DataError

_TINY_IMAGENET = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
_TINY_IMAGENET_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"


def digits() -> Splits:
    """Handwritten digits, 1,797 gray 8x8 images: 1,437 to train on, 360 to test on."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    gray = torch.from_numpy(digits.images).float().unsqueeze(1) / 16  # [N, 1, 8, 8]
    gray = nn.functional.interpolate(gray, size=(16, 16), mode="bilinear")
    images = gray.expand(-1, 3, -1, -1).contiguous()  # [N, 3, 16, 16]
    whole = Split.whole(Arrays(images), digits.target, [str(name) for name in digits.target_names])
    rows = train_test_split(
        range(len(whole)), test_size=0.2, stratify=digits.target, random_state=0
    )
    train, test = (whole.select(row) for row in rows)
    return Splits(train, train, test)


def cifar(name: str, root: Path, *, download: bool) -> Splits:
    """CIFAR-10 or CIFAR-100: 50,000 images of 32x32 to train on and 10,000 to test on."""
    kind: Any = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100

    def split(train: bool) -> Split:
        with _errors(name, root, kind.url):
            found = kind(str(root), train=train, download=download)
        return Split.whole(Arrays(found.data), found.targets, found.classes)

    train = split(True)
    return Splits(train, train, split(False))


def stl10(root: Path, *, download: bool) -> Splits:
    """STL-10, 96x96: 100,000 images without and 5,000 with labels to train on, 8,000 to test on."""

    def split(name: str) -> Split:
        with _errors("stl10", root, datasets.STL10.url):
            found: Any = datasets.STL10(str(root), split=name, download=download)
        pixels = found.data.transpose(0, 2, 3, 1)  # [N, 96, 96, 3]
        return Split.whole(Arrays(pixels), found.labels, found.classes)

    train = split("train+unlabeled")
    return Splits(train, train.select(train.labels >= 0), split("test"))


def tiny_imagenet(root: Path, *, download: bool) -> Splits:
    """Tiny ImageNet, 200 classes of 64x64: 100,000 images to train on, val to test on.

    The labels of its own test set are not published.
    """
    folder = root / "tiny-imagenet-200"
    if not folder.is_dir() and (root / "wnids.txt").is_file():
        folder = root
    if not folder.is_dir():
        with _errors("tiny_imagenet", root, _TINY_IMAGENET):
            if not download:
                raise RuntimeError
            root.mkdir(parents=True, exist_ok=True)
            # it is unpacked elsewhere and then moved, so that the folder is whole or absent
            with tempfile.TemporaryDirectory(dir=root) as scratch:
                download_and_extract_archive(
                    _TINY_IMAGENET, str(root), extract_root=scratch, md5=_TINY_IMAGENET_MD5
                )
                os.replace(Path(scratch, folder.name), folder)
    require_folder(folder / "train")
    wnids = sorted(_read(folder / "wnids.txt").split())
    words = dict(line.partition("\t")[::2] for line in _read(folder / "words.txt").splitlines())
    names = [words.get(wnid, wnid) for wnid in wnids]
    train = images_of(folder / "train", wnids)
    train = Split.whole(train.images, train.labels, names)
    annotations = folder / "val" / "val_annotations.txt"
    files, labels = [], []
    for number, line in enumerate(_read(annotations).splitlines(), 1):
        file, _, rest = line.partition("\t")
        wnid = rest.partition("\t")[0]
        if wnid not in wnids:
            raise DataError(f"{annotations}, line {number}: {wnid!r} is not in wnids.txt")
        files.append(os.fsencode(file))
        labels.append(wnids.index(wnid))
    if not files:
        raise DataError(f"{annotations} is empty")
    val = Files(folder / "val" / "images", np.array(files))
    return Splits(train, train, Split.whole(val, labels, names))


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}") from error


@contextmanager
def _errors(name: str, root: Path, url: str) -> Iterator[None]:
    """Turns torchvision's errors into one line that says what to do."""
    try:
        yield
    except (OSError, HTTPException) as error:
        raise DataError(
            f"cannot fetch {name} into {root} ({error}): where there is a network, download {url}, "
            f"and unpack it in {root}"
        ) from error
    except RuntimeError as error:
        raise DataError(
            f"{name} is not in {root}, or damaged: unpack {url} there, or add --download"
        ) from error
