"""The mode of a module's layers, for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Has all layers in eval mode, and then each as it was."""
    modes = [(layer, layer.training) for layer in module.modules()]
    for layer, _ in modes:
        layer.training = False
    try:
        yield
    finally:
        for layer, training in modes:
            layer.training = training
