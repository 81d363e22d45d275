"""Makes the views of a recipe by torchvision's transforms v2, which `augment` is held against."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torchvision.transforms import v2

from clae_fast.data import Recipe


def augmentation(image_size: int, recipe: Recipe, view: int) -> v2.Compose:
    """The random view 0 or 1 of an image: crop, flip, color jitter, gray, blur, solarization.

    Args:
        image_size: The side of the view in pixels.
        recipe: The strengths and probabilities.
        view: Which of the two views it is; a recipe may treat them differently.

    Returns:
        A transform from a PIL image or a float tensor [3, H, W] to a float tensor
        [3, image_size, image_size] in [0, 1].
    """
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
    steps += [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
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
