"""Data sets with a folder of image files for each class, ImageNet-100 among them."""

import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from clae_fast.data.encoded import Files
from clae_fast.data.split import Split, Splits
from clae_fast.errors import DataError


def image_folder(root: Path) -> Splits:
    """`root`/train and `root`/test (or val), with a folder of images for each class."""
    classes = class_folders(root / "train")
    train, test = images_of(root / "train", classes), _test_folder(root)
    unknown = sorted(set(_folders(test)) - set(classes))
    if unknown:
        raise DataError(f"{test / unknown[0]}: {root / 'train'} has no such class")
    return Splits(train, train, images_of(test, classes, of_every=False))


def imagenet100(root: Path) -> Splits:
    """100 classes of ImageNet, from `root`/train and `root`/val.

    If `root`/train has 100 folders, these are the classes. Otherwise `root`/imagenet100.txt lists
    them. Without that file they are those of Tian et al., "Contrastive multiview coding", ECCV
    2020, which most papers use.
    """
    classes = class_folders(root / "train")
    if len(classes) != 100:
        own = root / "imagenet100.txt"
        file = own if own.is_file() else resources.files(__package__) / "imagenet100.txt"
        wanted = sorted(set(file.read_text().split()))
        missing = sorted(set(wanted) - set(classes))
        if missing:
            raise DataError(
                f"{root / 'train'} has {len(classes)} classes and lacks {len(missing)} of the "
                f"{len(wanted)} in {file.name}, such as {missing[0]}"
            )
        classes = wanted
    train = images_of(root / "train", classes)
    require_folder(root / "val")
    return Splits(train, train, images_of(root / "val", classes))


def image_files(folder: Path) -> Files:
    """All image files below `folder`, sorted by their paths.

    Raises:
        DataError: There is no image, or a folder may not be read.
    """

    def fail(error: OSError) -> None:
        raise DataError(f"{error.filename}: {error.strerror}")

    paths = sorted(
        os.path.join(parent, name)
        for parent, _, names in os.walk(folder, onerror=fail, followlinks=True)
        for name in names
        if name.lower().endswith(IMG_EXTENSIONS)
    )
    if not paths:
        raise DataError(f"{folder} holds no image ({', '.join(IMG_EXTENSIONS)})")
    return Files.below(folder, paths)


def _test_folder(root: Path) -> Path:
    """The first of test and val that has folders of classes; ImageNet's test set has none."""
    for path in (root / "test", root / "val"):
        if path.is_dir() and _folders(path):
            return path
    raise DataError(f"{root} has no folder test or val, beside train, with a folder for each class")


def require_folder(path: Path) -> None:
    """Raises DataError where `path` is no folder; the message says what is there instead."""
    if path.is_dir():
        return
    if not path.parent.is_dir():
        raise DataError(f"data_dir: there is no folder {path.parent}")
    there = sorted(entry.name for entry in path.parent.iterdir())
    listing = ", ".join(there[:5]) + (", ..." if len(there) > 5 else "")
    contents = f"it has {listing}" if there else "it is empty"
    raise DataError(f"{path.parent} has no folder {path.name}: {contents}")


def class_folders(folder: Path) -> list[str]:
    """The names of the folders in `folder`, sorted, without hidden ones."""
    require_folder(folder)
    names = _folders(folder)
    if not names:
        raise DataError(f"{folder} has no folders: each class needs one with its images")
    return names


def _folders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def images_of(folder: Path, classes: Sequence[str], *, of_every: bool = True) -> Split:
    """All image files below `folder`/CLASS.

    Args:
        folder: The folder that holds the classes' folders.
        classes: The names of the classes in the order of their labels. Other folders are ignored.
        of_every: Whether every class must have an image; otherwise one image in all is enough.
    """
    numbers = {name: number for number, name in enumerate(classes)}
    found = make_dataset(str(folder), numbers, IMG_EXTENSIONS, allow_empty=True)
    labels = [label for _, label in found]
    empty = sorted(set(numbers.values()) - set(labels))
    if empty and (of_every or not labels):
        path = folder / classes[empty[0]] if of_every else folder
        # make_dataset silently skips a folder that it may not list
        if path.is_dir() and not os.access(path, os.R_OK | os.X_OK):
            raise DataError(f"{path}: Permission denied")
        raise DataError(f"{path} holds no image ({', '.join(IMG_EXTENSIONS)})")
    return Split.whole(Files.below(folder, [path for path, _ in found]), labels, classes)
