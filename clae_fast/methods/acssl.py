"""ACSSL: a student, a teacher, and the hardest negatives of each step. A reconstruction."""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clae_fast.methods.queue import Keys, QueueMethod, require_at_least
from clae_fast.nn.negatives import nearest


class ACSSL(QueueMethod):
    r"""Adversarial contrastive self-supervised learning (Zhu et al., arXiv 2202.13072, 2022).

    A reconstruction: no more than the abstract was available, which names a student-teacher
    network that creates the views, hard negative pairs mined online, and a triplet-like loss that
    joins positive and hard negative pairs. Assumed, in default of formulas and numbers:

    - the student takes view p, the teacher view q, and the teacher's weights are the student's
      moving average;
    - similarity is the cosine, :math:`s_{ij} = z_i \cdot t_j`, and the teacher has no gradient;
    - hard negatives H(i) are the nearest of the teacher's other rows in the batch, or of those of
      past steps in a queue;
    - the loss is one of

      .. math:: \frac{1}{N |H|} \sum_i \sum_{j \in H(i)}
          \log \bigl(1 + e^{(s_{ij} - s_{ii} + m) / T}\bigr)
      .. math:: -\frac{1}{N} \sum_i \log \frac{e^{s_{ii} / T}}
          {e^{s_{ii} / T} + \sum_{j \in H(i)} e^{s_{ij} / T}}

      "triplet", a smooth hinge with the margin m, or "softmax".

    "Adversarial" are the mined negatives; CLAE's attack goes with it as with any method.

    Args:
        encoder: f, the student, from views to raw projections; the teacher starts as its copy.
        temperature: T, above 0.
        adversarial: Whether to build the adversarial twin that attacks need.
        queue_size: Rows of past steps to mine from; 0 mines in the batch.
        key_momentum: Of the teacher, from 0 to 1.
        hard: Hard negatives of a row, `|H|`.
        form: "triplet" or "softmax".
        margin: m of the triplets.
    """

    name: ClassVar[str] = "acssl"

    def __init__(
        self,
        encoder: nn.Module,
        *,
        temperature: float = 0.2,
        adversarial: bool = False,
        queue_size: int = 0,
        key_momentum: float = 0.99,
        hard: int = 4,
        form: str = "triplet",
        margin: float = 0.0,
    ) -> None:
        super().__init__(
            encoder,
            temperature=temperature,
            adversarial=adversarial,
            queue_size=queue_size,
            key_momentum=key_momentum,
        )
        require_at_least(1, hard=hard)
        if form not in ("triplet", "softmax"):
            raise ValueError(f"form must be triplet or softmax, got {form!r}")
        if 0 < queue_size < hard:
            raise ValueError(f"hard must be at most queue_size ({queue_size}), got {hard}")
        self.hard = hard
        self.form = form
        self.margin = margin

    def loss(self, z: Tensor, target: Keys) -> Tensor:
        """The loss of the form chosen, of the student's rows and the teacher's."""
        u = F.normalize(z.to(self.queue.dtype))
        positive = (u * target.rows).sum(1, keepdim=True)
        if len(self.queue):
            hard, _ = nearest(u, self.queue, self.hard)
        else:
            if self.hard >= len(u):
                raise ValueError(f"hard must be below the {len(u)} rows of a step, got {self.hard}")
            own = torch.arange(len(u), device=u.device)[:, None]
            hard, _ = nearest(u, target.rows, self.hard, exclude=own)
        if self.form == "triplet":
            above = (hard - positive + self.margin) / self.temperature
        else:
            above = (hard / self.temperature).logsumexp(1, keepdim=True)
            above = above - positive / self.temperature
        return target.weight * F.softplus(above).mean()
