"""MoCHi: MoCo with mixtures of hard negatives as further negatives."""

from dataclasses import dataclass

import torch
from torch import Tensor

from clae_fast.methods.options import Count, Size, require_any
from clae_fast.methods.synthetic import SyntheticMethod, draw, uniform
from clae_fast.nn.negatives import mixed


class MoCHi(SyntheticMethod):
    r"""Hard negative mixing (Kalantidis et al., NeurIPS 2020).

    Each query q of MoCo gets further negatives, which are mixed of its hardest keys n in the queue.
    There are two kinds, unit vectors along

    .. math:: \alpha n_i + (1 - \alpha) n_j, \quad \alpha \sim U(0, 1)
    .. math:: \beta q + (1 - \beta) n_j, \quad \beta \sim U(0, 0.5)

    which are constants and join the queue in the softmax for that query alone.

    This is a reconstruction in two points. Pairs are drawn with replacement, and the default
    numbers of each kind are those of an implementation by others, because the paper's numbers and
    the length of its warm-up were not available.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options(SyntheticMethod.Options):
        """Settings of MoCHi.

        Attributes:
            hard: How many of a query's hardest keys are mixed, N in the paper.
            pairs: How many mixtures of two of them there are, s in the paper.
            with_query: How many mixtures of the query and one of them, s' in the paper.
        """

        hard: Size = 32
        pairs: Count = 16
        with_query: Count = 16

        def __post_init__(self) -> None:
            super().__post_init__()
            require_any(pairs=self.pairs, with_query=self.with_query)

    name = "mochi"
    options: Options

    def synthetic(self, u: Tensor, s: Tensor, indices: Tensor) -> list[Tensor]:
        """Mixtures of pairs, then mixtures with the query."""
        pairs, with_query = self.options.pairs, self.options.with_query
        i, j, k = draw(s, pairs), draw(s, pairs), draw(s, with_query)
        alpha, beta = uniform(s, pairs, 0, 1), uniform(s, with_query, 0, 0.5)
        s_k = s.gather(1, k)
        return [
            mixed(alpha, s.gather(1, i), s.gather(1, j), self.between(indices, i, j)),
            mixed(beta, torch.ones_like(beta), s_k, s_k),
        ]
