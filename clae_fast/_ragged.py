"""Images of different sizes in one tensor."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class RaggedImages(NamedTuple):
    """8-bit images of different sizes, one after another in one tensor.

    Image i is [height, width, 3] in one piece, from `offsets[i]` on, all on one device.

    Attributes:
        pixels: The images' bytes, uint8; there may be more of them than 2^31.
        offsets: Where each image begins in `pixels`, int64.
        sizes: Height and width of each image, int64.
    """

    pixels: Tensor  # [bytes]
    offsets: Tensor  # [S]
    sizes: Tensor  # [S, 2]

    def to(self, device: torch.device | str) -> RaggedImages:
        """The images on a device, themselves where they are there already."""
        return RaggedImages(*(tensor.to(device) for tensor in self))

    def image(self, index: int) -> Tensor:  # [3, H, W]
        """One of the images, without a copy."""
        offset = int(self.offsets[index])
        height, width = self.sizes[index].tolist()
        pixels = self.pixels[offset : offset + 3 * height * width]
        return pixels.view(height, width, 3).permute(2, 0, 1)
