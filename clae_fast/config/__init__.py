"""The settings of a run, each with its bounds, and the layers that they come from."""

from clae_fast.config.config import (
    MAY_CHANGE,
    Config,
    Data,
    Objective,
    Optimization,
    Run,
    convert,
    groups,
    hints,
    nearest,
)  # fmt: skip

__all__ = [
    "MAY_CHANGE", "Config", "Data", "Objective", "Optimization", "Run", "convert", "groups",
    "hints", "nearest",
]  # fmt: skip
