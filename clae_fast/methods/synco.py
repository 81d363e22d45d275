"""SynCo: MoCo with six kinds of synthetic hard negatives."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from clae_fast.methods.queue import require_at_least
from clae_fast.methods.synthetic import SyntheticMethod, draw, uniform
from clae_fast.nn.negatives import mixed


class SynCo(SyntheticMethod):
    r"""Synthetic hard negatives (Giakoumoglou and Stathaki, arXiv 2410.02401, 2024).

    Of the hardest keys n of a query q, for that query alone, as constants:

    ============ ==================================== ======================================
    interpolated :math:`a q + (1 - a) n`              :math:`a \sim U(0, 0.5)`
    extrapolated :math:`q + b (n - q)`                :math:`b \sim U(1, 1.5)`
    pairs        :math:`c n_i + (1 - c) n_j`          :math:`c \sim U(0, 1)`
    noised       :math:`n + \epsilon`                 :math:`\epsilon \sim N(0, \sigma^2 I)`
    moved        :math:`n + \delta q`                 along the similarity's gradient
    signed       :math:`n + \eta\, \mathrm{sign}\, q` along its sign
    ============ ==================================== ======================================

    each of unit length, joining the queue in the softmax of MoCo. The authors' code has autograd
    find the gradient of the last two, which is q.

    Args:
        encoder: f, from views to raw projections.
        temperature: T, above 0.
        adversarial: Whether to build the adversarial twin that attacks need.
        queue_size: Keys in the queue, K.
        key_momentum: Of the key encoder, from 0 to 1.
        symmetric: Whether both views are queries and keys.
        norm_splits: Batches that BatchNorm sees a batch as.
        hard: Hardest keys of a query that others are made of.
        interpolated: How many of the first kind, and so on.
        extrapolated: As above.
        pairs: As above.
        noised: As above.
        moved: As above.
        signed: As above.
        sigma: Standard deviation of the noise.
        delta: Length of a move along the gradient.
        eta: Length of a move along its sign, in each coordinate.
        warmup: Part of the run before there are any.
    """

    name: ClassVar[str] = "synco"

    def __init__(
        self,
        encoder: nn.Module,
        *,
        temperature: float = 0.2,
        adversarial: bool = False,
        queue_size: int = 512,
        key_momentum: float = 0.99,
        symmetric: bool = False,
        norm_splits: int = 1,
        hard: int = 64,
        interpolated: int = 16,
        extrapolated: int = 16,
        pairs: int = 16,
        noised: int = 4,
        moved: int = 4,
        signed: int = 4,
        sigma: float = 0.01,
        delta: float = 0.01,
        eta: float = 0.01,
        warmup: float = 0.1,
    ) -> None:
        super().__init__(
            encoder,
            temperature=temperature,
            adversarial=adversarial,
            queue_size=queue_size,
            key_momentum=key_momentum,
            symmetric=symmetric,
            norm_splits=norm_splits,
            hard=hard,
            warmup=warmup,
        )
        counts = {
            "interpolated": interpolated,
            "extrapolated": extrapolated,
            "pairs": pairs,
            "noised": noised,
            "moved": moved,
            "signed": signed,
        }
        require_at_least(0, **counts)
        require_at_least(1, **{" + ".join(counts): sum(counts.values())})
        self.counts = counts
        self.sigma = sigma
        self.delta = delta
        self.eta = eta

    def synthetic(self, u: Tensor, s: Tensor, indices: Tensor) -> list[Tensor]:
        """All kinds, in the order of the table."""
        counts = self.counts
        columns = {kind: draw(s, count) for kind, count in counts.items()}
        of = {kind: s.gather(1, column) for kind, column in columns.items()}
        a = uniform(s, counts["interpolated"], 0, 0.5)
        # q + b (n - q) is a mixture with a = 1 - b
        b = uniform(s, counts["extrapolated"], -0.5, 0)
        c = uniform(s, counts["pairs"], 0, 1)
        other = draw(s, counts["pairs"])
        noise = self.sigma * torch.randn(
            len(s), counts["noised"], u.shape[1], dtype=s.dtype, device=s.device
        )
        signs = u.detach().sign()[:, None]
        return [
            mixed(a, torch.ones_like(a), of["interpolated"], of["interpolated"]),
            mixed(b, torch.ones_like(b), of["extrapolated"], of["extrapolated"]),
            mixed(
                c,
                of["pairs"],
                s.gather(1, other),
                self.between(indices, columns["pairs"], other),
            ),
            self._shifted(u, of["noised"], indices.gather(1, columns["noised"]), noise),
            (of["moved"] + self.delta)
            / (1 + 2 * self.delta * of["moved"].detach() + self.delta**2).sqrt(),
            self._shifted(u, of["signed"], indices.gather(1, columns["signed"]), self.eta * signs),
        ]

    def _shifted(
        self,
        u: Tensor,  # [N, D]
        s: Tensor,  # [N, count]
        rows: Tensor,  # [N, count]
        shift: Tensor,  # [N, count or 1, D]
    ) -> Tensor:
        """Similarities of queries to keys plus constant vectors, of unit length, [N, count]."""
        square = 1 + (2 * self.queue[rows] + shift).mul(shift).sum(2)
        return (s + torch.einsum("nd,ncd->nc", u, shift)) / square.sqrt()
