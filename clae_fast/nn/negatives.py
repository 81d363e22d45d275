"""Constant keys as negatives of anchors: all of them in one number, or the hardest one by one."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from clae_fast.ops.info_nce import info_nce
from clae_fast.ops.topk_similarity import topk_similarity


def log_sum_exp(
    anchor: Tensor,  # [N, D]
    keys: Tensor,  # [M, D]
    *,
    temperature: float,
) -> Tensor:
    r"""What all keys add to the denominator of each anchor's softmax, without an N x M matrix.

    .. math:: \log \sum_j e^{a_i \cdot k_j / T}

    Args:
        anchor: Unit rows.
        keys: Unit rows, constants, M >= N.
        temperature: T, above 0.

    Returns:
        [N], differentiable in `anchor`, up to its gradient along the anchors themselves, which
        normalisation discards.
    """
    # any key may be the positive that InfoNCE puts in the numerator: it is taken out again
    positive = (anchor * keys[: len(anchor)]).sum(1) / temperature
    return info_nce(anchor, keys, temperature=temperature, reduction="none") + positive


def nearest(
    anchor: Tensor,  # [N, D]
    keys: Tensor,  # [M, D]
    k: int,
    *,
    exclude: Tensor | None = None,  # [N, E]
) -> tuple[Tensor, Tensor]:
    """The k keys that are hardest to tell from each anchor, as `clae_fast.topk_similarity`.

    Args:
        anchor: Unit rows.
        keys: Unit rows, constants.
        k: How many.
        exclude: Columns that a row does not return.

    Returns:
        The similarities, [N, k], differentiable in `anchor`; no key is gathered either way. And the
        indices of their keys, int64 [N, k].
    """
    values, indices = _Nearest.apply(anchor, keys, k, exclude)
    return values, indices


class _Nearest(torch.autograd.Function):
    """Similarities that are known go back as a weighted sum of their keys."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, keys: Tensor, k: int, exclude: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        values, indices = topk_similarity(anchor, keys, k, exclude=exclude)
        ctx.save_for_backward(keys, indices)
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dvalues: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        keys, indices = ctx.saved_tensors
        # a sum over a bag of rows, which are read where they are
        danchor = F.embedding_bag(indices, keys, per_sample_weights=dvalues, mode="sum")
        return danchor, None, None, None


def mixed(
    a: Tensor,  # [N, k]
    s_i: Tensor,  # as a
    s_j: Tensor,  # as a
    dot: Tensor,  # as a
) -> Tensor:
    r"""Similarity of an anchor to synthetic keys between (or beyond) two unit vectors.

    .. math:: a \cdot \frac{\alpha n_i + (1 - \alpha) n_j}{\|\alpha n_i + (1 - \alpha) n_j\|} =
        \frac{\alpha s_i + (1 - \alpha) s_j}{\|\cdot\|}, \quad
        \|\cdot\|^2 = \alpha^2 + (1 - \alpha)^2 + 2 \alpha (1 - \alpha) n_i \cdot n_j

    of scalars alone. The synthetic key is a constant, whatever it is made of.

    Args:
        a: The parts alpha of the first vectors.
        s_i: Similarities of the anchor to the first vectors; 1 where these are the anchor itself.
        s_j: Similarities of the anchor to the second vectors.
        dot: Similarities of the first vectors to the second.
    """
    b = 1 - a
    norm = (a.square() + b.square() + 2 * a * b * dot.detach()).sqrt()
    return (a * s_i + b * s_j) / norm
