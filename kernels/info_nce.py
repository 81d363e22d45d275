"""InfoNCE of anchors against keys in Triton, in one direction or in both, in three launches."""

import torch
from torch import Tensor

from ._softmax import Tilings, softmax_loss


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
        The loss, fp32 [] or [N], and the gradients, fp32 [N, D] and [M, D], or [0] where not
        wanted.
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
    danchor, dkeys = dz.split([len(anchor) * grads[0], len(keys) * grads[1]])
    none = dz.new_empty(0)
    return loss, danchor if grads[0] else none, dkeys if grads[1] else none
