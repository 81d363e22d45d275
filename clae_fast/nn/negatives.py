"""Negatives of anchors among constant keys: the sum over all of them, or the hardest ones."""

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
    r"""The log of what all keys add to each anchor's softmax denominator, without an N x M matrix.

    .. math:: \log \sum_j e^{a_i \cdot k_j / T}

    Args:
        anchor: Unit rows.
        keys: Unit rows, constants, M >= N.
        temperature: T, above 0.

    Returns:
        [N], differentiable in `anchor`. The part of the gradient along an anchor itself is not
        exact; normalization of the anchor discards it.
    """
    # InfoNCE needs some key as the positive of its numerator, which is taken out again here
    positive = (anchor * keys[: len(anchor)]).sum(1) / temperature
    return info_nce(anchor, keys, temperature=temperature, reduction="none") + positive


def nearest(
    anchor: Tensor,  # [N, D]
    keys: Tensor,  # [M, D]
    k: int,
    *,
    exclude: Tensor | None = None,  # [N, E]
) -> tuple[Tensor, Tensor]:
    """The k keys that are most similar to each anchor, by `clae_fast.topk_similarity`.

    Args:
        anchor: Unit rows.
        keys: Unit rows, constants.
        k: How many keys each anchor gets.
        exclude: Columns that a row must not return.

    Returns:
        The similarities, [N, k], differentiable in `anchor`, and the indices of their keys, int64
        [N, k]. No copy of the keys is gathered, in either direction.
    """
    values, indices = _Nearest.apply(anchor, keys, k, exclude)
    return values, indices


class _Nearest(torch.autograd.Function):
    """Top-k similarities; the gradient of an anchor is a weighted sum of its k keys."""

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
        # embedding_bag reads the rows in place
        danchor = F.embedding_bag(indices, keys, per_sample_weights=dvalues, mode="sum")
        return danchor, None, None, None


def mixed(
    a: Tensor,  # [N, k]
    s_i: Tensor,  # as a
    s_j: Tensor,  # as a
    dot: Tensor,  # as a
) -> Tensor:
    r"""Similarity of an anchor a to synthetic keys, unit vectors on the line through two others.

    .. math:: a \cdot \frac{\alpha n_i + (1 - \alpha) n_j}{\|\alpha n_i + (1 - \alpha) n_j\|} =
        \frac{\alpha s_i + (1 - \alpha) s_j}{\|\cdot\|}, \quad
        \|\cdot\|^2 = \alpha^2 + (1 - \alpha)^2 + 2 \alpha (1 - \alpha) n_i \cdot n_j

    It is computed from scalars alone. The norm is a constant, so that no gradient flows into the
    synthetic key.

    Args:
        a: alpha, the parts of the first vectors.
        s_i: Similarities of the anchor to the first vectors; 1 where these are the anchor itself.
        s_j: Similarities of the anchor to the second vectors.
        dot: Similarities of the first vectors to the second ones.
    """
    b = 1 - a
    norm = (a.square() + b.square() + 2 * a * b * dot.detach()).sqrt()
    return (a * s_i + b * s_j) / norm
