"""Several views in one encoder pass, each normalized by its own statistics."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def grouped_norm(module: nn.Module, groups: int, *, split: bool = False) -> Iterator[None]:
    """Inside, BatchNorm layers in training mode treat a batch as `groups` equal batches in a row.

    Each group is normalized by its own statistics and then moves the running ones, with the same
    weight and bias. So outputs, gradients and buffers are those of one call for each group. All
    other layers see one batch. Meanwhile BatchNorm layers have another class, with the same
    tensors. They still do whatever else their own class does, such as timm's activation, and a
    compiled encoder compiles a variant for it.

    Args:
        module: Any encoder whose BatchNorm layers derive from torch's.
        groups: How many batches there are.
        split: Whether the groups are parts of one batch. Running statistics then move once, to the
            mean over the parts, instead of once for each group.

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
    """BatchNorm by groups; the class after it in the order of inheritance normalizes one group."""

    groups: int
    split: bool

    def forward(self, x: Tensor) -> Tensor:  # [groups * N, C, ...]
        if not self.training:
            return super().forward(x)
        one, momentum = super().forward, self.momentum
        # without a momentum, BatchNorm averages over all batches with equal weights anyway
        if not self.split or momentum is None:
            return torch.cat([one(part) for part in x.chunk(self.groups)])
        outputs = []
        try:
            for later, part in zip(reversed(range(self.groups)), x.chunk(self.groups), strict=True):
                # later parts shrink this one's weight; in the end each has momentum / groups
                self.momentum = momentum / (self.groups - later * momentum)
                outputs.append(one(part))
        finally:
            self.momentum = momentum
        return torch.cat(outputs)


@cache
def _grouped(kind: type[_BatchNorm], groups: int, split: bool) -> type[_BatchNorm]:
    attributes = {"groups": groups, "split": split}
    return type(f"Grouped{kind.__name__}", (_Grouped, kind), attributes)
