"""The gradient of NT-Xent at tied views in Triton, in three launches."""

from functools import partial

from torch import Tensor

from ._gradient import softmax_loss
from ._launch import Compilations, Tilings, meta_rows


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
    return softmax_loss(
        z, None, temperature, stacked=True, grads=(True, False), exact=exact, config=config
    )[1]


def compilations() -> Compilations:
    """Calls that compile every kernel of this file at every default tiling."""
    yield "D=128", partial(tied_nt_xent, meta_rows(128, exact=False), 0.5)
