"""Both augmented views of images, by ours and by the transforms that people use instead."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as F

import clae_fast
from benchmarks.case import CPU, UnavailableError
from benchmarks.torchvision_views import augmentation
from clae_fast import reference
from clae_fast.data import RECIPES

TOLERANCE = 1 / 255
CHECKED_IMAGES = 4


@dataclass(frozen=True)
class Views:
    """Both views of images. The parameters of all batches are drawn together, as the trainer does.

    Attributes:
        images: The images as bytes, [S, 3, height, width].
        recipe: The name of the recipe.
        size: The side of the views.
        batch: How many images a batch has.
    """

    images: Tensor
    recipe: str
    size: int
    batch: int

    def make(self, **options: Any) -> None:
        """Make both views of all images by ours, batch by batch."""
        params, settings = self._drawn(self.images)
        ids = torch.arange(len(self.images), device=self.images.device)
        for rows, drawn in zip(ids.split(self.batch), params.split(self.batch, 1), strict=True):
            clae_fast.augment(self.images, drawn, rows=rows, **settings, **options)

    def error(self) -> float:
        """The largest difference of a pixel from the reference's.

        Raises:
            UnavailableError: It is more than a level of 8 bits.
        """
        few = self.images[:CHECKED_IMAGES]
        params, settings = self._drawn(few)
        ours = torch.cat(clae_fast.augment(few, params, impl="auto", **settings)).cpu()
        exact = reference.augment(few.cpu(), params.cpu(), **settings)
        error = float((ours - exact).abs().max())
        if not error <= TOLERANCE:
            raise UnavailableError(f"wrong, {error:.1e} off its reference")
        return error

    def torchvision_loaders(self, workers: int) -> dict[str, Callable[[], None]]:
        """Torchvision's transforms in a DataLoader, on images in each of the forms they take."""
        decoded = {
            "PIL": [F.to_pil_image(image) for image in self.images],
            "uint8 [3, H, W]": self.images.contiguous(),
            "uint8 [H, W, 3]": self.images.contiguous(memory_format=torch.channels_last),
        }
        return {
            form: partial(
                _drain,
                DataLoader(
                    TwoViews(images, self.transforms()),
                    batch_size=self.batch,
                    num_workers=workers,
                    persistent_workers=True,
                ),
            )
            for form, images in decoded.items()
        }

    def torchvision_one_by_one(self) -> dict[str, Callable[[], object]]:
        """Torchvision's transforms on the device, called for one image after another."""
        views = self.transforms()

        def call(pixels: Tensor) -> Tensor:
            return torch.stack([view(image) for view in views for image in pixels])

        pixels = self.images[: self.batch]
        return {"uint8": partial(call, pixels), "fp32": partial(call, pixels.float() / 255)}

    def kornia(self) -> dict[str, Callable[[], object]]:
        """Kornia's transforms of a batch, of both views in one, by either way of cropping."""
        batch = self.images[: self.batch]

        def call(transform: Callable[[Tensor], Tensor]) -> Tensor:
            return transform(torch.cat([batch, batch]).float() / 255)

        return {mode: partial(call, self._kornia(mode)) for mode in ("slice", "resample")}

    def transforms(self) -> list[Callable[[Any], Tensor]]:
        """Torchvision's transforms of the first and of the second view."""
        return [augmentation(self.size, RECIPES[self.recipe], view) for view in (0, 1)]

    def _drawn(self, images: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """The parameters of the views of `images`, and what else `augment` is told."""
        settings = dataclasses.asdict(RECIPES[self.recipe])
        how = {"size": self.size, "interpolation": settings.pop("interpolation")}
        ids = torch.arange(len(images), device=images.device)
        height, width = images.shape[2:]
        where = {"seed": 0, "epoch": 0, "height": height, "width": width}
        return clae_fast.augment_params(ids, **where, **settings), how

    def _kornia(self, cropping_mode: str) -> torch.nn.Module:
        from kornia import augmentation as K

        recipe = RECIPES[self.recipe]
        transforms: list[torch.nn.Module] = [
            K.RandomResizedCrop(
                (self.size, self.size),
                scale=(recipe.crop_min_scale, 1.0),
                resample=recipe.interpolation,
                align_corners=False,
                cropping_mode=cropping_mode,
            ),
            K.RandomHorizontalFlip(p=0.5 * recipe.flip),
            K.ColorJitter(*recipe.color_jitter, p=recipe.color_jitter_prob),
            K.RandomGrayscale(p=recipe.grey_prob),
        ]
        blur, _ = recipe.blur_prob
        if blur:
            taps = max(2 * (self.size // 20) + 1, 3)
            transforms.append(K.RandomGaussianBlur((taps, taps), (0.1, 2.0), p=blur))
        return torch.nn.Sequential(*transforms)


class TwoViews(Dataset):
    """Both views of each image, which the transforms draw as they like."""

    def __init__(self, images: Sequence[Any], transforms: list[Callable[[Any], Tensor]]) -> None:
        self.images, self.transforms = images, transforms

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        p, q = (transform(self.images[index]) for transform in self.transforms)
        return p, q


def photos(
    count: int, height: int, width: int, device: torch.device = CPU
) -> Tensor:  # [count, 3, height, width]
    """Smooth images with some noise, [count, height, width, 3] in memory."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 5, 5, generator=generator).to(device)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")
    noise = 0.05 * torch.randn(smooth.shape, device=device)
    pixels = ((smooth + noise).clamp(0, 1) * 255).round().byte()
    return pixels.contiguous(memory_format=torch.channels_last)


def _drain(batches: Iterable[Any]) -> None:
    for _ in batches:
        pass
