"""Dual BatchNorm: clean and adversarial views each have statistics and parameters of their own."""

import copy

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def adversarial_twin(encoder: nn.Module, momentum: float = 0.01) -> nn.Module:
    """A second encoder that shares all weights with the first, except its BatchNorm layers.

    Every parameter and buffer of the twin is the encoder's own tensor. Only BatchNorm layers have
    tensors of their own, which start as copies. So clean and adversarial views never share
    statistics. It works with any module whose BatchNorm layers derive from torch's: torchvision's,
    timm's, SyncBatchNorm. An encoder without BatchNorm shares everything with its twin.

    Make the twin before the encoder is compiled or wrapped for distributed training. Give the
    optimizer the parameters of `nn.ModuleList([encoder, twin])`, which lists each of them once.

    Args:
        encoder: The encoder; it is not changed.
        momentum: Momentum of the twin's running statistics.

    Returns:
        The twin, of the encoder's class and in its mode.

    Raises:
        TypeError: `encoder` is not a module.
        ValueError: `momentum` is outside [0, 1].

    Source: Xie et al., Adversarial Examples Improve Image Recognition (AdvProp), CVPR 2020. CLAE
    uses it with momentum 0.01.
    """
    if not isinstance(encoder, nn.Module):
        raise TypeError(f"encoder must be a torch.nn.Module, got {type(encoder).__name__}")
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum must be in [0, 1], got {momentum}")
    norms = [module for module in encoder.modules() if isinstance(module, _BatchNorm)]
    own = {id(tensor) for norm in norms for tensor in (*norm.parameters(), *norm.buffers())}
    tensors = (*encoder.parameters(), *encoder.buffers())
    # deepcopy cannot copy a process group
    groups = (norm.process_group for norm in norms if isinstance(norm, nn.SyncBatchNorm))
    shared = {id(thing): thing for thing in (*tensors, *groups) if id(thing) not in own}
    twin = copy.deepcopy(encoder, shared)
    for module in twin.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = momentum
    return twin
