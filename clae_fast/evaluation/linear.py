"""A linear probe: multinomial logistic regression on cached features."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clae_fast import data

# weights of the penalty on the mean loss, from the strongest on
PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)


def fit_linear(
    features: Tensor,  # [M, F]
    labels: Tensor,  # [M]
    *,
    seed: int = 0,
) -> nn.Linear:
    r"""Fits a linear classifier, its penalty chosen on a tenth of the training images.

    .. math:: \frac{1}{M} \sum_i -\log p_{y_i}(h_i) + \frac{\lambda}{2} \|W\|^2

    on standardised features, without augmentation, by L-BFGS to convergence. A stratified tenth is
    held out, each of `PENALTIES` is fitted on the rest, and the one with the smallest loss on that
    tenth, which says more of few images than the accuracy does, is fitted anew on all. No test
    image has a part in it.

    Args:
        features: Features to fit on.
        labels: Their classes, from 0.
        seed: Which images are held out.

    Returns:
        The classifier, which takes features as they are; its weights want no gradients.
    """
    classes = int(labels.max()) + 1
    held = data.stratified(labels.cpu(), max(1, len(labels) // 10), seed).to(labels.device)
    probes = _path(features[~held], labels[~held], classes, PENALTIES)
    losses = [float(F.cross_entropy(probe(features[held]), labels[held])) for probe in probes]
    chosen = losses.index(min(losses))
    return _path(features, labels, classes, PENALTIES[: chosen + 1])[-1]


@torch.no_grad()
def accuracy(classifier: nn.Module, x: Tensor, labels: Tensor) -> float:  # [N, ...], [N]
    """Per cent of the rows that a classifier gets right."""
    return 100 * float((classifier(x).argmax(dim=1) == labels).double().mean())


def linear_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    seed: int = 0,
) -> float:
    """Accuracy of `fit_linear`.

    Args:
        train_features: features to fit on.  # [M, F]
        train_labels: their classes.  # [M]
        test_features: features to classify.  # [N, F]
        test_labels: their classes.  # [N]
        seed: which training images choose the penalty.

    Returns:
        Per cent of the test images that are classified right.
    """
    probe = fit_linear(train_features, train_labels, seed=seed)
    return accuracy(probe, test_features, test_labels)


def _path(
    features: Tensor, labels: Tensor, classes: int, penalties: tuple[float, ...]
) -> list[nn.Linear]:
    """A classifier for each penalty, each fitted from where the one before it ended."""
    # in float64, where weights for standardised features become weights for features
    wide = features.double()
    mean, std = wide.mean(dim=0), wide.std(dim=0, correction=0)
    # what is constant up to rounding says nothing
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
