"""The settings of a run: every one with its bounds, and the layers that they come from."""

from clae_fast.config.config import (
    MAY_CHANGE,
    Config,
    convert,
    groups,
    hints,
    nearest,
    require_known,
)

__all__ = ["MAY_CHANGE", "Config", "convert", "groups", "hints", "nearest", "require_known"]
