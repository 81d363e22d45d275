"""The rows every contrastive loss works on."""

import torch
from torch import Tensor
from torch.nn import functional as F


def unit_rows(z: Tensor) -> Tensor:  # [N, D]
    """The rows of `z` over max(norm, 1e-12), in fp32 or, for fp64, in fp64."""
    return F.normalize(z if z.dtype == torch.float64 else z.float(), eps=1e-12)
