"""The protocol of CLAE's released code, to compare with the numbers that it gives.

What is as there (commit 6986061): a kNN vote of 200 neighbours on the output, the projection z,
with the temperature 0.5 for SimCLR and 0.1 for the others; logistic regression by Adam at 3e-4 on
h for SimCLR and on the normalised z for the others, without augmentation, in shuffled batches of
256 or 128 whose incomplete last one is dropped, over 1000 epochs (200 for the others on
Tiny ImageNet); test images beyond full batches are left out of it; the epoch that does best on the
test images is reported. So that number is chosen by the test set, and says so in its name; the last
epoch's stands beside it.

What is not: features are computed once, where the code computes them anew for every epoch, which
gives the same ones; the checkpoint is the one that is evaluated, where the code's Plain and UEL
take the one with the best vote on the test images; all training images vote, where the code's
SimCLR scatters some of its last batch to wrong columns; where there are fewer images than a batch,
they are one. Methods that CLAE does not have are evaluated as its Plain and UEL.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clae_fast.config import Config
from clae_fast.evaluation.features import seeded
from clae_fast.evaluation.knn import knn_accuracy
from clae_fast.evaluation.linear import accuracy
from clae_fast.nn import Encoder


@torch.no_grad()
def released_protocol(
    encoder: Encoder,
    config: Config,
    train: tuple[Tensor, Tensor],  # [M, F], [M]
    test: tuple[Tensor, Tensor],  # [N, F], [N]
    *,
    epochs: int | None = None,
) -> dict[str, float | int]:
    """Evaluates features as the released code does.

    Args:
        encoder: Whose head makes projections of them.
        config: The run's settings, which say which of the code's parts it is.
        train: Features h of the training images, and labels.
        test: The same of the test images.
        epochs: Of the logistic regression; the code's by default.

    Returns:
        "knn"; "linear_selected_on_test", "linear_last_epoch" and the "best_epoch" that was
        selected, from 1; how many "test_images" the regression saw.
    """
    simclr = config.objective.method == "simclr"
    z_train, z_test = (F.normalize(encoder.head(h)) for h, _ in (train, test))
    vote = knn_accuracy(z_train, train[1], z_test, test[1], k=200, sigma=0.5 if simclr else 0.1)
    if epochs is None:
        epochs = 200 if config.data.dataset == "tiny_imagenet" and not simclr else 1000
    batch_size = 256 if simclr else 128
    x_train, x_test = (train[0], test[0]) if simclr else (z_train, z_test)
    kept = max(len(x_test) // batch_size * batch_size, min(batch_size, len(x_test)))
    with seeded(config.run.seed):
        scores = _regression(
            (x_train, train[1]), (x_test[:kept], test[1][:kept]), batch_size, epochs
        )
    best = max(scores)
    return {
        "knn": vote,
        "linear_selected_on_test": best,
        "linear_last_epoch": scores[-1],
        "best_epoch": 1 + scores.index(best),
        "test_images": kept,
    }


@torch.enable_grad()
def _regression(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], batch_size: int, epochs: int
) -> list[float]:
    """Accuracies on the test images after each epoch."""
    x, labels = train
    model = nn.Linear(x.shape[1], int(labels.max()) + 1, device=x.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)
    batch_size = min(batch_size, len(x))
    scores = []
    for _ in range(epochs):
        order = torch.randperm(len(x), device=x.device)
        for rows in order[: len(x) // batch_size * batch_size].split(batch_size):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), labels[rows]).backward()
            optimizer.step()
        scores.append(accuracy(model, *test))
    return scores
