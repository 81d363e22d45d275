"""What the losses share: an op that returns its gradients with the loss, as autograd wants it."""

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
    """The loss of an op that returns the wanted gradients with it, differentiable once.

    Args:
        op: Returns the loss, [] or [N], and its gradients, all in fp32.
        operands: The op's tensors; those that have a gradient come first.
        settings: The op's further arguments, which say what gradients it computes.
        views: How many operands the first gradient is of, whose rows then lie below one another.
    """
    if wants_grad(*operands):
        return _Fused.apply(op, settings, views, *operands)
    return op(*operands, *settings)[0]


def uninitialized(z: Tensor, *shapes: int | Sequence[int]) -> tuple[Tensor, ...]:
    """What a fake returns: tensors beside `z` in fp32, of shape 0 where no gradient is wanted."""
    return tuple(z.new_empty(shape, dtype=torch.float32) for shape in shapes)


class _Fused(torch.autograd.Function):
    """Computes the gradients with the loss and keeps nothing else."""

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
