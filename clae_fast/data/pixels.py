"""Packs the bytes of several images into one tensor."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clae_fast._ragged import RaggedImages


def to_bytes(image: Any) -> np.ndarray:  # [H, W, 3]
    """The pixels of an image that `Images.open` returned; floats are rounded to 1/255."""
    if isinstance(image, Tensor):
        return (image * 255).round().byte().permute(1, 2, 0).numpy()
    return np.asarray(image)


def pack(images: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:  # [bytes], [S, 2]
    """The pixels of images [H, W, 3] one after another, and the images' heights and widths."""
    pixels = np.concatenate([image.reshape(-1) for image in images])
    sizes = np.array([image.shape[:2] for image in images], dtype=np.int64)
    return torch.from_numpy(pixels), torch.from_numpy(sizes)


def unpack(pixels: Tensor, sizes: Tensor) -> Tensor | RaggedImages:
    """The packed images in the form `augment` takes: [S, 3, H, W], or ragged if sizes differ."""
    if bool((sizes == sizes[0]).all()):
        height, width = sizes[0].tolist()
        return pixels.view(-1, height, width, 3).permute(0, 3, 1, 2)
    ends = (3 * sizes.prod(dim=1)).cumsum(dim=0)
    offsets = torch.cat((ends.new_zeros(1), ends[:-1]))
    return RaggedImages(pixels, offsets, sizes)


def sides(
    images: Tensor | RaggedImages, rows: Tensor | slice = slice(None)
) -> tuple[int | Tensor, int | Tensor]:
    """Heights and widths of the images at `rows`: numbers if all are equal, or tensors [N]."""
    if isinstance(images, RaggedImages):
        height, width = images.sizes[rows].unbind(dim=1)
        return height, width
    return images.shape[2], images.shape[3]
