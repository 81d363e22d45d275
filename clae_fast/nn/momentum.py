"""Momentum encoders: a copy whose weights follow an encoder's slowly."""

import copy
import math

import torch
from torch import Tensor, nn


def momentum_twin(encoder: nn.Module) -> nn.Module:
    """A copy of an encoder, for keys or for a teacher's targets, that `follow` moves.

    Its parameters want no gradient, so no optimiser moves them. Its BatchNorm layers are in the
    mode of the module that holds it, training as a rule: they normalise by the statistics of the
    keys, and have running ones of their own.

    Take the twin before the encoder is compiled or wrapped for distributed training.

    Args:
        encoder: The encoder; it is not changed.

    Returns:
        The twin, of the encoder's class and in its mode.

    Raises:
        TypeError: If `encoder` is not a module.
    """
    if not isinstance(encoder, nn.Module):
        raise TypeError(f"encoder must be a torch.nn.Module, got {type(encoder).__name__}")
    # a process group cannot be copied
    norms = [module for module in encoder.modules() if isinstance(module, nn.SyncBatchNorm)]
    groups = {id(norm.process_group): norm.process_group for norm in norms}
    return copy.deepcopy(encoder, groups).requires_grad_(False)


@torch.no_grad()
def follow(
    twin: nn.Module,
    encoder: nn.Module,
    momentum: Tensor,  # []
) -> None:
    r"""Moves a momentum twin towards its encoder, in place.

    .. math:: w' \leftarrow m w' + (1 - m) w

    Parameters move, BatchNorm's weight and bias among them; buffers do not. It is a handful of
    kernels whatever the number of layers, and waits for no device, so that a step that ends with it
    can be captured as a CUDA graph.

    Args:
        twin: What `momentum_twin(encoder)` gave.
        encoder: The encoder.
        momentum: m, from 0 to 1, a scalar tensor on the device of the parameters and of their type.

    Source: He et al., Momentum Contrast for Unsupervised Visual Representation Learning, CVPR 2020.
    """
    slow: list[Tensor] = list(twin.parameters())
    fast: list[Tensor] = list(encoder.parameters())
    way = torch._foreach_sub(fast, slow)
    torch._foreach_mul_(way, 1 - momentum)
    torch._foreach_add_(slow, way)


def cosine_momentum(progress: float, start: float) -> float:
    r"""A momentum that grows from `start` to 1 along a cosine.

    .. math:: 1 - (1 - m_0) \frac{1 + \cos(\pi t)}{2}

    Args:
        progress: t, the part of the run that is done, from 0 to 1.
        start: m_0.

    Source: Grill et al., Bootstrap Your Own Latent, NeurIPS 2020.
    """
    return 1 - (1 - start) * (1 + math.cos(math.pi * progress)) / 2
