"""Data sets, the SimCLR augmentation and the loaders that feed training and evaluation."""

from clae_fast.data.augment import TwoViews, augmentation, eval_transform
from clae_fast.data.datasets import DataError, Split, load
from clae_fast.data.loaders import BatchSchedule, image_loader, view_loader

__all__ = [
    "BatchSchedule",
    "DataError",
    "Split",
    "TwoViews",
    "augmentation",
    "eval_transform",
    "image_loader",
    "load",
    "view_loader",
]
