"""Measures how far the training attack moves embeddings, and how far noise of its size does."""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from clae_fast import data
from clae_fast.attack import LinfAttack
from clae_fast.config import Config
from clae_fast.evaluation.features import seeded, views
from clae_fast.nn import Encoder
from clae_fast.ops import nt_xent
from clae_fast.steps.runner import PassRunner, gradient


def susceptibility(
    encoder: Encoder, split: data.Split, config: Config, device: torch.device, attack: LinfAttack
) -> dict[str, float]:
    """The mean cosine between the projections z of a view before and after it is perturbed.

    The attack goes as far as in training. So that runs can be compared, it raises NT-Xent at the
    run's temperature, whatever the method's loss is: the loss of view q against view p or, for a
    run with the self attack, of a view against itself. The encoder is in eval mode. A run without
    an attack is measured with the attack that its settings describe. Noise moves every pixel by the
    radius, up or down at random, inside the same bounds.

    Args:
        encoder: The encoder.
        split: The images whose views, drawn as in training, are perturbed.
        config: The run's settings.
        device: The device to compute on.
        attack: The attack of training.

    Returns:
        "cosine_attacked" and "cosine_random", from -1 to 1; the lower, the further a view moves.
    """
    # settings that a run leaves to its method have their values by now
    assert config.objective.temperature is not None
    encoder.eval()
    # the whole way at once
    noise = dataclasses.replace(attack, step_size=None)
    totals = {"cosine_attacked": 0.0, "cosine_random": 0.0}
    images = 0
    found = views(split, data.Recipe.of(config.views), config, device)
    with seeded(config.run.seed):
        for batch in tqdm(found, desc="susceptibility", unit="batch", disable=None):
            x_p, x_q = batch.views
            with torch.no_grad():
                z_p, z_q = encoder(x_p), encoder(x_q)
            anchor = z_q if config.adversary.attack == "self" else z_p
            perturbed = {
                "cosine_attacked": _attacked(
                    encoder, x_q, anchor, attack, config.objective.temperature
                ),
                "cosine_random": noise.step(x_q, torch.randn_like(x_q)),
            }
            images += len(x_q)
            for name, x in perturbed.items():
                with torch.no_grad():
                    totals[name] += float(F.cosine_similarity(encoder(x), z_q).double().sum())
    return {name: total / images for name, total in totals.items()}


def _attacked(
    encoder: Encoder, x: Tensor, anchor: Tensor, attack: LinfAttack, temperature: float
) -> Tensor:
    def rise(z: Tensor) -> Tensor:
        return gradient(lambda z_b: nt_xent(anchor, z_b, temperature=temperature), z)

    return PassRunner().attack(encoder, x, attack, rise)
