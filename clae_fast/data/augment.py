"""Random views, with randomness that depends on the sample and not on who draws it."""

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from clae_fast.data.recipes import Recipe
from clae_fast.data.split import DataError, Split


def augmentation(image_size: int, recipe: Recipe, view: int) -> v2.Compose:
    """The random view 0 or 1 of an image: crop, flip, colour jitter, grey, blur, solarization.

    Args:
        image_size: side of the view in pixels.
        recipe: with what strengths and probabilities.
        view: which of the two; a recipe may treat them differently.

    Returns:
        A transform from a PIL image or a float tensor [3, H, W] to a float tensor
        [3, image_size, image_size] in [0, 1].
    """
    # an absent step draws nothing, so a recipe without it sees the same views as ever
    steps: list[Any] = [
        v2.RandomResizedCrop(
            image_size,
            scale=(recipe.crop_min_scale, 1.0),
            interpolation=v2.InterpolationMode(recipe.interpolation),
        )
    ]
    if recipe.flip:
        steps.append(v2.RandomHorizontalFlip())
    if recipe.color_jitter_prob > 0 and any(recipe.color_jitter):
        jitter = v2.ColorJitter(*recipe.color_jitter)
        steps.append(v2.RandomApply([jitter], p=recipe.color_jitter_prob))
    if recipe.grey_prob > 0:
        steps.append(v2.RandomGrayscale(recipe.grey_prob))
    steps += _to_float()
    if recipe.blur_prob[view] > 0:
        # 23 pixels for a view of 224, as SimCLR and BYOL have it
        blur = v2.GaussianBlur(max(2 * (image_size // 20) + 1, 3), sigma=(0.1, 2.0))
        steps.append(v2.RandomApply([blur], p=recipe.blur_prob[view]))
    if recipe.solarize_prob[view] > 0:
        steps.append(v2.RandomSolarize(0.5, p=recipe.solarize_prob[view]))
    if recipe.interpolation == "bicubic" or recipe.blur_prob[view] > 0:
        # bicubic overshoots on floats, and the blur's weights add up to 1 with a rounding error
        steps.append(v2.Lambda(partial(torch.clamp, min=0.0, max=1.0)))
    return v2.Compose([*steps, v2.ToPureTensor()])


def eval_transform(image_size: int) -> v2.Compose:
    """The middle of an image, as a float tensor [3, image_size, image_size] in [0, 1]."""
    middle = [v2.Resize(image_size), v2.CenterCrop(image_size)]
    return v2.Compose([*middle, *_to_float(), v2.ToPureTensor()])


def _to_float() -> list[Any]:
    return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]


class TwoViews(Dataset):
    """Two random views of an image, each a function of (seed, epoch, index, view) alone.

    Items are asked for by (epoch, index), so a worker needs no state, and runs with any number of
    workers, interrupted or not, see the same pixels. Where corrupt images are skipped, views of the
    next readable one, at the same random draws, stand in for them.
    """

    def __init__(self, split: Split, image_size: int, recipe: Recipe, *, seed: int) -> None:
        self.split = split
        self.transforms = [augmentation(image_size, recipe, view) for view in (0, 1)]
        self.seed = seed
        self._corrupt: set[int] = set()

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor, list[str]]:
        """The views p and q, [3, H, W] each, of image `index` in `epoch`, and what was skipped.

        Raises:
            DataError: the image cannot be read, or where such are skipped, none can.
        """
        epoch, index = key
        image, errors = self._readable(index)
        p, q = (self._view(image, epoch, index, view) for view in (0, 1))
        return p, q, errors

    def _readable(self, index: int) -> tuple[Any, list[str]]:
        """The first readable image from `index` on, and the errors that were new before it."""
        errors: list[str] = []
        for offset in range(len(self.split)):
            at = (index + offset) % len(self.split)
            # a folder that is gone is not searched again for each of its images
            if at in self._corrupt:
                continue
            try:
                return self.split[at], errors
            except DataError as error:
                if not self.split.corrupt.skip:
                    raise
                self._corrupt.add(at)
                errors.append(str(error))
        nothing = f"none of the {len(self.split)} images can be read"
        raise DataError("; ".join([nothing, *errors[:1]]))

    def _view(self, image: Any, epoch: int, index: int, view: int) -> Tensor:
        key = np.random.SeedSequence((self.seed, epoch, index, view))
        # torchvision draws from the global generator, which belongs to the model
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(key.generate_state(1)[0]))
            return self.transforms[view](image)
