"""Data sets, recipes of augmentation and the loaders that feed training and evaluation."""

from clae_fast.data.augment import TwoViews, augmentation, eval_transform
from clae_fast.data.corrupt import CorruptImages
from clae_fast.data.datasets import DATASETS, load, require_dataset
from clae_fast.data.loaders import Batches, BatchSchedule, image_loader, view_loader
from clae_fast.data.recipes import RECIPES, Recipe
from clae_fast.data.split import DataError, Split, Splits, hold_out

__all__ = [
    "DATASETS",
    "RECIPES",
    "BatchSchedule",
    "Batches",
    "CorruptImages",
    "DataError",
    "Recipe",
    "Split",
    "Splits",
    "TwoViews",
    "augmentation",
    "eval_transform",
    "hold_out",
    "image_loader",
    "load",
    "require_dataset",
    "view_loader",
]
