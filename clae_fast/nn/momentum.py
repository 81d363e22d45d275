"""Momentum encoders: copies whose weights follow those of an encoder slowly."""

import copy
import math

import torch
from torch import Tensor, nn


def momentum_twin(encoder: nn.Module) -> nn.Module:
    """A copy of an encoder whose weights `follow` moves: for keys, or for a teacher's targets.

    Its parameters require no gradient, so no optimizer moves them. Its BatchNorm layers follow the
    mode of the module that holds it. In training mode they normalize by the statistics of the keys
    and keep running statistics of their own.

    Make the twin before the encoder is compiled or wrapped for distributed training.

    Args:
        encoder: The encoder; it is not changed.

    Returns:
        The twin, of the encoder's class and in its mode.

    Raises:
        TypeError: `encoder` is not a module.
    """
    if not isinstance(encoder, nn.Module):
        raise TypeError(f"encoder must be a torch.nn.Module, got {type(encoder).__name__}")
    # deepcopy cannot copy a process group
    norms = [module for module in encoder.modules() if isinstance(module, nn.SyncBatchNorm)]
    groups = {id(norm.process_group): norm.process_group for norm in norms}
    return copy.deepcopy(encoder, groups).requires_grad_(False)


@torch.no_grad()
def follow(
    twin: nn.Module,
    encoder: nn.Module,
    momentum: Tensor,  # []
) -> None:
    r"""Moves the weights w' of a momentum twin towards those of its encoder, w, in place.

    .. math:: w' \leftarrow m w' + (1 - m) w

    All parameters move, also the weight and bias of BatchNorm. Buffers do not. It launches a few
    kernels, however many layers there are, and does not wait for the device, so that a CUDA graph
    can capture it.

    Args:
        twin: The result of `momentum_twin(encoder)`.
        encoder: The encoder.
        momentum: m, from 0 to 1, a scalar tensor of the parameters' dtype on their device.

    Source: He et al., Momentum Contrast for Unsupervised Visual Representation Learning, CVPR 2020.
    """
    slow: list[Tensor] = list(twin.parameters())
    fast: list[Tensor] = list(encoder.parameters())
    way = torch._foreach_sub(fast, slow)
    torch._foreach_mul_(way, 1 - momentum)
    torch._foreach_add_(slow, way)


def cosine_momentum(progress: float, start: float) -> float:
    r"""A momentum that rises from m_0 to 1 along a cosine.

    .. math:: 1 - (1 - m_0) \frac{1 + \cos(\pi t)}{2}

    Args:
        progress: t, which part of the run is done, from 0 to 1.
        start: m_0, the momentum at the start of the run.

    Source: Grill et al., Bootstrap Your Own Latent, NeurIPS 2020.
    """
    return 1 - (1 - start) * (1 + math.cos(math.pi * progress)) / 2
