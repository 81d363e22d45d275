"""Accuracy of an encoder and its linear probe on attacked images."""

import copy
import types
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from clae_fast.attack import LinfAttack
from clae_fast.evaluation.features import seeded
from clae_fast.steps.runner import PassRunner, gradient

# radii by name, in pixels of 0..1
RADII = {"8/255": 8 / 255, "4/255": 4 / 255}


def fgsm(eps: float) -> LinfAttack:
    """FGSM: one signed move from the image (Goodfellow et al., ICLR 2015)."""
    return LinfAttack(eps=eps, lo=0.0, hi=1.0, norm="eval")


def pgd20(eps: float) -> LinfAttack:
    """PGD-20: twenty moves of a quarter of the radius, from a random start (Madry, ICLR 2018)."""
    return LinfAttack(
        eps=eps, step_size=eps / 4, lo=0.0, hi=1.0, steps=20, start="random", norm="eval"
    )


ATTACKS = {"fgsm": fgsm, "pgd20": pgd20}


def attacked(
    classifier: nn.Module,
    x: Tensor,  # [N, 3, H, W]
    labels: Tensor,  # [N]
    attack: LinfAttack,
) -> Tensor:
    """Images near `x`, in 0..1, that raise the cross-entropy; gradients go to the images alone."""

    def rise(logits: Tensor) -> Tensor:
        # a sum, so that no image's gradient depends on how many there are
        return gradient(lambda z: F.cross_entropy(z, labels, reduction="sum"), logits)

    return PassRunner().attack(classifier, x, attack, rise)


def robust_accuracies(
    classifier: nn.Module, images: Iterable[tuple[Tensor, Tensor]], *, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Accuracies under FGSM and PGD-20 at each of `RADII`.

    An image counts as right if the classifier is right about the image and about the attacked
    image, since the image itself lies in the ball as well. So no accuracy exceeds the clean one,
    and only images that are classified right are attacked, as in AutoAttack.

    Args:
        classifier: Maps pixels in 0..1 to logits, [N, 3, H, W] -> [N, C], in eval mode.
        images: Batches of images, [B, 3, H, W], and their labels, [B].
        seed: Seed of the random starts.

    Returns:
        Accuracies in per cent, by attack and then by radius.
    """
    total = 0
    right = {name: dict.fromkeys(RADII, 0) for name in ATTACKS}
    with seeded(seed):
        for x, labels in tqdm(images, desc="robust accuracy", unit="batch", disable=None):
            total += len(x)
            x, labels = _only_right(classifier, x, labels)
            for name, attack in ATTACKS.items():
                for radius, eps in RADII.items():
                    x_adv = attacked(classifier, x, labels, attack(eps)) if len(x) else x
                    right[name][radius] += len(_only_right(classifier, x_adv, labels)[0])
    return {
        name: {radius: 100 * count / total for radius, count in counts.items()}
        for name, counts in right.items()
    }


def require_autoattack() -> types.ModuleType:
    """Imports the library of AutoAttack's authors.

    Raises:
        ValueError: It is not installed.
    """
    try:
        import pyautoattack
    except ModuleNotFoundError as error:
        raise ValueError(
            "autoattack needs pyautoattack, which is not installed: pip install 'clae_fast[robust]'"
        ) from error
    return pyautoattack


def autoattack_accuracies(
    classifier: nn.Module, images: Iterable[tuple[Tensor, Tensor]], *, seed: int = 0
) -> dict[str, float]:
    """Accuracies under the standard version of AutoAttack at each of `RADII`.

    Croce & Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse
    parameter-free attacks", ICML 2020, computed by their code, `pyautoattack`. Its targeted attacks
    aim at nine other classes, or at all others where there are fewer.

    Args:
        classifier: Maps pixels in 0..1 to logits, [N, 3, H, W] -> [N, C], in eval mode.
        images: Batches of images, [B, 3, H, W], and their labels, [B].
        seed: Seed of its random numbers.

    Returns:
        Accuracies in per cent by radius.

    Raises:
        ValueError: The library is not installed, or there are fewer than four classes.
    """
    library = require_autoattack()
    # its attacks call view() on gradients, whose layout follows that of the weights
    classifier = copy.deepcopy(classifier).to(memory_format=torch.contiguous_format)
    total = 0
    right = dict.fromkeys(RADII, 0)
    with seeded(seed):
        for x, labels in tqdm(images, desc="AutoAttack", unit="batch", disable=None):
            total += len(x)
            x, labels = _only_right(classifier, x.contiguous(), labels)
            if not len(x):
                continue
            with torch.no_grad():
                classes = classifier(x[:1]).shape[1]
            if classes < 4:
                raise ValueError(f"autoattack needs four classes at least, there are {classes}")
            for radius, eps in RADII.items():
                adversary = library.AutoAttack(classifier, eps=eps, seed=seed, device=x.device)
                targets = min(9, classes - 1)
                adversary.apgd_targeted.n_target_classes = targets
                adversary.fab.n_target_classes = targets
                x_adv, _ = adversary.run_standard_evaluation(x, labels, batch_size=len(x))
                right[radius] += len(_only_right(classifier, x_adv, labels)[0])
    return {radius: 100 * count / total for radius, count in right.items()}


@torch.no_grad()
def _only_right(classifier: nn.Module, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The images that are classified right, and their labels."""
    if not len(x):
        return x, labels
    found = classifier(x).argmax(dim=1) == labels
    return x[found], labels[found]
