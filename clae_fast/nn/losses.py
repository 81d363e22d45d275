"""Losses as modules."""

from torch import Tensor, nn

from clae_fast import _check
from clae_fast.ops.nt_xent import nt_xent


class NTXentLoss(nn.Module):
    """:func:`clae_fast.nt_xent` with the calling convention of lightly's loss of this name.

    Args:
        temperature: T, above 0.

    Example:
        >>> criterion = NTXentLoss(temperature=0.5)
        >>> loss = criterion(out0, out1)
    """

    def __init__(self, temperature: float = 0.5) -> None:
        super().__init__()
        _check.temperature(temperature)
        self.temperature = temperature

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:  # [N, D], [N, D]
        """The loss of two views' raw projections, a scalar."""
        return nt_xent(out0, out1, temperature=self.temperature)

    def extra_repr(self) -> str:
        """What a printed module shows."""
        return f"temperature={self.temperature}"
