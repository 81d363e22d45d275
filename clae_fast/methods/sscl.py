"""SSCL: HCL with synthetic negatives between the hardest of the batch."""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clae_fast.distributed import World
from clae_fast.methods.hcl import HCL
from clae_fast.methods.queue import require_at_least
from clae_fast.methods.synthetic import draw, uniform
from clae_fast.nn.negatives import mixed, nearest
from clae_fast.ops.hard_nt_xent import hard_nt_xent
from clae_fast.steps.batch import Batch
from clae_fast.steps.options import StepOptions, StepResult


class SSCL(HCL):
    r"""Synthetic hard negative samples (Dong et al., Neural Processing Letters 2024).

    Of the hardest negatives n of a row, pairs are drawn with replacement and mixed to unit vectors,

    .. math:: \alpha n_i + (1 - \alpha) n_j, \quad \alpha \sim U(0, 1)

    which are constants and further negatives of that row alone in the loss of HCL. In a batch with
    fewer negatives than `hard`, all of them are the hardest. The authors' stored code has the
    mixing, but takes n_i in its place; this is the text's.

    Args:
        encoder: f, from views to raw projections.
        temperature: Temperature of the softmax.
        adversarial: Whether to build the adversarial twin that attacks need.
        beta: How far the weights of negatives are concentrated on the nearest, from 0 on.
        tau_plus: Share of the negatives taken to be of an image's own class, in [0, 1).
        detach_weights: Whether the weights are constants in the gradient.
        hard: Hardest negatives of a row to mix, s in the paper.
        synthetic: Mixtures for each row, k in the paper.
    """

    name: ClassVar[str] = "sscl"

    def __init__(
        self,
        encoder: nn.Module,
        *,
        temperature: float = 0.5,
        adversarial: bool = False,
        beta: float = 1.0,
        tau_plus: float = 0.1,
        detach_weights: bool = False,
        hard: int = 64,
        synthetic: int = 32,
    ) -> None:
        super().__init__(
            encoder,
            temperature=temperature,
            adversarial=adversarial,
            beta=beta,
            tau_plus=tau_plus,
            detach_weights=detach_weights,
        )
        require_at_least(1, hard=hard, synthetic=synthetic)
        self.hard = hard
        self.synthetic = synthetic
        self._world = World.single()

    def _step(self, batch: Batch, options: StepOptions) -> StepResult:
        self._world = options.world
        return super()._step(batch, options)

    def loss(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        """`clae_fast.hard_nt_xent` of the two views, with the synthetic negatives' logits."""
        return hard_nt_xent(
            z_a,
            z_b,
            temperature=self.temperature,
            beta=self.beta,
            tau_plus=self.tau_plus,
            detach_weights=self.detach_weights,
            extra=self._similarities(torch.cat([z_a, z_b])) / self.temperature,
        )

    def _similarities(self, z: Tensor) -> Tensor:  # [2N, D] -> [2N, synthetic]
        """Those of each row to its synthetic negatives: of scalars, and inner products of rows."""
        u = F.normalize(z if z.dtype == torch.float64 else z.float())
        n, keys = len(u), u.detach()
        if n == 2:  # no negatives
            return u.new_empty(n, 0)
        row = torch.arange(n, device=u.device)
        exclude = torch.stack([row, row.roll(n // 2)], 1)
        s, indices = nearest(u, keys, min(self.hard, n - 2), exclude=exclude)
        own, gather = s[: n // self._world.size], self._world.all_gather
        # every process has the loss of all rows, and so all draws
        i, j = (gather(draw(own, self.synthetic)) for _ in range(2))
        alpha = gather(uniform(own, self.synthetic, 0, 1))
        n_i, n_j = (keys[indices.gather(1, columns)] for columns in (i, j))
        return mixed(alpha, s.gather(1, i), s.gather(1, j), (n_i * n_j).sum(2))
