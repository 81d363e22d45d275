"""Views of images under given parameters: crop, flip, colors, gray, blur and solarization."""

import torch
from torch import Tensor

from clae_fast._ragged import RaggedImages


def augment(
    images: Tensor | RaggedImages,  # [S, 3, H, W], or S of them
    params: Tensor,  # [2, N, 16]
    *,
    rows: Tensor | None = None,  # [N]
    size: int,
    interpolation: str = "bilinear",
    dtype: torch.dtype = torch.float32,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> Tensor:  # [2N, 3, size, size]
    """Both views of each sample, one after another, by the functions of torchvision.transforms.v2.

    Pixels are floats in [0, 1] from the start. They are clamped to that range after the crop, since
    bicubic weights overshoot, after every change of color, and at the end. Nothing is rounded
    before the end, whereas transforms of 8-bit images round after every step.

    Args:
        images: uint8, all of one size or ragged.
        params: A row of `augment_params` for each view of each sample.
        rows: Which of `images` each sample is; None is the first N.
        size: Side of the views.
        interpolation: "bilinear" or "bicubic", both with antialiasing.
        dtype: The result's dtype.
        mean: Subtracted from each channel at the end.
        std: Divides each channel after that.
    """
    N = params.shape[1]
    image = images.image if isinstance(images, RaggedImages) else images.__getitem__
    if rows is None:
        rows = torch.arange(N)
    views = [
        _view(image(row), numbers, size, interpolation)
        for table in params.tolist()
        for row, numbers in zip(rows.tolist(), table, strict=True)
    ]
    out = torch.stack(views) if views else torch.empty(0, 3, size, size, device=params.device)
    if mean is not None and std is not None:
        center, scale = (out.new_tensor(numbers).view(3, 1, 1) for numbers in (mean, std))
        out = (out - center) / scale
    return out.to(dtype)


def _view(image: Tensor, params: list[float], size: int, interpolation: str) -> Tensor:
    """One view, [3, size, size] in [0, 1]."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import functional as F

    top, left, height, width, flip = (int(number) for number in params[:5])
    mode = InterpolationMode(interpolation)
    x = image.float() / 255
    x = F.resized_crop(x, top, left, height, width, [size, size], mode, antialias=True).clamp(0, 1)
    if flip:
        x = F.horizontal_flip(x)
    adjust = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
    none = (1.0, 1.0, 1.0, 0.0)
    for which in (int(number) for number in params[5:9]):
        factor = params[9 + which]
        if factor != none[which]:
            x = adjust[which](x, factor)
    gray, sigma, solarize = params[13:]
    if gray:
        x = F.rgb_to_grayscale(x, num_output_channels=3)
    if sigma:
        x = F.gaussian_blur(x, [_blur_taps(size)] * 2, [sigma] * 2)
    if solarize:
        x = F.solarize(x, 0.5)
    return x.clamp(0, 1)


def _blur_taps(size: int) -> int:
    """Taps of a view's blur: 23 for a view of 224 pixels, as in SimCLR and BYOL."""
    return max(2 * (size // 20) + 1, 3)
