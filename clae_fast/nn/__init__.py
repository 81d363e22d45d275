"""Modules: losses, encoders, and the adversarial twin of an encoder."""

from clae_fast.nn.dual_norm import adversarial_twin
from clae_fast.nn.encoder import Encoder, ProjectionHead, build_encoder
from clae_fast.nn.losses import NTXentLoss

__all__ = ["Encoder", "NTXentLoss", "ProjectionHead", "adversarial_twin", "build_encoder"]
