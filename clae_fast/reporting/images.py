"""Computes the pictures that a report shows of an encoder, from its checkpoint and the data set.

Everything is computed in fp32 on few images. The encoder is in eval mode, except for the attack,
which is the run's own training step on a batch of views.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from clae_fast import data
from clae_fast.config import Config
from clae_fast.distributed.device import pick_device
from clae_fast.evaluation.features import batches, views
from clae_fast.methods import METHODS, Method
from clae_fast.nn import Encoder
from clae_fast.ops import topk_similarity
from clae_fast.reporting.runs import Run
from clae_fast.steps.batch import Batch
from clae_fast.training import checkpoint, encoders
from clae_fast.training.build import build_method, hold_out, load_data, step_options

# how many test images are on the map, and among how many training images neighbors are sought
_MAPPED = 1000
_SEARCHED = 2000
_QUERIES = 6
_NEIGHBORS = 8
_TWINS = 8
# how many views the attacked batch has, and how many if they are larger than _LARGE pixels
_BATCH = 128
_LARGE_BATCH = 32
_LARGE = 64
# the fewest images that make a map
_FEWEST = 8
# a spread of normalized features below this is only rounding
_ALIKE = 1e-5
# the longest side of a picture, in pixels
_SIDE = 96


@dataclass(frozen=True)
class Neighbors:
    """The training images nearest to a few test images.

    Attributes:
        pictures: A row for each query, which comes first in it, [Q, 1 + K, H, H, 3].
        labels: The classes of the pictures, [Q, 1 + K].
        similarity: Cosine between each neighbor's features and the query's, [Q, K].
        among: How many training images were compared.
    """

    pictures: np.ndarray
    labels: np.ndarray
    similarity: np.ndarray
    among: int


@dataclass(frozen=True)
class Twins:
    """Views and the adversarial views that the run's attack makes of them.

    Attributes:
        views: The attacked views, [K, H, H, 3].
        adversarial: Their adversarial views, [K, H, H, 3].
        change: The difference of the two, in units of the largest change, [K, H, H, 3].
        largest: The largest change, in pixels of 0..1.
        similarity: Cosine between the projections of each adversarial view and its positive, [M].
    """

    views: np.ndarray
    adversarial: np.ndarray
    change: np.ndarray
    largest: float
    similarity: np.ndarray


@dataclass(frozen=True)
class Pictures:
    """What the encoder of a run makes of a few images.

    Attributes:
        checkpoint: Name of the checkpoint.
        step: The optimizer step that the checkpoint is from.
        classes: Names of the classes by number; the numbers themselves if there are no names.
        labels: Classes of the test images on the map, [N].
        images: Pictures of these test images, [N, H, H, 3].
        places: Their places on the map by t-SNE, [N, 2]; None if they are few or all alike.
        neighbors: The nearest neighbors of some of them.
        positives: Cosine between the projections of an image's two views, [B].
        negatives: The largest cosine between each first view and a view of another image, [B].
        twins: Attacked views; or, if the attack cannot run, a text that says why; None without an
            attack.
    """

    checkpoint: str
    step: int
    classes: tuple[str, ...]
    labels: np.ndarray
    images: np.ndarray
    places: np.ndarray | None
    neighbors: Neighbors
    positives: np.ndarray
    negatives: np.ndarray
    twins: Twins | str | None


class _Encoded(NamedTuple):
    """Images in order: their features, labels and pictures of at most `_SIDE` pixels a side."""

    features: Tensor  # [N, F]
    labels: Tensor  # [N]
    pictures: np.ndarray  # [N, H, H, 3]


def look(run: Run, splits: data.Splits | None = None) -> Pictures:
    """Computes the pictures of a run. It leaves torch's global generators as they are.

    Args:
        run: The run.
        splits: Its data set, if that is loaded already.

    Raises:
        CheckpointError: The checkpoint is missing, damaged or of another run.
        DataError: The data set cannot be used.
        ValueError, RuntimeError: The encoder cannot be built here.
    """
    config, path = run.config, run.folder.best_or_last
    device = pick_device(config.engine.device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(config.run.seed)
        encoder, step = encoders.restore(run.folder, path, device)
        encoder.eval()
        if splits is None:
            # a report fetches nothing
            splits = load_data(replace(config.data, download=False))
        (train, labeled, test), _ = hold_out(config.run, splits)
        mapped = _encoded(encoder, test.evenly(_MAPPED), config, device)
        searched = _encoded(encoder, labeled.evenly(_SEARCHED), config, device)
        batch = _views(config, train, device)
        z_p, z_q = (_projections(encoder, view) for view in batch.views)
        attacked = config.adversary.attack != "none"
        return Pictures(
            checkpoint=path.name,
            step=step,
            classes=_class_names(test),
            labels=mapped.labels.numpy(),
            images=mapped.pictures,
            places=_places(mapped.features),
            neighbors=_neighbors(mapped, searched),
            positives=F.cosine_similarity(z_p, z_q).cpu().numpy(),
            negatives=_hardest(z_p, z_q).cpu().numpy(),
            twins=_twins(run, encoder, batch, (z_p, z_q)) if attacked else None,
        )


def _class_names(split: data.Split) -> tuple[str, ...]:
    return split.classes or tuple(map(str, range(int(split.labels.max()) + 1)))


@torch.no_grad()
def _encoded(encoder: Encoder, split: data.Split, config: Config, device: torch.device) -> _Encoded:
    """The images of a split as evaluation sees them."""
    parts = [
        _Encoded(encoder.features(x), labels.cpu(), _pictures(x))
        for x, labels in batches(split, config, device)
    ]
    features, labels, pictures = zip(*parts, strict=True)
    return _Encoded(torch.cat(features), torch.cat(labels), np.concatenate(pictures))


def _pictures(x: Tensor) -> np.ndarray:  # [N, 3, H, H] in 0..1 -> [N, h, h, 3]
    """Images as bytes, of at most `_SIDE` pixels a side."""
    if x.shape[-1] > _SIDE:
        x = F.interpolate(x, size=(_SIDE, _SIDE), mode="bilinear", antialias=True)
    return (x.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def _views(config: Config, train: data.Split, device: torch.device) -> Batch:
    """A batch of training views, drawn by the run's own recipe."""
    largest = _BATCH if config.views.image_size <= _LARGE else _LARGE_BATCH
    few = train.evenly(min(config.optimization.batch_size, largest))
    labels = METHODS[config.objective.method].needs_labels
    return next(iter(views(few, data.Recipe.of(config.views), config, device, labels=labels)))


