"""The gradient of NT-Xent at tied views in Triton, in three launches."""

from torch import Tensor

from ._softmax import Tilings, softmax_loss


def tied_nt_xent(
    z: Tensor,  # [N, D]
    temperature: float,
    exact: bool = False,
    config: Tilings | None = None,
) -> Tensor:
    """Gradient of the mean NT-Xent loss by its second view where both views are z.

    Args:
        z: Projections [N, D], fp32, fp16 or bf16, any strides.
        temperature: T, positive.
        exact: Compute with fp32 rows to 22 bits instead of 11.
        config: Tilings other than the default.

    Returns:
        dz, fp32 [N, D].
    """
    grads = (True, False)
    return softmax_loss(
        z, None, temperature, stacked=True, grads=grads, exact=exact, config=config
    )[1]
