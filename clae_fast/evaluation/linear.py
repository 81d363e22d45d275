"""A linear probe: multinomial logistic regression on cached features."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clae_fast import data

# weights of the penalty relative to the mean loss, from the largest to the smallest
PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)


def fit_linear(
    features: Tensor,  # [M, F]
    labels: Tensor,  # [M]
    *,
    seed: int = 0,
) -> nn.Linear:
    r"""Fits a linear classifier, whose penalty a tenth of the training images chooses.

    .. math:: \frac{1}{M} \sum_i -\log p_{y_i}(h_i) + \frac{\lambda}{2} \|W\|^2

    It is fitted to standardized features, without augmentation, by L-BFGS until it converges. A
    stratified tenth of the images is held out, and a classifier is fitted to the rest for each of
    `PENALTIES`. The penalty with the smallest loss on the held-out tenth is chosen; for few images
    the loss says more than the accuracy. With it a classifier is fitted to all images. No test
    image is involved.

    Args:
        features: Features to fit to.
        labels: Their classes, from 0.
        seed: Decides which images are held out.

    Returns:
        The classifier, which takes features that are not standardized. Its weights require no
        gradients.
    """
    classes = int(labels.max()) + 1
    held = data.stratified(labels.cpu(), max(1, len(labels) // 10), seed).to(labels.device)
    probes = _path(features[~held], labels[~held], classes, PENALTIES)
    losses = [float(F.cross_entropy(probe(features[held]), labels[held])) for probe in probes]
    chosen = losses.index(min(losses))
    return _path(features, labels, classes, PENALTIES[: chosen + 1])[-1]


@torch.no_grad()
def accuracy(classifier: nn.Module, x: Tensor, labels: Tensor) -> float:  # [N, ...], [N]
    """The accuracy of a classifier in per cent of the rows."""
    return 100 * float((classifier(x).argmax(dim=1) == labels).double().mean())


def linear_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    seed: int = 0,
) -> float:
    """The accuracy of the classifier that `fit_linear` fits.

    Args:
        train_features: Features to fit to, [M, F].
        train_labels: Their classes, [M].
        test_features: Features to classify, [N, F].
        test_labels: Their classes, [N].
        seed: Decides which training images choose the penalty.

    Returns:
        The accuracy in per cent of the test images.
    """
    probe = fit_linear(train_features, train_labels, seed=seed)
    return accuracy(probe, test_features, test_labels)


def _path(
    features: Tensor, labels: Tensor, classes: int, penalties: tuple[float, ...]
) -> list[nn.Linear]:
    """Yields a classifier for each penalty; each fit starts where the one before it ended."""
    # in float64, where weights for standardized features become weights for features
    wide = features.double()
    mean, std = wide.mean(dim=0), wide.std(dim=0, correction=0)
    # a feature that is constant up to rounding carries no information
    std = torch.where(std > 1e-6 * mean.abs(), std, 1.0)
    h = ((wide - mean) / std).float()
    weight = h.new_zeros(classes, h.shape[1], requires_grad=True)
    bias = h.new_zeros(classes, requires_grad=True)
    probes = []
    for penalty in penalties:
        _fit(h, labels, weight, bias, penalty)
        probe = nn.Linear(h.shape[1], classes, device=h.device).requires_grad_(False)
        scaled = weight.detach() / std
        probe.weight.copy_(scaled)
        probe.bias.copy_(bias.detach() - scaled @ mean)
        probes.append(probe)
    return probes


@torch.enable_grad()
def _fit(h: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, penalty: float) -> None:
    """Moves weight and bias to the minimum."""
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=1000,
        tolerance_grad=1e-5,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(h, weight, bias), labels)
        loss = loss + penalty / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