@torch.no_grad()
def _projections(encoder: Encoder, x: Tensor) -> Tensor:  # [N, 3, H, H] -> [N, D]
    return encoder(x).float()


def _hardest(z_p: Tensor, z_q: Tensor) -> Tensor:  # [N, D], [N, D] -> [N]
    """The largest cosine between each row of z_p and a view of another image."""
    own = torch.arange(len(z_p), device=z_p.device)
    exclude = torch.stack((own, own + len(z_p)), dim=1)
    similarity, _ = topk_similarity(z_p, torch.cat((z_p, z_q)), 1, exclude=exclude)
    return similarity[:, 0]


def _places(features: Tensor) -> np.ndarray | None:  # [N, F] -> [N, 2]
    """t-SNE of normalized features, started from their principal components.

    Returns None if features are few or all alike, since scikit-learn would compute NaN from them.
    """
    u = F.normalize(features).cpu().numpy()
    if len(u) < _FEWEST or not u.std(axis=0).max() > _ALIKE:
        return None
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    perplexity = min(30.0, (len(u) - 1) / 3)
    # its steps are too short for several threads, which wait for each other on a busy machine
    with threadpool_limits(1):
        return TSNE(init="pca", perplexity=perplexity, random_state=0).fit_transform(u)


def _neighbors(mapped: _Encoded, searched: _Encoded) -> Neighbors:
    """The nearest neighbors of one test image of each of the first classes."""
    first = [int((mapped.labels == label).nonzero()[0]) for label in mapped.labels.unique()]
    queries = torch.tensor(first[:_QUERIES])
    count = min(_NEIGHBORS, len(searched.labels))
    similarity, rows = topk_similarity(mapped.features[queries], searched.features, count)
    rows = rows.cpu()
    labels = torch.cat((mapped.labels[queries, None], searched.labels[rows]), dim=1)
    found = mapped.pictures[queries.numpy(), None], searched.pictures[rows.numpy()]
    return Neighbors(
        pictures=np.concatenate(found, axis=1),
        labels=labels.numpy(),
        similarity=similarity.cpu().numpy(),
        among=len(searched.labels),
    )


def _twins(
    run: Run, encoder: Encoder, batch: Batch, projections: tuple[Tensor, Tensor]
) -> Twins | str:
    """Takes the run's own training step on these views; the weights' gradients are thrown away."""
    config = run.config
    try:
        method = build_method(config, batch.views[0].device)
        method.load_state_dict(checkpoint.load(run.folder.best_or_last)["method"])
        x_adv = _attacked(method.train(), config, batch)
    # a teacher's files are gone, or there are too few images for the method
    except (ValueError, RuntimeError) as error:
        return checkpoint.reason(error)
    z_p, z_q = projections
    # either one view is attacked, or both are, one after the other
    pairs = [
        *zip(batch.views, (z_q, z_p), strict=True),
        (torch.cat(batch.views), torch.cat((z_q, z_p))),
    ]
    enough = [(x[: len(x_adv)], z[: len(x_adv)]) for x, z in pairs if len(x) >= len(x_adv)]
    x, positive = min(enough, key=lambda pair: float((x_adv - pair[0]).abs().max()))
    change = (x_adv - x)[:_TWINS]
    largest = float(change.abs().max())
    return Twins(
        views=_pictures(x[:_TWINS]),
        adversarial=_pictures(x_adv[:_TWINS]),
        change=_pictures(0.5 + change / (2 * largest or 1.0)),
        largest=largest,
        similarity=F.cosine_similarity(positive, _projections(encoder, x_adv)).cpu().numpy(),
    )


def _attacked(method: Method, config: Config, batch: Batch) -> Tensor:
    """The adversarial views that a step of the method makes."""
    taken = batch._replace(views=batch.views[: method.views])
    x_adv = method.step(taken, step_options(config)).x_adv
    assert x_adv is not None
    return x_adv
