"""Several views in one encoder pass, each normalised by itself."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def grouped_norm(module: nn.Module, groups: int, *, split: bool = False) -> Iterator[None]:
    """Within it, training BatchNorm layers see a batch as `groups` equal batches, one by one.

    Every group has its own statistics, the running ones are updated group after group, weight and
    bias are shared: outputs, gradients and buffers are those of as many calls. All other layers see
    one batch. BatchNorm layers keep their tensors and change their class meanwhile, so whatever
    they do besides, as timm's activate, they do, and a compiled encoder has a variant for it.

    Args:
        module: An encoder; any whose BatchNorm layers derive from torch's.
        groups: Batches that lie in a row in one.
        split: The groups are parts of one batch: running statistics move once, to the mean of those
            of the parts, and not as often as there are groups.

    Example:
        >>> with grouped_norm(encoder, 2):
        ...     z_p, z_q = encoder(torch.cat((x_p, x_q))).chunk(2)
    """
    norms = (norm for norm in module.modules() if isinstance(norm, _BatchNorm))
    kinds: dict[_BatchNorm, Any] = {norm: type(norm) for norm in norms}
    for norm, kind in kinds.items():
        norm.__class__ = _grouped(kind, groups, split)
    try:
        yield
    finally:
        for norm, kind in kinds.items():
            norm.__class__ = kind


class _Grouped(_BatchNorm):
    """BatchNorm by groups, in front of the class that normalises one."""

    groups: int
    split: bool

    def forward(self, x: Tensor) -> Tensor:  # [groups * N, C, ...]
        if not self.training:
            return super().forward(x)
        one, momentum = super().forward, self.momentum
        # without a momentum all batches have one weight anyway
        if not self.split or momentum is None:
            return torch.cat([one(part) for part in x.chunk(self.groups)])
        outputs = []
        try:
            for later, part in zip(reversed(range(self.groups)), x.chunk(self.groups), strict=True):
                # so that after the later ones, too, each has a weight of momentum / groups
                self.momentum = momentum / (self.groups - later * momentum)
                outputs.append(one(part))
        finally:
            self.momentum = momentum
        return torch.cat(outputs)


@cache
def _grouped(kind: type[_BatchNorm], groups: int, split: bool) -> type[_BatchNorm]:
    attributes = {"groups": groups, "split": split}
    return type(f"Grouped{kind.__name__}", (_Grouped, kind), attributes)
