"""Data sets, recipes of augmentation and the loaders that feed training and evaluation."""

from clae_fast.data.augment import TwoViews, augmentation, eval_transform
from clae_fast.data.datasets import load
from clae_fast.data.loaders import BatchSchedule, image_loader, view_loader
from clae_fast.data.recipes import RECIPES, Recipe
from clae_fast.data.split import DataError, Split, Splits, hold_out

__all__ = [
    "RECIPES",
    "BatchSchedule",
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
    "view_loader",
]
