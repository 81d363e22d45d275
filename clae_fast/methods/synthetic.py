"""MoCo with synthetic negatives: what MoCHi and SynCo share."""

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from clae_fast.methods.moco import MoCo
from clae_fast.methods.options import Fraction, Size
from clae_fast.nn.negatives import nearest


class SyntheticMethod(MoCo):
    """MoCo with further negatives that are made for each query, of its hardest ones in the queue.

    Synthetic negatives are unit vectors and constants, between the hardest keys or near them. Their
    logits follow from the similarities of the query to these keys, see
    `clae_fast.nn.negatives.mixed`. Vectors are read only where a formula needs inner products of
    keys, and none is kept for the backward pass.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options(MoCo.Options):
        """Settings of a method with synthetic negatives.

        Attributes:
            hard: Of how many of its nearest keys a query's synthetic negatives are made.
            warmup: The part of the run that passes before there are any.
        """

        hard: Size
        warmup: Fraction = 0.1

        def __post_init__(self) -> None:
            super().__post_init__()
            self.require_as_many(self.hard)

    options: Options
    _progress = 0.0

    @property
    def phase(self) -> str:
        """Whether there are synthetic negatives yet."""
        return "synthetic" if self._progress >= self.options.warmup else ""

    def before_step(self, progress: float) -> None:
        """Notes how far the run is: synthetic negatives begin when the warm-up is over."""
        self._progress = progress

    @abstractmethod
    def synthetic(self, u: Tensor, s: Tensor, indices: Tensor) -> list[Tensor]:
        """Similarities of each query to its synthetic negatives, [N, ...] of each kind.

        Args:
            u: Unit queries, [N, D].
            s: Their similarities to their hardest keys, [N, hard].
            indices: The rows of these keys in the queue, [N, hard].
        """

    def between(self, indices: Tensor, i: Tensor, j: Tensor) -> Tensor:  # -> as i, [N, count]
        """Inner products of the i-th and the j-th hardest keys, whose rows `indices` has."""
        n_i, n_j = (self.queue[indices.gather(1, columns)] for columns in (i, j))
        return (n_i * n_j).sum(2)

    def negatives(self, u: Tensor) -> Tensor:
        """As of MoCo; once the warm-up is over, synthetic negatives are added to the queue's."""
        real = super().negatives(u)
        if not self.phase:
            return real
        s = torch.cat(self.synthetic(u, *nearest(u, self.queue, self.options.hard)), dim=1)
        return torch.logaddexp(real, (s / self.temperature).logsumexp(1))


def draw(s: Tensor, count: int) -> Tensor:  # [N, hard] -> [N, count]
    """Columns of `s`, drawn at random for each row, perhaps more than once."""
    return torch.randint(s.shape[1], (len(s), count), device=s.device)


def uniform(s: Tensor, count: int, low: float, high: float) -> Tensor:  # -> [N, count]
    """Random numbers of the type of `s`, for each of its rows."""
    return torch.empty(len(s), count, dtype=s.dtype, device=s.device).uniform_(low, high)
