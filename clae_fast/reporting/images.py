"""What a report shows of a run's encoder: it needs the checkpoint and the data set.

Everything is computed on few images and in fp32, in eval mode but for the attack, which is the
run's own training step on a batch of its own views.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from clae_fast import data
from clae_fast.config import Config
from clae_fast.distributed.device import pick_device
from clae_fast.evaluation.features import batches
from clae_fast.methods import METHODS, Method
from clae_fast.nn import Encoder
from clae_fast.ops import topk_similarity
from clae_fast.reporting.runs import Run
from clae_fast.steps.batch import Batch
from clae_fast.steps.options import StepOptions
from clae_fast.training import checkpoint, encoders
from clae_fast.training.build import build_attack, build_method, hold_out

# test images on the map, training images that neighbours are looked for among
_MAPPED = 1000
_SEARCHED = 2000
_QUERIES = 6
_NEIGHBOURS = 8
_TWINS = 8
# views of a batch; fewer where they are large
_BATCH = 128
_LARGE_BATCH = 32
_LARGE = 64
# images that make a map
_FEWEST = 8
# spread of normalised features that is rounding
_ALIKE = 1e-5
# side of the pictures, at most
_SIDE = 96


@dataclass(frozen=True)
class Neighbours:
    """The training images nearest to a few test images.

    Attributes:
        pictures: a row a query, which comes first, [Q, 1 + K, H, H, 3].
        labels: their classes, [Q, 1 + K].
        similarity: cosine of each neighbour's features and the query's, [Q, K].
        among: how many training images were compared.
    """

    pictures: np.ndarray
    labels: np.ndarray
    similarity: np.ndarray
    among: int


@dataclass(frozen=True)
class Twins:
    """Views, what the run's attack makes of them.

    Attributes:
        views: attacked views, [K, H, H, 3].
        adversarial: their adversarial views, [K, H, H, 3].
        change: what the attack added, in units of the largest change, [K, H, H, 3].
        largest: that change, in pixels of 0..1.
        similarity: cosine of the projections of each adversarial view and its positive, [M].
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
        checkpoint: name of the checkpoint.
        step: the optimiser step that it is from.
        classes: names of the classes by number; numbers where there are none.
        labels: classes of the mapped test images, [N].
        images: what they look like, [N, H, H, 3].
        places: where t-SNE puts their features, [N, 2]; None where they are few or all alike.
        neighbours: of some of them.
        positives: cosine of the projections of an image's two views, [B].
        negatives: the largest cosine of each first view and a view of another image, [B].
        twins: of the attack; why there are none where it cannot be run; None without an attack.
    """

    checkpoint: str
    step: int
    classes: tuple[str, ...]
    labels: np.ndarray
    images: np.ndarray
    places: np.ndarray | None
    neighbours: Neighbours
    positives: np.ndarray
    negatives: np.ndarray
    twins: Twins | str | None


class _Encoded(NamedTuple):
    """Images in order: features, labels and pictures of at most `_SIDE` pixels a side."""

    features: Tensor  # [N, F]
    labels: Tensor  # [N]
    pictures: np.ndarray  # [N, H, H, 3]


def look(run: Run, splits: data.Splits | None = None) -> Pictures:
    """Computes the pictures of a run; torch's global generators stay where they are.

    Args:
        run: the run.
        splits: its data set, if it is loaded already.

    Raises:
        CheckpointError: the checkpoint is missing, damaged or of another run.
        DataError: the data set cannot be used.
        ValueError, RuntimeError: the encoder cannot be built here.
    """
    config, path = run.config, run.folder.best_or_last
    device = pick_device(config.engine.device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(config.run.seed)
        encoder, step = encoders.restore(run.folder, path, device)
        encoder.eval()
        (train, labelled, test), _ = hold_out(config, splits or load(config))
        mapped = _encoded(encoder, test.evenly(_MAPPED), config, device)
        batch = _views(config, train, device)
        z_p, z_q = (_projections(encoder, view) for view in batch.views)
        return Pictures(
            checkpoint=path.name,
            step=step,
            classes=_class_names(test),
            labels=mapped.labels.numpy(),
            images=mapped.pictures,
            places=_places(mapped.features),
            neighbours=_neighbours(
                mapped, _encoded(encoder, labelled.evenly(_SEARCHED), config, device)
            ),
            positives=F.cosine_similarity(z_p, z_q).cpu().numpy(),
            negatives=_hardest(z_p, z_q).cpu().numpy(),
            twins=None
            if config.adversary.attack == "none"
            else _twins(run, encoder, batch, (z_p, z_q)),
        )


def load(config: Config) -> data.Splits:
    """The data set of a run.

    Raises:
        DataError: it cannot be used.
    """
    return data.load(
        config.data.dataset,
        data_dir=config.data.data_dir,
        limit=config.data.limit,
        on_corrupt=config.data.on_corrupt,
    )


def _class_names(split: data.Split) -> tuple[str, ...]:
    return split.classes or tuple(map(str, range(int(split.labels.max()) + 1)))


@torch.no_grad()
def _encoded(encoder: Encoder, split: data.Split, config: Config, device: torch.device) -> _Encoded:
    """What evaluation sees of a split."""
    parts = [
        _Encoded(encoder.features(x), labels.cpu(), _pictures(x))
        for x, labels in batches(split, config, device)
    ]
    features, labels, pictures = zip(*parts, strict=True)
    return _Encoded(torch.cat(features), torch.cat(labels), np.concatenate(pictures))


def _pictures(x: Tensor) -> np.ndarray:  # [N, 3, H, H] in 0..1 -> [N, h, h, 3]
    """Bytes of at most `_SIDE` pixels a side."""
    if x.shape[-1] > _SIDE:
        x = F.interpolate(x, size=(_SIDE, _SIDE), mode="bilinear", antialias=True)
    return (x.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def _views(config: Config, train: data.Split, device: torch.device) -> Batch:
    """A batch of training views, drawn by the run's own recipe."""
    rows = min(
        config.optimization.batch_size,
        _BATCH if config.views.image_size <= _LARGE else _LARGE_BATCH,
    )
    few = train.evenly(rows)
    source = data.view_source(
        few,
        data.Recipe.of(config.views),
        image_size=config.views.image_size,
        batch_size=len(few),
        epochs=1,
        seed=config.run.seed,
        start=0,
        device=device,
        dtype=torch.float32,
        workers=0,
        resident="no",
        labels=METHODS[config.objective.method].needs_labels,
    )
    return next(iter(source))


