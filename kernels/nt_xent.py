"""NT-Xent in Triton: the loss, or the loss with its gradient, in three launches."""

from torch import Tensor

from ._softmax import Tilings, softmax_loss


def nt_xent_fwd(
    z0: Tensor,  # [N, D]
    z1: Tensor,  # [N, D]
    temperature: float,
    exact: bool = False,
    config: Tilings | None = None,
) -> Tensor:
    """Mean NT-Xent loss of raw projections.

    Args:
        z0: First view [N, D], fp32, fp16 or bf16, any strides.
        z1: Second view, of the same shape, dtype and device.
        temperature: T, positive.
        exact: Compute the similarities of fp32 rows to 22 bits instead of 11.
        config: Tilings other than the default.

    Returns:
        The loss, fp32 [].
    """
    grads = (False, False)
    return softmax_loss(z0, z1, temperature, stacked=True, grads=grads, exact=exact, config=config)[
        0
    ]


def nt_xent_fwd_bwd(
    z0: Tensor,  # [N, D]
    z1: Tensor,  # [N, D]
    temperature: float,
    exact: bool = False,
    config: Tilings | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean NT-Xent loss of raw projections and its gradient.

    Args:
        z0: First view [N, D], fp32, fp16 or bf16, any strides.
        z1: Second view, of the same shape, dtype and device.
        temperature: T, positive.
        exact: Compute with fp32 rows to 22 bits instead of 11.
        config: Tilings other than the default.

    Returns:
        The loss, fp32 [], and dz, fp32 [2N, D]: rows 0 to N - 1 for z0, the others for z1.
    """
    grads = (True, True)
    return softmax_loss(z0, z1, temperature, stacked=True, grads=grads, exact=exact, config=config)
