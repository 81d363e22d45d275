"""What evaluation reads: images in order, their features h, and augmented views of them."""

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
    """The middles of a split's images, in 0..1, and labels, in order.  # [B, 3, H, W], [B]."""
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
    """Features h and labels of a split, in order; leaves `encoder` in eval mode.

    Projections z are `encoder.head(h)`.

    Returns:
        The features and the labels.  # [N, F], [N]
    """
    encoder.eval()
    # a compiled encoder would be compiled anew for eval mode and for the last, smaller batch
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
    """Both views of a split's images, and labels.

    Batches have equal sizes, so that an epoch leaves out fewer images than it has batches.
    """
    count = -(-len(split) // config.optimization.batch_size)
    return data.view_source(
        split,
        recipe,
        image_size=config.views.image_size,
        batch_size=len(split) // count,
        epochs=epochs,
        seed=config.run.seed,
        start=0,
        device=device,
        dtype=torch.float32,
        workers=config.data.workers,
        resident="auto",
        labels=labels,
    )


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draws from torch's generators are those of `seed`, and leave no trace."""
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield
