"""NT-Xent in Triton: the loss, and its gradient where that is wanted, in three launches."""

from functools import partial

from torch import Tensor

from ._gradient import softmax_loss
from ._launch import Compilations, Tilings, meta_rows


def nt_xent(
    z0: Tensor,  # [N, D]
    z1: Tensor,  # [N, D]
    temperature: float,
    grad: bool,
    exact: bool = False,
    config: Tilings | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean NT-Xent loss of raw projections and its gradient.

    Args:
        z0: First view [N, D], fp32, fp16 or bf16, any strides.
        z1: Second view, of the same shape, dtype and device.
        temperature: T, positive.
        grad: Whether the gradient is wanted.
        exact: Compute with fp32 rows to 22 bits instead of 11.
        config: Tilings other than the default.

    Returns:
        The loss, fp32 [], and dz, fp32 [2N, D]: rows 0 to N - 1 are for z0, the others for z1. dz
        has no elements where it is not wanted.
    """
    grads = (grad, grad)
    return softmax_loss(z0, z1, temperature, stacked=True, grads=grads, exact=exact, config=config)


def compilations() -> Compilations:
    """Calls that compile every kernel of this file at every default tiling."""
    settings = [(D, 0.5, False) for D in (16, 64, 128, 256, 512, 1024)]
    settings += [(D, 0.01, False) for D in (128, 256)] + [(D, 0.5, True) for D in (64, 128, 1024)]
    for D, T, exact in settings:
        z = meta_rows(D, exact=exact)
        yield f"D={D} T={T}{exact * ' exact'}", partial(nt_xent, z, z, T, True, exact)
