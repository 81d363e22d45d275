"""InfoNCE of anchors against keys in Triton, in one direction or in both, in three launches."""

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
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean InfoNCE loss of raw projections and the wanted gradients.

    Args:
        anchor: Anchors [N, D], fp32, fp16 or bf16, any strides.
        keys: Keys [M, D], M >= N, of the same dtype and device; key i is anchor i's positive.
        temperature: T, positive.
        symmetric: Mean of this loss and of the one with anchors and keys exchanged; M = N.
        grads: Whether the gradients by anchor and by keys are wanted.
        exact: Compute with fp32 rows to 22 bits instead of 11.
        config: Tilings other than the default.

    Returns:
        The loss, fp32 [], and the gradients, fp32 [N, D] and [M, D], or [0] where not wanted.
    """
    loss, dz = softmax_loss(
        anchor,
        keys,
        temperature,
        stacked=False,
        two_way=symmetric,
        grads=grads,
        exact=exact,
        config=config,
    )
    danchor, dkeys = dz.split([len(anchor) * grads[0], len(keys) * grads[1]])
    none = dz.new_empty(0)
    return loss, danchor if grads[0] else none, dkeys if grads[1] else none
