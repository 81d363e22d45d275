"""Data sets, augmentation recipes, and the batches that training and evaluation read."""

from clae_fast.data.corrupt import CorruptImages
from clae_fast.data.datasets import DATASETS, load, require_dataset
from clae_fast.data.encoded import to_rgb
from clae_fast.data.folders import image_files
from clae_fast.data.loaders import Batches, eval_transform, image_loader
from clae_fast.data.recipes import RECIPES, Recipe
from clae_fast.data.schedule import BatchSchedule
from clae_fast.data.split import Split, Splits, hold_out, stratified
from clae_fast.data.views import ViewSource, resident_bytes, view_source
from clae_fast.errors import DataError
from clae_fast.steps.batch import Batch

__all__ = [
    "DATASETS",
    "RECIPES",
    "Batch",
    "BatchSchedule",
    "Batches",
    "CorruptImages",
    "DataError",
    "Recipe",
    "Split",
    "Splits",
    "ViewSource",
    "eval_transform",
    "hold_out",
    "image_files",
    "image_loader",
    "load",
    "require_dataset",
    "resident_bytes",
    "stratified",
    "to_rgb",
    "view_source",
]
