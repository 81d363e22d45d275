"""SSCL: HCL with synthetic negatives, mixed from the hardest ones of the batch."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from clae_fast.methods.hcl import HCL
from clae_fast.methods.options import Size
from clae_fast.methods.synthetic import draw, uniform
from clae_fast.nn.negatives import mixed, nearest
from clae_fast.steps.options import StepContext


class SSCL(HCL):
    r"""Synthetic hard negative samples (Dong et al., Neural Processing Letters 2024).

    Each row draws pairs, with replacement, from its hardest negatives n in the batch, and mixes
    each pair to a unit vector along

    .. math:: \alpha n_i + (1 - \alpha) n_j, \quad \alpha \sim U(0, 1).

    These vectors are constants, and further negatives of that row alone in the loss of HCL. Where
    a batch has fewer negatives than `hard`, all of them are the hardest. The mixture is the
    paper's; the authors' stored code has it, but takes n_i in its place.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options(HCL.Options):
        """Settings of SSCL.

        Attributes:
            hard: How many of a row's hardest negatives are mixed, s in the paper.
            synthetic: How many mixtures each row has, k in the paper.
        """

        hard: Size = 64
        synthetic: Size = 32

    name = "sscl"
    options: Options

    def extra(self, z_a: Tensor, z_b: Tensor, context: StepContext) -> Tensor:
        """Logits of the synthetic negatives of each row, [2N, synthetic].

        They follow from similarities that are known and from inner products of rows.
        """
        z = torch.cat([z_a, z_b])
        u = F.normalize(z if z.dtype == torch.float64 else z.float())
        n, keys = len(u), u.detach()
        if n == 2:  # no negatives
            return u.new_empty(n, 0)
        row = torch.arange(n, device=u.device)
        exclude = torch.stack([row, row.roll(n // 2)], 1)
        s, indices = nearest(u, keys, min(self.options.hard, n - 2), exclude=exclude)
        # every process has the loss of all rows, and so all draws
        own, gather = s[: n // context.world.size], context.world.all_gather
        count = self.options.synthetic
        i, j = (gather(draw(own, count)) for _ in range(2))
        alpha = gather(uniform(own, count, 0, 1))
        n_i, n_j = (keys[indices.gather(1, columns)] for columns in (i, j))
        similarity = mixed(alpha, s.gather(1, i), s.gather(1, j), (n_i * n_j).sum(2))
        return similarity / self.temperature