@torch.no_grad()
def _projections(encoder: Encoder, x: Tensor) -> Tensor:  # [N, 3, H, H] -> [N, D]
    return encoder(x).float()


def _hardest(z_p: Tensor, z_q: Tensor) -> Tensor:  # [N, D], [N, D] -> [N]
    """The largest cosine of each row of z_p and a view of another image."""
    own = torch.arange(len(z_p), device=z_p.device)
    exclude = torch.stack((own, own + len(z_p)), dim=1)
    similarity, _ = topk_similarity(z_p, torch.cat((z_p, z_q)), 1, exclude=exclude)
    return similarity[:, 0]


def _places(features: Tensor) -> np.ndarray | None:  # [N, F] -> [N, 2]
    """t-SNE of normalised features, which begins with their principal components.

    None where there are few, or all are alike, of which scikit-learn's would make NaN and crash.
    """
    u = F.normalize(features).cpu().numpy()
    if len(u) < _FEWEST or not u.std(axis=0).max() > _ALIKE:
        return None
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    perplexity = min(30.0, (len(u) - 1) / 3)
    # its steps are too short for threads, which on a busy machine wait for each other
    with threadpool_limits(1):
        return TSNE(init="pca", perplexity=perplexity, random_state=0).fit_transform(u)


def _neighbours(mapped: _Encoded, searched: _Encoded) -> Neighbours:
    """Of one test image of each of the first classes."""
    first = [int((mapped.labels == label).nonzero()[0]) for label in mapped.labels.unique()]
    queries = torch.tensor(first[:_QUERIES])
    count = min(_NEIGHBOURS, len(searched.labels))
    similarity, rows = topk_similarity(mapped.features[queries], searched.features, count)
    rows = rows.cpu()
    labels = torch.cat((mapped.labels[queries, None], searched.labels[rows]), dim=1)
    found = mapped.pictures[queries.numpy(), None], searched.pictures[rows.numpy()]
    return Neighbours(
        pictures=np.concatenate(found, axis=1),
        labels=labels.numpy(),
        similarity=similarity.cpu().numpy(),
        among=len(searched.labels),
    )


def _twins(
    run: Run, encoder: Encoder, batch: Batch, projections: tuple[Tensor, Tensor]
) -> Twins | str:
    """The run's own step on these views; what it does to the weights' gradients goes nowhere."""
    config = run.config
    try:
        method = build_method(config, batch.views[0].device)
        method.load_state_dict(checkpoint.load(run.folder.best_or_last)["method"])
        x_adv = _attacked(method.train(), config, batch)
    # a teacher that is gone, or too few images for the method
    except (ValueError, RuntimeError) as error:
        return checkpoint.reason(error)
    z_p, z_q = projections
    # one of the views is attacked or, one after the other, both
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
    options = StepOptions(
        kind=config.adversary.attack,
        attack=build_attack(config),
        adv_weight=config.adversary.adv_weight,
        adv_fraction=config.adversary.adv_fraction,
        adv_replace=config.adversary.adv_replace,
        micro_batch=config.engine.micro_batch,
    )
    x_adv = method.step(batch._replace(views=batch.views[: method.views]), options).x_adv
    assert x_adv is not None
    return x_adv
