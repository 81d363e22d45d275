"""The gradient of NT-Xent where both views are the same point: the released attack of CLAE."""

import torch
from torch import Tensor

from clae_fast.reference._rows import unit_rows


def tied_nt_xent(
    z: Tensor,  # [N, D]
    *,
    temperature: float = 0.5,
) -> Tensor:
    """Gradient d nt_xent(z, z_b) / d z_b at z_b = z: [N, D], in fp32 or, for fp64, in fp64.

    Both views of a row have the same similarities, so the 2N x 2N softmax is an N x N one in which
    every negative counts twice. With p_jk its value at the negative k of row j and p_j the value at
    all of them,

        du_j = sum over k != j of (p_jk + p_kj) u_k / N T  -  p_j u_j / N T,

    and the tangent projection of the normalization removes the last term but for rows whose norm
    is below 1e-12.
    """
    with torch.autocast(z.device.type, enabled=False):
        u = unit_rows(z.detach())
        similarity = (u @ u.T / temperature).fill_diagonal_(-torch.inf)
        positive = u.square().sum(1) / temperature
        lse_neg = similarity.logsumexp(1) + torch.log(torch.tensor(2.0, dtype=u.dtype))
        p = (similarity - torch.logaddexp(lse_neg, positive)[:, None]).exp()
        du = (p + p.T) @ u - torch.sigmoid(lse_neg - positive)[:, None] * u
        norm = z.detach().to(u.dtype).norm(dim=1, keepdim=True)
        radial = torch.where(norm < 1e-12, 0, (du * u).sum(1, keepdim=True)) * u
        return (du - radial) / norm.clamp_min(1e-12) / (len(u) * temperature)
