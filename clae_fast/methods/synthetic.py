"""Methods that add synthetic negatives to a queue's, made of each query's hardest ones."""

from abc import abstractmethod

import torch
from torch import Tensor, nn

from clae_fast.methods.queue import QueueMethod, require_at_least
from clae_fast.nn.negatives import nearest


class SyntheticMethod(QueueMethod):
    """MoCo with further negatives for each query, on the way between hard ones or near them.

    Synthetic negatives are unit vectors and constants. Their logits follow from the similarities of
    the query to its hardest keys, see `clae_fast.nn.negatives.mixed`; vectors are read where a
    formula needs them, for inner products of keys. No vector is kept for a backward pass.

    Args:
        encoder: f, from views to raw projections.
        temperature: T, above 0.
        adversarial: Whether to build the adversarial twin that attacks need.
        queue_size: Keys in the queue, K.
        key_momentum: Of the key encoder, from 0 to 1.
        symmetric: Whether both views are queries and keys.
        norm_splits: Batches that BatchNorm sees a batch as.
        hard: Nearest keys of a query that its synthetic negatives are made of.
        warmup: Part of the run before there are any.
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        temperature: float,
        adversarial: bool,
        queue_size: int,
        key_momentum: float,
        symmetric: bool,
        norm_splits: int,
        hard: int,
        warmup: float,
    ) -> None:
        super().__init__(
            encoder,
            temperature=temperature,
            adversarial=adversarial,
            queue_size=queue_size,
            key_momentum=key_momentum,
            symmetric=symmetric,
            norm_splits=norm_splits,
        )
        require_at_least(1, queue_size=queue_size, hard=hard)
        if hard > queue_size:
            raise ValueError(f"hard must be at most queue_size ({queue_size}), got {hard}")
        if not 0 <= warmup <= 1:
            raise ValueError(f"warmup must be in [0, 1], got {warmup}")
        self.hard = hard
        self.warmup = warmup
        self._synthesizes = warmup == 0

    @property
    def phase(self) -> str:
        """Whether there are synthetic negatives yet."""
        return "synthetic" if self._synthesizes else ""

    def before_step(self, progress: float) -> None:
        """Begins with synthetic negatives when the warm-up is over."""
        self._synthesizes = progress >= self.warmup

    @abstractmethod
    def synthetic(
        self,
        u: Tensor,  # [N, D]
        s: Tensor,  # [N, hard]
        indices: Tensor,  # [N, hard]
    ) -> list[Tensor]:
        """Similarities of each query to its synthetic negatives, [N, ...] of each kind.

        Args:
            u: Unit queries.
            s: Their similarities to their hardest keys.
            indices: Rows of the queue where these are.
        """

    def between(
        self,
        indices: Tensor,  # [N, hard]
        i: Tensor,  # [N, count]
        j: Tensor,  # as i
    ) -> Tensor:
        """Inner products of the i-th and the j-th hardest keys, [N, count]."""
        n_i, n_j = (self.queue[indices.gather(1, columns)] for columns in (i, j))
        return (n_i * n_j).sum(2)

    def negatives(self, u: Tensor) -> Tensor:
        """Of the queue, and of synthetic ones after the warm-up."""
        real = super().negatives(u)
        if not self._synthesizes:
            return real
        s = torch.cat(self.synthetic(u, *nearest(u, self.queue, self.hard)), dim=1)
        return torch.logaddexp(real, (s / self.temperature).logsumexp(1))


def draw(s: Tensor, count: int) -> Tensor:  # [N, hard] -> [N, count]
    """Columns of `s`, drawn at random for each row, perhaps more than once."""
    return torch.randint(s.shape[1], (len(s), count), device=s.device)


def uniform(s: Tensor, count: int, low: float, high: float) -> Tensor:  # -> [N, count]
    """Random numbers of the kind of `s`, for each of its rows."""
    return torch.empty(len(s), count, dtype=s.dtype, device=s.device).uniform_(low, high)
