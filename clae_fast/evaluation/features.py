"""The inputs of evaluation: images in order, their features h, and augmented views of them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from clae_fast import data
from clae_fast.config import Config
from clae_fast.distributed.device import to_device
from clae_fast.nn import Encoder


def batches(
    split: data.Split, config: Config, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields batches of the middles of images in 0..1, [B, 3, H, W], and labels [B], in order."""
    loader = data.image_loader(
        split,
        data.eval_transform(config.views.image_size),
        batch_size=config.optimization.batch_size,
        workers=config.data.workers,
        pin_memory=device.type == "cuda",
    )
    for x, labels in loader:
        yield to_device(x, device), labels.to(device)


@torch.no_grad()
def extract_features(
    encoder: Encoder, split: data.Split, config: Config, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Computes the features h of a split and leaves `encoder` in eval mode.

    Projections z are `encoder.head(h)`.

    Returns:
        The features, [N, F], and the labels, [N], in the order of the split.
    """
    encoder.eval()
    # a compiled encoder would compile again for eval mode and for the last, smaller batch
    with torch.compiler.set_stance("force_eager"):
        found = [(encoder.features(x), labels) for x, labels in batches(split, config, device)]
    features, labels = zip(*found, strict=True)
    return torch.cat(features), torch.cat(labels)


def views(
    split: data.Split,
    recipe: data.Recipe,
    config: Config,
    device: torch.device,
    *,
    epochs: int = 1,
    labels: bool = True,
) -> data.ViewSource:
    """Yields both views of a split's images, and labels, in batches of one size.

    Images that do not fill a batch are left out. The size is chosen so that these are few: fewer
    than there are batches.
    """
    count = -(-len(split) // config.optimization.batch_size)
    size, seed = len(split) // count, config.run.seed
    return data.view_source(
        split,
        data.BatchSchedule(len(split), size, epochs=epochs, seed=seed),
        recipe,
        image_size=config.views.image_size,
        device=device,
        dtype=torch.float32,
        workers=config.data.workers,
        resident="auto",
        labels=labels,
    )


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside the block, torch's generators start from `seed`. After it, they are as before."""
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield
