"""SynCo: MoCo with six kinds of synthetic hard negatives."""

from dataclasses import dataclass

import torch
from torch import Tensor

from clae_fast.methods.options import Count, Size, require_any
from clae_fast.methods.synthetic import SyntheticMethod, draw, uniform
from clae_fast.nn.negatives import mixed

_KINDS = ("interpolated", "extrapolated", "pairs", "noised", "moved", "signed")


class SynCo(SyntheticMethod):
    r"""Synthetic hard negatives (Giakoumoglou and Stathaki, arXiv 2410.02401, 2024).

    Each query q of MoCo gets further negatives, which are made of its hardest keys n in the queue.
    There are six kinds, unit vectors along

    ============ ==================================== ======================================
    interpolated :math:`a q + (1 - a) n`              :math:`a \sim U(0, 0.5)`
    extrapolated :math:`q + b (n - q)`                :math:`b \sim U(1, 1.5)`
    pairs        :math:`c n_i + (1 - c) n_j`          :math:`c \sim U(0, 1)`
    noised       :math:`n + \epsilon`                 :math:`\epsilon \sim N(0, \sigma^2 I)`
    moved        :math:`n + \delta q`                 along the similarity's gradient
    signed       :math:`n + \eta\, \mathrm{sign}\, q` along its sign
    ============ ==================================== ======================================

    which are constants and join the queue in the softmax for that query alone. The gradient of the
    last two kinds is q itself; the authors' code has autograd find it.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options(SyntheticMethod.Options):
        """Settings of SynCo.

        Attributes:
            hard: How many of a query's hardest keys the others are made of.
            interpolated: How many negatives of the first kind each query gets.
            extrapolated: How many of the second kind.
            pairs: How many of the third kind.
            noised: How many of the fourth kind.
            moved: How many of the fifth kind.
            signed: How many of the sixth kind.
            sigma: Standard deviation of the noise.
            delta: Length of a move along the gradient.
            eta: Length of a move along its sign, in each coordinate.
        """

        hard: Size = 64
        interpolated: Count = 16
        extrapolated: Count = 16
        pairs: Count = 16
        noised: Count = 4
        moved: Count = 4
        signed: Count = 4
        sigma: float = 0.01
        delta: float = 0.01
        eta: float = 0.01

        def __post_init__(self) -> None:
            super().__post_init__()
            require_any(**{kind: getattr(self, kind) for kind in _KINDS})

    name = "synco"
    options: Options

    def synthetic(self, u: Tensor, s: Tensor, indices: Tensor) -> list[Tensor]:
        """Negatives of all kinds, in the order of the table."""
        own = self.options
        columns = {kind: draw(s, getattr(own, kind)) for kind in _KINDS}
        of = {kind: s.gather(1, column) for kind, column in columns.items()}
        a = uniform(s, own.interpolated, 0, 0.5)
        # q + b (n - q) is a mixture with a = 1 - b
        b = uniform(s, own.extrapolated, -0.5, 0)
        c = uniform(s, own.pairs, 0, 1)
        other = draw(s, own.pairs)
        dot = self.between(indices, columns["pairs"], other)
        noise = torch.randn(len(s), own.noised, u.shape[1], dtype=s.dtype, device=s.device)

        def shifted(kind: str, shift: Tensor) -> Tensor:  # [N, count or 1, D] -> [N, count]
            keys = self.queue[indices.gather(1, columns[kind])]
            square = 1 + (2 * keys + shift).mul(shift).sum(2)
            return (of[kind] + torch.einsum("nd,ncd->nc", u, shift)) / square.sqrt()

        return [
            mixed(a, torch.ones_like(a), of["interpolated"], of["interpolated"]),
            mixed(b, torch.ones_like(b), of["extrapolated"], of["extrapolated"]),
            mixed(c, of["pairs"], s.gather(1, other), dot),
            shifted("noised", own.sigma * noise),
            (of["moved"] + own.delta)
            / (1 + 2 * own.delta * of["moved"].detach() + own.delta**2).sqrt(),
            shifted("signed", own.eta * u.detach().sign()[:, None]),
        ]
