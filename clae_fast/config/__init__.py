"""The settings of a run, each with its bounds, and the layers that they come from."""

from clae_fast.config.config import (
    MAY_CHANGE,
    Adversary,
    Config,
    Data,
    Encoder,
    Engine,
    Objective,
    Optimization,
    Run,
    Views,
    convert,
    groups,
    hints,
    nearest,
    require_known,
)

__all__ = [
    "MAY_CHANGE",
    "Adversary",
    "Config",
    "Data",
    "Encoder",
    "Engine",
    "Objective",
    "Optimization",
    "Run",
    "Views",
    "convert",
    "groups",
    "hints",
    "nearest",
    "require_known",
]
