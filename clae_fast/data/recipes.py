"""Published recipes of augmentation, by name."""

import dataclasses
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """How views are drawn; each field is a setting of a run by the same name.

    Crops have an aspect ratio from 3/4 to 4/3, flips a probability of 1/2. Blur has a standard
    deviation from 0.1 to 2 pixels and a kernel of about a tenth of the view's side.

    Attributes:
        crop_min_scale: Smallest part of the image's area that a crop takes; the largest is 1.
        interpolation: How crops are resized, "bilinear" or "bicubic".
        flip: Whether views are mirrored left and right at random.
        color_jitter: Strengths of brightness, contrast, saturation and hue.
        color_jitter_prob: Probability of the jitter.
        grey_prob: Probability of a gray view.
        blur_prob: Probability of Gaussian blur, for each of the two views.
        solarize_prob: Probability of solarization, for each of the two views.
    """

    crop_min_scale: float
    interpolation: str
    flip: bool
    color_jitter: tuple[float, float, float, float]
    color_jitter_prob: float
    grey_prob: float
    blur_prob: tuple[float, float]
    solarize_prob: tuple[float, float]

    @classmethod
    def of(cls, settings: Any) -> "Recipe":
        """The recipe in a run's settings of views."""
        names = (field.name for field in dataclasses.fields(cls))
        return cls(**{name: getattr(settings, name) for name in names})


# Chen et al., "A simple framework for contrastive learning of visual representations", ICML 2020,
# appendix A; the released code resizes by bicubic interpolation
_SIMCLR = Recipe(
    crop_min_scale=0.08,
    interpolation="bicubic",
    flip=True,
    color_jitter=(0.8, 0.8, 0.8, 0.2),
    color_jitter_prob=0.8,
    grey_prob=0.2,
    blur_prob=(0.5, 0.5),
    solarize_prob=(0.0, 0.0),
)
# appendix B.9, for CIFAR-10: half the strength of color, and no blur
_SIMCLR_CIFAR = replace(_SIMCLR, color_jitter=(0.4, 0.4, 0.4, 0.1), blur_prob=(0.0, 0.0))
# Ye et al., "Unsupervised embedding learning via invariant and spreading instance feature", CVPR
# 2019: the released code, from which CLAE's Plain and UEL descend
_PLAIN = replace(
    _SIMCLR_CIFAR,
    crop_min_scale=0.2,
    interpolation="bilinear",
    color_jitter=(0.4, 0.4, 0.4, 0.4),
    color_jitter_prob=1.0,
)
# Chen et al., "Improved baselines with momentum contrastive learning", arXiv 2003.04297, 2020
_MOCO_V2 = replace(
    _SIMCLR_CIFAR, crop_min_scale=0.2, interpolation="bilinear", blur_prob=(0.5, 0.5)
)
# Grill et al., "Bootstrap your own latent", NeurIPS 2020, appendix B: the views differ
_BYOL = replace(
    _SIMCLR_CIFAR,
    color_jitter=(0.4, 0.4, 0.2, 0.1),
    blur_prob=(1.0, 0.1),
    solarize_prob=(0.0, 0.2),
)
# Wang et al., "CaCo: both positive and negative samples are directly learnable via
# cooperative-adversarial contrastive learning", TPAMI 2023: BYOL's colors and blur on MoCo's crops
_CACO = replace(_BYOL, crop_min_scale=0.2, interpolation="bilinear")

RECIPES = {
    "simclr": _SIMCLR,
    "simclr_cifar": _SIMCLR_CIFAR,
    "plain": _PLAIN,
    "moco_v2": _MOCO_V2,
    "byol": _BYOL,
    "caco": _CACO,
}
