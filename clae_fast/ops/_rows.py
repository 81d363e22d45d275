"""What the ops on rows share: unit rows, their backward, and blocks of rows."""

from __future__ import annotations

import torch
from torch import Tensor

# F.normalize divides a row that is shorter than this by it instead of by its norm
_EPS = 1e-12
# a block of the similarity matrix has 8 MiB in fp32, which is enough for matmul's full rate
_BLOCK_ELEMENTS = 1 << 21


def unit_rows(z: Tensor) -> tuple[Tensor, Tensor]:  # [N, D]
    """The rows of `z` over max(norm, eps), and the norms, in fp32: [N, D], [N, 1]."""
    z = z.float()
    norm = torch.linalg.vector_norm(z, dim=1, keepdim=True)
    return z / norm.clamp_min(_EPS), norm


def unit_rows_backward(du: Tensor, u: Tensor, norm: Tensor) -> Tensor:
    """The gradient dz = (du - u (u . du)) / norm, or du / eps for rows shorter than eps."""
    radial = (u * du).sum(1, keepdim=True)
    radial.masked_fill_(norm < _EPS, 0)
    return torch.addcmul(du, u, radial, value=-1).div_(norm.clamp_min(_EPS))


def two_views(z0: Tensor, z1: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Unit rows [2N, D] of both views, their norms, and their logits with their positives."""
    N = len(z0)
    u, norm = unit_rows(torch.cat([z0, z1]))
    positive = (u[:N] * u[N:]).sum(1, keepdim=True).div_(temperature).repeat(2, 1)  # [2N, 1]
    return u, norm, positive


def negative_logits(u: Tensor, start: int, stop: int, temperature: float) -> Tensor:
    """The logits of some rows of two views; a row's own and its positive's are -inf."""
    s = (u[start:stop] @ u.T).div_(temperature)
    s.diagonal(start).fill_(-torch.inf)
    positive_of = torch.arange(start, stop, device=u.device).add_(len(u) // 2).remainder_(len(u))
    return s.scatter_(1, positive_of[:, None], -torch.inf)


def row_blocks(rows: int, columns: int) -> list[tuple[int, int]]:
    """Ranges of rows such that a block of rows x columns is small, however large the matrix."""
    step = max(1, _BLOCK_ELEMENTS // columns)
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]
