"""Modules: losses, encoders, and the adversarial twin of an encoder."""

from clae_fast.nn.encoder import Encoder, ProjectionHead, build_encoder
from clae_fast.nn.losses import NTXentLoss
from clae_fast.nn.twins import adversarial_twin

__all__ = ["Encoder", "NTXentLoss", "ProjectionHead", "adversarial_twin", "build_encoder"]
