"""The sign step along the input gradient of an encoder's first convolution."""

import torch
from torch import Tensor
from torch.nn.grad import conv2d_input

from clae_fast.reference.linf_step import PerChannel, linf_step


def stem_step(
    dy: Tensor,  # [N, C_out, dy_H, dy_W]
    weight: Tensor,  # [C_out, C, KH, KW]
    x: Tensor,  # [N, C, H, W]
    *,
    stride: int,
    padding: int,
    alpha: PerChannel,
    eps: PerChannel | None = None,
    lo: PerChannel | None = None,
    hi: PerChannel | None = None,
) -> Tensor:
    """linf_step from x along dx, the transposed convolution of dy by `weight`.

    The weight is rounded to the dtype of dy, as it was for the convolution; dx is computed from
    these in fp32, fp64 for fp64, and never rounded.
    """
    dtype = torch.float64 if dy.dtype == torch.float64 else torch.float32
    dy, weight = dy.detach(), weight.detach().to(dy.dtype)
    dx = conv2d_input(list(x.shape), weight.to(dtype), dy.to(dtype), stride, padding)
    return linf_step(x, dx, alpha=alpha, eps=eps, lo=lo, hi=hi)
