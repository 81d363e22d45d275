"""Makes a loss that autograd can differentiate of an op that returns gradients with the loss.

Such an op returns its loss, [] or [N], and then its gradients, all in fp32. A gradient that is not
wanted is a tensor of shape [0].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def wants_grad(*operands: Tensor | None) -> bool:
    """Whether autograd wants the gradient by any of these."""
    for z in operands:
        if z is not None and z.requires_grad:
            return torch.is_grad_enabled()
    return False


def fused(
    op: Callable[..., tuple[Tensor, ...]],
    operands: tuple[Tensor | None, ...],
    settings: tuple[object, ...],
    *,
    views: int = 1,
) -> Tensor:
    """The loss that `op` computes, which can be differentiated once.

    Args:
        op: Computes the loss and the wanted gradients in one call.
        operands: The op's tensors. Those that have a gradient come first.
        settings: The op's further arguments. They say which gradients are wanted.
        views: How many operands the first gradient belongs to, whose rows lie below one another.
    """
    if wants_grad(*operands):
        return _Fused.apply(op, settings, views, *operands)
    return op(*operands, *settings)[0]


def uninitialized(z: Tensor, *shapes: int | Sequence[int]) -> tuple[Tensor, ...]:
    """Memory for results in fp32, on the device of `z`: what a fake returns, and C++ fills."""
    return tuple(z.new_empty(shape, dtype=torch.float32) for shape in shapes)


class _Fused(torch.autograd.Function):
    """Computes the gradients with the loss, and keeps nothing but them for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        op: Callable[..., tuple[Tensor, ...]],
        settings: tuple[object, ...],
        views: int,
        *operands: Tensor | None,
    ) -> Tensor:
        loss, *grads = op(*operands, *settings)
        ctx.save_for_backward(*grads)
        ctx.views = views
        ctx.dtypes = [None if z is None else z.dtype for z in operands]
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        dz, *others = ctx.saved_tensors
        scale = dloss[:, None] if dloss.ndim else dloss
        wanted = ctx.needs_input_grad[3:]
        grads: list[Tensor | None] = [None] * len(wanted)
        for i, grad in enumerate((*dz.chunk(ctx.views), *others)):
            if wanted[i]:
                # scaled before the cast: a scaled loss keeps fp16 gradients from underflowing
                grads[i] = (grad * scale).to(ctx.dtypes[i])
        return None, None, None, *grads
