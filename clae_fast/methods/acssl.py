"""ACSSL: a student, a teacher, and the hardest negatives of each step. A reconstruction."""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor
from torch.nn import functional as F

from clae_fast.methods.options import Bounds, Count, Size
from clae_fast.methods.queue import Keys, QueueMethod
from clae_fast.nn.negatives import nearest

Form = Annotated[str, Bounds(("triplet", "softmax").__contains__, "triplet or softmax")]


class ACSSL(QueueMethod):
    r"""Adversarial contrastive self-supervised learning (Zhu et al., arXiv 2202.13072, 2022).

    A student learns to put each row nearer to the teacher's row of the same image than to the
    hardest other ones. This is a reconstruction: no more than the abstract was available, which
    names a student-teacher network that creates the views, hard negative pairs that are mined
    online, and a triplet-like loss that joins positive and hard negative pairs. Formulas and
    numbers are assumed:

    - The student takes view p and the teacher view q. The teacher's weights are the moving average
      of the student's.
    - Similarity is the cosine, :math:`s_{ij} = z_i \cdot t_j`, and the teacher has no gradient.
    - Hard negatives H(i) are the nearest of the teacher's other rows in the batch, or of its rows
      of past steps in a queue.
    - The loss has one of two forms, "triplet", which is a smooth hinge with the margin m, or
      "softmax":

      .. math:: \frac{1}{N |H|} \sum_i \sum_{j \in H(i)}
          \log \bigl(1 + e^{(s_{ij} - s_{ii} + m) / T}\bigr)
      .. math:: -\frac{1}{N} \sum_i \log \frac{e^{s_{ii} / T}}
          {e^{s_{ii} / T} + \sum_{j \in H(i)} e^{s_{ij} / T}}

    "Adversarial" in its name are the mined negatives; the attack of CLAE goes with it as with any
    method.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options(QueueMethod.Options):
        """Settings of ACSSL.

        Attributes:
            queue_size: How many rows of past steps the teacher's hard negatives come from; with 0
                they come from the batch.
            hard: How many hard negatives a row has, `|H|`.
            form: The form of the loss, "triplet" or "softmax".
            margin: The margin of the triplets, m.
        """

        queue_size: Count = 0
        hard: Size = 4
        form: Form = "triplet"
        margin: float = 0.0

        def __post_init__(self) -> None:
            super().__post_init__()
            self.require_as_many(self.hard)

    name = "acssl"
    options: Options

    def loss(self, z: Tensor, target: Keys) -> Tensor:
        """The loss in the chosen form, of the student's rows and the teacher's."""
        own, u = self.options, self.unit(z)
        positive = (u * target.rows).sum(1, keepdim=True)
        if len(self.queue):
            hard, _ = nearest(u, self.queue, own.hard)
        else:
            if own.hard >= len(u):
                raise ValueError(f"hard must be below the {len(u)} rows of a step, got {own.hard}")
            itself = torch.arange(len(u), device=u.device)[:, None]
            hard, _ = nearest(u, target.rows, own.hard, exclude=itself)
        if own.form == "triplet":
            above = (hard - positive + own.margin) / self.temperature
        else:
            above = (hard / self.temperature).logsumexp(1, keepdim=True)
            above = above - positive / self.temperature
        return target.weight * F.softplus(above).mean()
