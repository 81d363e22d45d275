"""Semi-supervised learning: the whole encoder is fine-tuned on a part of the labels."""

import copy
import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from clae_fast import data
from clae_fast.config import Config
from clae_fast.evaluation.features import batches, extract_features, seeded, views
from clae_fast.evaluation.linear import fit_linear
from clae_fast.nn import Encoder

# parts of the labels, by name, and passes over them, both as in SimCLR
FRACTIONS = {"0.01": (0.01, 60), "0.1": (0.1, 30)}
# for 256 rows, as in SimCLR
_LR = 0.05


def finetune_accuracies(
    encoder: Encoder, splits: data.Splits, config: Config, device: torch.device
) -> dict[str, float]:
    """Accuracies after fine-tuning on each of `FRACTIONS` of the labeled images.

    The recipe is that of Chen et al., "A simple framework for contrastive learning of visual
    representations", ICML 2020, appendix B.5: Nesterov momentum 0.9, a learning rate of 0.05 for a
    batch of 256, no weight decay, and crops and flips as the only augmentation. Crops are drawn as
    in the run. Three things differ: the classifier starts as the linear probe of these images, a
    batch has both views of each image, and the rate falls to 0 along a cosine. The accuracy is that
    after the last epoch; nothing is selected.

    Args:
        encoder: The encoder to start from; it is not changed.
        splits: The data set.
        config: The run's settings.
        device: The device to compute on.

    Returns:
        Accuracy in percent of all test images, by fraction.
    """
    found = {}
    labels = splits.labeled.labels
    for name, (fraction, epochs) in FRACTIONS.items():
        # each class keeps one image at least
        size = max(round(fraction * len(labels)), int(labels.max()) + 1)
        part = splits.labeled
        if size < len(labels):
            part = part.select(data.stratified(labels, size, config.run.seed))
        classifier = _finetuned(encoder, part, epochs, config, device)
        correct = total = 0
        for x, y in batches(splits.test, config, device):
            with torch.no_grad():
                correct += int((classifier(x).argmax(dim=1) == y).sum())
            total += len(x)
        found[name] = 100 * correct / total
    return found


def _finetuned(
    encoder: Encoder, part: data.Split, epochs: int, config: Config, device: torch.device
) -> nn.Module:
    """A classifier of pixels, in eval mode."""
    probe = fit_linear(*extract_features(encoder, part, config, device), seed=config.run.seed)
    classifier = nn.Sequential(copy.deepcopy(encoder.backbone), probe).requires_grad_()
    recipe = dataclasses.replace(
        data.Recipe.of(config.views),
        color_jitter=(0.0, 0.0, 0.0, 0.0),
        grey_prob=0.0,
        blur_prob=(0.0, 0.0),
        solarize_prob=(0.0, 0.0),
    )
    source = views(part, recipe, config, device, epochs=epochs)
    steps = len(source)
    optimizer = torch.optim.SGD(classifier.parameters(), lr=_LR, momentum=0.9, nesterov=True)
    classifier.train()
    with seeded(config.run.seed):
        for step, batch in enumerate(tqdm(source, desc=f"{len(part)} labels", disable=None)):
            x = torch.cat(batch.views)
            y = torch.cat([batch.labels] * 2)
            for group in optimizer.param_groups:
                group["lr"] = _LR * len(x) / 256 * (1 + math.cos(math.pi * step / steps)) / 2
            optimizer.zero_grad()
            F.cross_entropy(classifier(x), y).backward()
            optimizer.step()
    return classifier.eval()
