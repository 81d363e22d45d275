"""Alignment and uniformity of embeddings on the sphere.

Wang & Isola, "Understanding contrastive representation learning through alignment and uniformity on
the hypersphere", ICML 2020.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from clae_fast import data
from clae_fast.config import Config
from clae_fast.evaluation.features import views
from clae_fast.nn import Encoder


def alignment(z_p: Tensor, z_q: Tensor) -> float:  # [N, D]
    r"""Mean squared distance between the two views of an image, from 0 (equal) to 4 (opposite).

    .. math:: \frac{1}{N} \sum_i \|u_i - v_i\|^2

    u and v are the rows of `z_p` and `z_q`, normalized.
    """
    distances = (F.normalize(z_p.double()) - F.normalize(z_q.double())).square().sum(dim=1)
    return float(distances.mean())


def uniformity(z: Tensor, t: float = 2.0) -> float:  # [N, D]
    r"""How evenly images are spread over the sphere, from -4 t to 0. Lower is more even.

    .. math:: \log \frac{2}{N (N - 1)} \sum_{i < j} e^{-t \|u_i - u_j\|^2}

    u are the rows of `z`, normalized.

    Raises:
        ValueError: `z` has fewer than two rows.
    """
    if len(z) < 2:
        raise ValueError(f"z must have two rows at least, got {len(z)}")
    u = F.normalize(z.double())
    sums = []
    for start in range(0, len(u), 1024):
        s = u[start : start + 1024] @ u.T
        exponents = 2 * t * (s - 1)
        # a row's distance to itself does not count
        exponents.diagonal(start).fill_(-torch.inf)
        sums.append(exponents.logsumexp(dim=(0, 1)))
    return float(torch.stack(sums).logsumexp(dim=0)) - math.log(len(u) * (len(u) - 1))


@torch.no_grad()
def view_geometry(
    encoder: Encoder, split: data.Split, config: Config, device: torch.device
) -> dict[str, float]:
    """Alignment and uniformity of the projections z of views drawn as in the run, in eval mode.

    Uniformity is the mean of that of the first views and that of the second views. For a single
    image the result is empty.
    """
    if len(split) < 2:
        return {}
    encoder.eval()
    pairs = [
        [encoder(x) for x in batch.views]
        for batch in views(split, data.Recipe.of(config.views), config, device)
    ]
    z_p, z_q = (torch.cat(z) for z in zip(*pairs, strict=True))
    return {
        "alignment": alignment(z_p, z_q),
        "uniformity": (uniformity(z_p) + uniformity(z_q)) / 2,
    }
