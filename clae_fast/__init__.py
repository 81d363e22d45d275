"""Adversarial contrastive training at close to the cost of plain contrastive training."""

from collections.abc import Callable
from pkgutil import extend_path
from typing import TYPE_CHECKING, Any

# Run from a checkout, the compiled _C and clae_fast.kernels are those of the installed package.
__path__ = extend_path(__path__, __name__)

from clae_fast import attack, nn, ops
from clae_fast._ragged import RaggedImages
from clae_fast._version import __version__
from clae_fast.ops import *  # noqa: F403
from clae_fast.ops.augment_params import augment_params
from clae_fast.steps.schedules import pair_step

if TYPE_CHECKING:
    load_encoder: Callable[..., Any]
else:

    def __getattr__(name: str) -> Any:
        # encoders need more than torch
        if name == "load_encoder":
            from clae_fast.training.encoders import load_encoder

            return load_encoder
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "RaggedImages",
    "__version__",
    "attack",
    "augment_params",
    "load_encoder",
    "nn",
    "pair_step",
]
__all__ += ops.__all__
