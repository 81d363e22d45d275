"""Kernels for the logits of language models, used as contrastive losses in the GPU suite.

They take rows, columns and labels, and compute the cross-entropy of rows @ columns.T. Two-way
InfoNCE is two calls of them. NT-Xent they can only compute *unmasked*, with every row among its own
negatives, which is other work than `nt_xent`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

import clae_fast
from benchmarks.case import Case, Forms, Peer, rows

Loss = Callable[[Tensor, Tensor], Tensor]
# of rows [n, D], columns [m, D] and labels [n]
CrossEntropy = Callable[[Tensor, Tensor, Tensor], Tensor]


def unmasked(n: int, D: int = 128, temperature: float = 0.5) -> Case:
    """NT-Xent with every row among its own negatives; ours is NT-Xent as it is."""
    return Case(
        partial(rows, ((n // 2, D), (n // 2, D)), leaves=2),
        partial(clae_fast.nt_xent, temperature=temperature),
        loss_of(False, _plain_cross_entropy, temperature),
        {
            "cut-cross-entropy, unmasked": cut_cross_entropy(False, temperature),
            "Liger, unmasked": Peer(partial(_liger, temperature), "liger-kernel", gpu_only=True),
        },
        leaves=2,
    )


def cut_cross_entropy(two_way: bool, temperature: float) -> Peer:
    """Apple's cut-cross-entropy, without the filter that drops small gradients."""

    def forms(device: torch.device) -> Forms:
        from cut_cross_entropy import linear_cross_entropy

        cross_entropy = partial(linear_cross_entropy, impl="cce", filter_eps=None)
        return {"": loss_of(two_way, cross_entropy, temperature, torch.float16)}

    return Peer(forms, "cut-cross-entropy", gpu_only=True)


def inf_cl(temperature: float, device: torch.device) -> Forms:
    """Inf-CL's two-way loss."""
    from inf_cl import cal_inf_loss

    def loss(z0: Tensor, z1: Tensor) -> Tensor:
        u, v = F.normalize(z0), F.normalize(z1)
        width = min(u.shape[1], 256)
        there = cal_inf_loss(u / temperature, v, head_dim=width)
        return (there + cal_inf_loss(v / temperature, u, head_dim=width)) / 2

    return {"": loss}


def loss_of(
    two_way: bool,
    cross_entropy: CrossEntropy,
    temperature: float,
    dtype: torch.dtype | None = None,
) -> Loss:
    """A contrastive loss out of a cross-entropy of unit rows in `dtype`, or as they are.

    With `two_way` it is InfoNCE of z0 against z1 and back, or else NT-Xent, unmasked.
    """

    def loss(z0: Tensor, z1: Tensor) -> Tensor:
        u, v = F.normalize(z0), F.normalize(z1)
        labels = torch.arange(len(u), device=u.device)
        if two_way:
            there = cross_entropy((u / temperature).to(dtype), v.to(dtype), labels)
            return (there + cross_entropy((v / temperature).to(dtype), u.to(dtype), labels)) / 2
        z = torch.cat((u, v))
        labels = torch.arange(len(z), device=z.device).roll(len(u))
        return cross_entropy((z / temperature).to(dtype), z.to(dtype), labels)

    return loss


def _plain_cross_entropy(rows: Tensor, columns: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(rows @ columns.t(), labels)


def _liger(temperature: float, device: torch.device) -> Forms:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    fused = LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.float32)

    def cross_entropy(rows: Tensor, columns: Tensor, labels: Tensor) -> Tensor:
        return fused(columns, rows, labels)

    return {"": loss_of(False, cross_entropy, temperature, torch.float16)}
