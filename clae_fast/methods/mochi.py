"""MoCHi: MoCo with mixtures of hard negatives as further negatives."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from clae_fast.methods.queue import require_at_least
from clae_fast.methods.synthetic import SyntheticMethod, draw, uniform
from clae_fast.nn.negatives import mixed


class MoCHi(SyntheticMethod):
    r"""Hard negative mixing (Kalantidis et al., NeurIPS 2020).

    Of the hardest keys n of a query q, two kinds of unit vectors are made for that query alone,

    .. math:: \alpha n_i + (1 - \alpha) n_j, \quad \alpha \sim U(0, 1)
    .. math:: \beta q + (1 - \beta) n_j, \quad \beta \sim U(0, 0.5)

    and join the queue in the softmax of MoCo as constants. A reconstruction in two points: pairs
    are drawn with replacement, as an implementation by others does, whose numbers of each kind are
    the defaults; the paper's, and the length of its warm-up, were not available.

    Args:
        encoder: f, from views to raw projections.
        temperature: T, above 0.
        adversarial: Whether to build the adversarial twin that attacks need.
        queue_size: Keys in the queue, K.
        key_momentum: Of the key encoder, from 0 to 1.
        symmetric: Whether both views are queries and keys.
        norm_splits: Batches that BatchNorm sees a batch as.
        hard: Hardest keys of a query to mix, N in the paper.
        pairs: Mixtures of two of them, s in the paper.
        with_query: Mixtures of the query and one of them, s' in the paper.
        warmup: Part of the run before there are any.
    """

    name: ClassVar[str] = "mochi"

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
        hard: int = 32,
        pairs: int = 16,
        with_query: int = 16,
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
        require_at_least(0, pairs=pairs, with_query=with_query)
        require_at_least(1, **{"pairs + with_query": pairs + with_query})
        self.pairs = pairs
        self.with_query = with_query

    def synthetic(self, u: Tensor, s: Tensor, indices: Tensor) -> list[Tensor]:
        """Mixtures of pairs, then with the query."""
        i, j, k = draw(s, self.pairs), draw(s, self.pairs), draw(s, self.with_query)
        alpha, beta = uniform(s, self.pairs, 0, 1), uniform(s, self.with_query, 0, 0.5)
        dot = self.between(indices, i, j)
        s_k = s.gather(1, k)
        return [
            mixed(alpha, s.gather(1, i), s.gather(1, j), dot),
            mixed(beta, torch.ones_like(beta), s_k, s_k),
        ]
