"""How good features are: a weighted kNN vote and a linear probe on an encoder's features h."""

import torch
from torch import Tensor

from clae_fast import data
from clae_fast.config import Config
from clae_fast.device import to_device
from clae_fast.nn import Encoder
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

    A neighbour at cosine similarity c votes for its class with weight :math:`e^{c / \sigma}`
    (Wu et al., "Unsupervised feature learning via non-parametric instance discrimination", 2018).

    Args:
        train_features: voters.  # [M, F]
        train_labels: their classes, from 0.  # [M]
        test_features: images to classify.  # [N, F]
        test_labels: their classes.  # [N]
        k: neighbours that vote; 200 by default, but at most one in 50 of the training images.
        sigma: temperature of the weights.

    Returns:
        Per cent of the test images whose class wins.
    """
    classes = int(train_labels.max()) + 1
    k = min(k or max(1, min(200, len(train_labels) // 50)), len(train_labels))
    correct = 0
    for features, labels in zip(test_features.split(1024), test_labels.split(1024), strict=True):
        nearest, rows = topk_similarity(features, train_features, k)  # [B, k]
        votes = nearest.new_zeros(len(features), classes)  # [B, C]
        # relative to the nearest one, which changes no ranking and cannot overflow
        weights = ((nearest - nearest[:, :1]) / sigma).exp()
        votes.scatter_add_(1, train_labels[rows], weights)
        correct += int((votes.argmax(dim=1) == labels).sum())
    return 100 * correct / len(test_labels)


def linear_accuracy(
    train_features: Tensor, train_labels: Tensor, test_features: Tensor, test_labels: Tensor
) -> float:
    """Accuracy of a logistic regression on standardised features, without augmentation.

    Args:
        train_features: features to fit on.  # [M, F]
        train_labels: their classes.  # [M]
        test_features: features to classify.  # [N, F]
        test_labels: their classes.  # [N]

    Returns:
        Per cent of the test images that are classified right.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000, tol=1e-3))
    probe.fit(train_features.cpu().numpy(), train_labels.cpu().numpy())
    return 100 * float(probe.score(test_features.cpu().numpy(), test_labels.cpu().numpy()))


@torch.no_grad()
def extract_features(
    encoder: Encoder, split: data.Split, config: Config, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Features h and labels of a split, in order; leaves `encoder` in eval mode.

    Returns:
        The features and the labels.  # [N, F], [N]
    """
    encoder.eval()
    loader = data.image_loader(
        split,
        data.eval_transform(config.image_size),
        batch_size=config.batch_size,
        workers=config.workers,
        pin_memory=device.type == "cuda",
    )
    # a compiled encoder would be compiled anew for eval mode and for the last, smaller batch
    with torch.compiler.set_stance("force_eager"):
        batches = [
            (encoder.features(to_device(x, device)), labels.to(device)) for x, labels in loader
        ]
    features, labels = zip(*batches, strict=True)
    return torch.cat(features), torch.cat(labels)
