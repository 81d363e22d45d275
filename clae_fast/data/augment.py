"""SimCLR's augmentation, with randomness that depends on the sample and not on who draws it."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from clae_fast.data.split import Split


def augmentation(
    image_size: int,
    *,
    crop_min_scale: float,
    flip: bool,
    color_jitter: tuple[float, float, float, float],
    color_jitter_prob: float,
    grey_prob: float,
) -> v2.Compose:
    """SimCLR's random view of one image: crop, flip, colour jitter, grey.

    Args:
        image_size: side of the view in pixels.
        crop_min_scale: smallest part of the image's area that a crop takes; the largest is 1.
        flip: mirror left and right with probability 1/2.
        color_jitter: strengths of brightness, contrast, saturation and hue.
        color_jitter_prob: probability of the jitter.
        grey_prob: probability of turning grey.

    Returns:
        A transform from a PIL image or a float tensor [3, H, W] to a float tensor
        [3, image_size, image_size] in [0, 1].
    """
    steps: list[Any] = [v2.RandomResizedCrop(image_size, scale=(crop_min_scale, 1.0))]
    if flip:
        steps.append(v2.RandomHorizontalFlip())
    if color_jitter_prob > 0 and any(color_jitter):
        steps.append(v2.RandomApply([v2.ColorJitter(*color_jitter)], p=color_jitter_prob))
    if grey_prob > 0:
        steps.append(v2.RandomGrayscale(grey_prob))
    return v2.Compose([*steps, *_to_tensor()])


def eval_transform(image_size: int) -> v2.Compose:
    """The middle of an image, as a float tensor [3, image_size, image_size] in [0, 1]."""
    return v2.Compose([v2.Resize(image_size), v2.CenterCrop(image_size), *_to_tensor()])


def _to_tensor() -> list[Any]:
    return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()]


class TwoViews(Dataset):
    """Two random views of an image, each a function of (seed, epoch, index, view) alone.

    Items are asked for by (epoch, index), so a worker needs no state, and runs with any number of
    workers, interrupted or not, see the same pixels.
    """

    def __init__(self, split: Split, transform: v2.Compose, *, seed: int) -> None:
        self.split = split
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The views p and q, [3, H, W] each, of image `index` in `epoch`."""
        epoch, index = key
        image = self.split[index]
        return self._view(image, epoch, index, 0), self._view(image, epoch, index, 1)

    def _view(self, image: Any, epoch: int, index: int, view: int) -> Tensor:
        key = np.random.SeedSequence((self.seed, epoch, index, view))
        # torchvision draws from the global generator, which belongs to the model
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(key.generate_state(1)[0]))
            return self.transform(image)
