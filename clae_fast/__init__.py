"""Adversarial contrastive training at close to the cost of plain contrastive training."""

from pkgutil import extend_path

# Run from a checkout, the compiled _C and clae_fast.kernels are those of the installed package.
__path__ = extend_path(__path__, __name__)

__version__ = "0.1.0"
