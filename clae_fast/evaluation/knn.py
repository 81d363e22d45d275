"""A weighted vote of the nearest training images (kNN)."""

import torch
from torch import Tensor

from clae_fast.ops import topk_similarity


@torch.no_grad()
def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    k: int | None = None,
    sigma: float = 0.1,
) -> float:
    r"""Accuracy of a weighted vote among the k nearest training images.

    A neighbor with cosine similarity c votes for its class with the weight :math:`e^{c / \sigma}`
    (Wu et al., "Unsupervised feature learning via non-parametric instance discrimination", 2018).

    Args:
        train_features: Features of the images that vote, [M, F].
        train_labels: Their classes, from 0, [M].
        test_features: Features of the images to classify, [N, F].
        test_labels: Their classes, [N].
        k: How many neighbors vote. The default is 200, but at most one in 50 training images.
        sigma: Temperature of the weights.

    Returns:
        The accuracy in per cent of the test images.
    """
    k = min(k or _voters(len(train_labels)), len(train_labels))
    correct = 0
    for features, labels in zip(test_features.split(1024), test_labels.split(1024), strict=True):
        nearest, rows = topk_similarity(features, train_features, k)  # [B, k]
        correct += _correct(nearest, train_labels[rows], labels, sigma)
    return 100 * correct / len(test_labels)


@torch.no_grad()
def leave_one_out_knn(
    features: Tensor,  # [N, F]
    labels: Tensor,  # [N]
    *,
    sigma: float = 0.1,
) -> float:
    """`knn_accuracy` of images that are each voted for by the others, two at least."""
    own = torch.arange(len(labels), device=features.device)[:, None]
    nearest, rows = topk_similarity(features, features, _voters(len(labels)), exclude=own)
    return 100 * _correct(nearest, labels[rows], labels, sigma) / len(labels)


def _voters(images: int) -> int:
    return max(1, min(200, images // 50))


def _correct(
    nearest: Tensor,  # [B, k]
    votes_for: Tensor,  # [B, k]
    labels: Tensor,  # [B]
    sigma: float,
) -> int:
    """How many rows get the right class by the vote of their neighbors at these cosines."""
    classes = int(votes_for.max()) + 1
    votes = nearest.new_zeros(len(nearest), classes)  # [B, C]
    # weights are relative to the nearest neighbor's: no ranking changes, and none overflows
    weights = ((nearest - nearest[:, :1]) / sigma).exp()
    votes.scatter_add_(1, votes_for, weights)
    return int((votes.argmax(dim=1) == labels).sum())
