"""InfoNCE of anchors against keys in Triton: one direction or both, in three launches."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ._gradient import softmax_loss
from ._launch import Compilations, Tilings, meta_rows


def info_nce(
    anchor: Tensor,  # [N, D]
    keys: Tensor,  # [M, D]
    temperature: float,
    symmetric: bool,
    grads: tuple[bool, bool],
    exact: bool = False,
    config: Tilings | None = None,
    *,
    positive: Tensor | None = None,  # [N]
    weight: Tensor | None = None,  # [N]
    mean: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """InfoNCE loss of raw projections and the wanted gradients.

    Args:
        anchor: Anchors [N, D], fp32, fp16 or bf16, any strides.
        keys: Keys [M, D] of the same dtype and device.
        temperature: T, positive.
        symmetric: Mean of this loss and of the one with anchors and keys exchanged; M = N.
        grads: Whether the gradients by anchor and by keys are wanted.
        exact: Compute with fp32 rows to 22 bits instead of 11.
        config: Tilings other than the default.
        positive: int64, the key that is each anchor's positive; None is key i, M >= N.
        weight: fp32, what each anchor counts in the gradients; None is 1.
        mean: Whether the loss is the anchors' mean; if not, the gradients are those of their sum.

    Returns:
        The loss, fp32 [] or [N], and the gradients, fp32 [N, D] and [M, D]. A gradient that is not
        wanted has no elements.
    """
    largest = None
    if weight is not None:
        # the kernels' fp16 weights are sized for rows that count 1 at most
        largest = weight.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
        weight = weight / largest
    positive = None if positive is None else positive.contiguous()
    loss, dz = softmax_loss(
        anchor,
        keys,
        temperature,
        stacked=False,
        two_way=symmetric,
        grads=grads,
        exact=exact,
        positive=positive,
        weight=weight,
        mean=mean,
        config=config,
    )
    if largest is not None:
        dz *= largest
    none = loss.new_empty(0)
    if not grads[0]:
        return loss, none, dz
    return loss, dz[: len(anchor)], dz[len(anchor) :] if grads[1] else none


def compilations() -> Compilations:
    """Calls that compile every kernel of this file at every default tiling."""
    z = meta_rows(128, exact=False)
    for case, symmetric, grads in (
        ("one way", False, (True, True)),
        ("queue", False, (True, False)),
        ("two-way", True, (True, True)),
    ):
        yield f"D=128 {case}", partial(info_nce, z, z, 0.5, symmetric, grads)
    named: dict[str, Any] = {
        "positive": torch.empty(2048, dtype=torch.int64, device="meta"),
        "mean": False,
    }
    weight = torch.empty(2048, device="meta")
    for D, T in ((128, 0.5), (128, 0.01), (256, 0.5)):
        z = meta_rows(D, exact=False)
        call = partial(info_nce, z, z, T, False, (True, True), weight=weight, **named)
        yield f"D={D} T={T} rows", call
