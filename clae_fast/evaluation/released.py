"""The evaluation protocol of CLAE's released code, for comparison with that code's numbers.

These parts are as in that code (commit 6986061):

- A kNN vote of 200 neighbors on the projection z, with a temperature of 0.5 for SimCLR and 0.1 for
  the other methods.
- Logistic regression by Adam with a learning rate of 3e-4 and without augmentation. It is fitted to
  the features h for SimCLR, and to the normalized z for the other methods. Batches are shuffled and
  have 256 rows for SimCLR and 128 for the others. An incomplete last batch is dropped. There are
  1000 epochs (200 for the other methods on Tiny ImageNet).
- Test images beyond full batches are left out of the regression's accuracy.
- The epoch with the best accuracy on the test images is reported. So the test set selects that
  number, as its name says. The number of the last epoch stands beside it.

These parts differ:

- Features are computed once. The released code computes the same features again for every epoch.
- The checkpoint is the one under evaluation. In the released code, Plain and UEL take the one with
  the best vote on the test images.
- All training images vote. In the released code, SimCLR writes some images of its last batch to
  wrong columns.
- If there are fewer images than a batch has, all of them are one batch.

Methods that CLAE does not have are evaluated like its Plain and UEL.
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
    """Evaluates features by the protocol of the released code.

    Args:
        encoder: The encoder, whose head turns features into projections.
        config: The run's settings; its method and data set decide between the protocol's variants.
        train: Features h and labels of the training images.
        test: Features h and labels of the test images.
        epochs: Epochs of the logistic regression; by default as many as in the code.

    Returns:
        The accuracies "knn", "linear_selected_on_test" and "linear_last_epoch"; "best_epoch", the
        selected epoch, from 1; and "test_images", the number of test images of the regression.
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
