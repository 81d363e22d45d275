"""How each view of a sample is augmented: drawn from the sample's number, not from a generator."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from clae_fast import _check
from clae_fast.ops._philox import MASK, philox4x32

VIEWS = 2
COLUMNS = 16
_RATIO = (3 / 4, 4 / 3)
_SIGMA = (0.1, 2.0)
_TRIES = 10
# the random words of a view: areas and ratios of the tries, top and left; then order and factors of
# the jitter; then flip, whether to jitter, gray, whether to blur, sigma, solarize
_CROP, _JITTER = 2 * _TRIES + 2, 8
_BLOCKS = (_CROP + _JITTER + 6) // 4


def augment_params(
    ids: Tensor,  # [N]
    *,
    seed: int,
    epoch: int | Tensor,
    height: int | Tensor,  # [] or [N]
    width: int | Tensor,
    crop_min_scale: float,
    flip: bool,
    color_jitter: tuple[float, float, float, float],
    color_jitter_prob: float,
    grey_prob: float,
    blur_prob: tuple[float, float],
    solarize_prob: tuple[float, float],
    crop_max_scale: float = 1.0,
    first_view: int = 0,
) -> Tensor:  # [2, N, 16]
    r"""Draws how `augment` makes two views of each sample.

    A row depends on (seed, epoch, sample, view) alone, and not on the batch, its size, the device
    or the process, so that an epoch may be drawn at once or batch by batch. The distributions are
    those of torchvision's v2.RandomResizedCrop (aspect ratios from 3/4 to 4/3),
    RandomHorizontalFlip, ColorJitter, RandomGrayscale, GaussianBlur (sigma from 0.1 to 2) and
    RandomSolarize. The arguments from `crop_min_scale` to `solarize_prob` are the fields of a
    `clae_fast.data` recipe, which has also the `interpolation` of `augment`.

    =====================  ==========================================================
    columns                what they say
    =====================  ==========================================================
    0 to 3                 the crop: top, left, height and width in pixels
    4                      1 to mirror left and right
    5 to 8                 the order of 0 brightness, 1 contrast, 2 saturation, 3 hue
    9 to 11                factors of brightness, contrast and saturation, 1 for none
    12                     shift of the hue, 1 is a full turn, 0 for none
    13                     1 to turn gray
    14                     standard deviation of the blur in pixels, 0 for none
    15                     1 to solarize
    =====================  ==========================================================

    The random numbers are words of Philox4x32-10 with the seed as its key and (view, block, epoch,
    sample) as its counter. Sides of crops are rounded from fp64 exponentials and roots: once in
    10^10 samples or so another device may round to another pixel.

    Args:
        ids: The samples' numbers in the data set, int64.
        seed: The run's seed, from 0 to 2^64 - 1.
        epoch: The epoch, from 0 to 2^32 - 1: a number or an int64 tensor [] on the device of `ids`,
            which CUDA graphs can replay with another value.
        height: The images' height in pixels, from 1 to 2^15: a number or, where heights differ, an
            int64 tensor [N] on the device of `ids`, whose values are not checked.
        width: The images' width, as `height`.
        crop_min_scale: Smallest part of the image's area that a crop takes.
        flip: Whether to mirror one half of the views.
        color_jitter: Strengths of brightness, contrast, saturation and hue.
        color_jitter_prob: Probability of the jitter.
        grey_prob: Probability of turning gray.
        blur_prob: Probability of Gaussian blur, one for each view.
        solarize_prob: Probability of solarization, one for each view.
        crop_max_scale: Largest part of the image's area that a crop takes.
        first_view: Number of the first of the two views, from 0 to 2^16 - 2: further pairs of views
            of the same samples, such as small crops, have the numbers 2 and 3, 4 and 5, and so on.

    Returns:
        The table, fp32, on the device of `ids`.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: An argument out of its range, or `ids` that are not one-dimensional.

    Example:
        >>> settings = dataclasses.asdict(clae_fast.data.RECIPES["simclr"])
        >>> settings.pop("interpolation")
        >>> ids = torch.arange(512)
        >>> params = clae_fast.augment_params(
        ...     ids, seed=0, epoch=3, height=32, width=32, **settings
        ... )
    """
    _check.of_dtype("ids", ids, torch.int64)
    _check.shape("ids", ids, "N")
    _check.integer("seed", seed, 0, 2**64 - 1)
    if isinstance(epoch, Tensor):
        if epoch.dtype != torch.int64 or epoch.ndim or epoch.device != ids.device:
            raise ValueError(
                f"epoch must be a number or an int64 tensor [] on {ids.device}, got {epoch.dtype}, "
                f"shape {list(epoch.shape)} on {epoch.device}"
            )
    else:
        _check.integer("epoch", epoch, 0, MASK)
    height, width = _checked_side("height", height, ids), _checked_side("width", width, ids)
    _check.integer("first_view", first_view, 0, 2**16 - 2)
    _check_real("crop_max_scale", crop_max_scale, 1.0)
    _check_real("crop_min_scale", crop_min_scale, crop_max_scale)
    if not isinstance(flip, bool):
        raise TypeError(f"flip must be True or False, got {type(flip).__name__}")
    for name, numbers, upper in (
        ("color_jitter", color_jitter, (math.inf, math.inf, math.inf, 0.5)),
        ("color_jitter_prob", (color_jitter_prob,), (1.0,)),
        ("grey_prob", (grey_prob,), (1.0,)),
        ("blur_prob", blur_prob, (1.0, 1.0)),
        ("solarize_prob", solarize_prob, (1.0, 1.0)),
    ):
        if not isinstance(numbers, (list, tuple)):
            raise TypeError(f"{name} must be a list or tuple, got {type(numbers).__name__}")
        if len(numbers) != len(upper):
            raise ValueError(f"{name} must be {len(upper)} numbers, got {numbers}")
        for number, largest in zip(numbers, upper, strict=True):
            _check_real(name, number, largest)

    u = _uniform(ids, seed, epoch, first_view)  # [2, N, words]
    box = _crops(u[..., :_CROP], height, width, crop_min_scale, crop_max_scale)
    order, factors = u[..., _CROP : _CROP + _JITTER].split(4, dim=-1)
    turn, jitter, gray, blur, sigma, solarize = u[..., _CROP + _JITTER :].unbind(-1)
    amounts = []
    for factor, strength, none in zip(
        factors.unbind(-1), color_jitter, (1.0, 1.0, 1.0, 0.0), strict=True
    ):
        low = max(none - strength, 0.0) if none else -strength
        amount = low + (none + strength - low) * factor
        amounts.append(torch.where(jitter < color_jitter_prob, amount, none))
    blurred = _SIGMA[0] + (_SIGMA[1] - _SIGMA[0]) * sigma
    columns = [
        *box,
        turn < (0.5 if flip else 0.0),
        *order.argsort(dim=-1).unbind(-1),
        *amounts,
        gray < grey_prob,
        torch.where(_chosen(blur, blur_prob), blurred, 0.0),
        _chosen(solarize, solarize_prob),
    ]
    return torch.stack([column.float() for column in columns], dim=-1)


def _uniform(
    ids: Tensor, seed: int, epoch: int | Tensor, first_view: int
) -> Tensor:  # [2, N, words]
    """Uniform in [0, 1), fp64: the random words of each view of each sample."""
    view = torch.arange(first_view, first_view + VIEWS, device=ids.device).view(-1, 1, 1)
    block = torch.arange(_BLOCKS, device=ids.device)
    sample = ids.view(-1, 1)
    counter = (view << 16 | block, epoch, sample & MASK, sample >> 32 & MASK)
    words = philox4x32(counter, (seed & MASK, seed >> 32))
    return words.flatten(-2).double() * 2.0**-32


def _crops(
    u: Tensor, height: Tensor, width: Tensor, min_scale: float, max_scale: float
) -> tuple[Tensor, ...]:
    """Top, left, height and width of the first of ten tries that fits, or of a central crop."""
    area = (height * width)[:, None] * (min_scale + (max_scale - min_scale) * u[..., :_TRIES])
    low, high = (math.log(ratio) for ratio in _RATIO)
    ratio = torch.exp(low + (high - low) * u[..., _TRIES : 2 * _TRIES])
    rows, columns = torch.sqrt(area / ratio).round(), torch.sqrt(area * ratio).round()
    fits = (rows >= 1) & (rows <= height[:, None]) & (columns >= 1) & (columns <= width[:, None])
    # where no try fits: the whole image, its longer side cut to the nearest allowed ratio
    crop_height = torch.minimum(height, (width / _RATIO[0]).round())
    crop_width = torch.minimum(width, (height * _RATIO[1]).round())
    for attempt in reversed(range(_TRIES)):
        crop_height = torch.where(fits[..., attempt], rows[..., attempt], crop_height)
        crop_width = torch.where(fits[..., attempt], columns[..., attempt], crop_width)
    spare = torch.stack((height - crop_height, width - crop_width), dim=-1)
    anywhere = torch.floor(u[..., 2 * _TRIES :] * (spare + 1))
    offset = torch.where(fits.any(-1, keepdim=True), anywhere, torch.floor(spare / 2))
    return *offset.unbind(-1), crop_height, crop_width


def _chosen(u: Tensor, probabilities: tuple[float, float]) -> Tensor:  # [2, N]
    """Which samples of each view are chosen, each view with its own probability."""
    return torch.stack([row < p for row, p in zip(u, probabilities, strict=True)])


def _checked_side(name: str, side: int | Tensor, ids: Tensor) -> Tensor:  # [N]
    """The images' heights or widths, fp64; raises where they are wrong."""
    if not isinstance(side, Tensor):
        _check.integer(name, side, 1, 2**15)
        return torch.full_like(ids, side, dtype=torch.float64)
    if side.dtype != torch.int64 or side.shape != ids.shape or side.device != ids.device:
        raise ValueError(
            f"{name} must be a number or an int64 tensor {list(ids.shape)} on {ids.device}, got "
            f"{side.dtype}, shape {list(side.shape)} on {side.device}"
        )
    return side.double()


def _check_real(name: str, value: float, largest: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be made of numbers, got {type(value).__name__}")
    if not (0 <= value <= largest and math.isfinite(value)):
        raise ValueError(f"{name} must be from 0 to {largest} and finite, got {value}")
