"""Published recipes of augmentation, by name."""

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """How views are drawn; each field is a setting of `Config` by the same name.

    Crops have an aspect ratio from 3/4 to 4/3, flips a probability of 1/2. Blur has a standard
    deviation from 0.1 to 2 pixels and a kernel of about a tenth of the view's side.

    Attributes:
        crop_min_scale: smallest part of the image's area that a crop takes; the largest is 1.
        interpolation: how crops are resized, "bilinear" or "bicubic".
        flip: mirror left and right at random.
        color_jitter: strengths of brightness, contrast, saturation and hue.
        color_jitter_prob: probability of the jitter.
        grey_prob: probability of turning grey.
        blur_prob: probability of Gaussian blur, of each view.
        solarize_prob: probability of solarization, of each view.
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


# Chen et al., "A simple framework for contrastive learning of visual representations", ICML 2020:
# appendix A for ImageNet; B.9 for CIFAR-10, at half the strength of colour and without blur; both
# are bicubic in the released code
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
_SIMCLR_CIFAR = Recipe(
    crop_min_scale=0.08,
    interpolation="bicubic",
    flip=True,
    color_jitter=(0.4, 0.4, 0.4, 0.1),
    color_jitter_prob=0.8,
    grey_prob=0.2,
    blur_prob=(0.0, 0.0),
    solarize_prob=(0.0, 0.0),
)
# Ye et al., "Unsupervised embedding learning via invariant and spreading instance feature", CVPR
# 2019: the released code, from which CLAE's Plain and UEL descend
_PLAIN = Recipe(
    crop_min_scale=0.2,
    interpolation="bilinear",
    flip=True,
    color_jitter=(0.4, 0.4, 0.4, 0.4),
    color_jitter_prob=1.0,
    grey_prob=0.2,
    blur_prob=(0.0, 0.0),
    solarize_prob=(0.0, 0.0),
)
# Chen et al., "Improved baselines with momentum contrastive learning", arXiv 2003.04297, 2020
_MOCO_V2 = Recipe(
    crop_min_scale=0.2,
    interpolation="bilinear",
    flip=True,
    color_jitter=(0.4, 0.4, 0.4, 0.1),
    color_jitter_prob=0.8,
    grey_prob=0.2,
    blur_prob=(0.5, 0.5),
    solarize_prob=(0.0, 0.0),
)
# Grill et al., "Bootstrap your own latent", NeurIPS 2020, appendix B: the views differ
_BYOL = Recipe(
    crop_min_scale=0.08,
    interpolation="bicubic",
    flip=True,
    color_jitter=(0.4, 0.4, 0.2, 0.1),
    color_jitter_prob=0.8,
    grey_prob=0.2,
    blur_prob=(1.0, 0.1),
    solarize_prob=(0.0, 0.2),
)
# Wang et al., "CaCo: both positive and negative samples are directly learnable via
# cooperative-adversarial contrastive learning", TPAMI 2023: BYOL's colours and blur on MoCo's crops
_CACO = Recipe(
    crop_min_scale=0.2,
    interpolation="bilinear",
    flip=True,
    color_jitter=(0.4, 0.4, 0.2, 0.1),
    color_jitter_prob=0.8,
    grey_prob=0.2,
    blur_prob=(1.0, 0.1),
    solarize_prob=(0.0, 0.2),
)

RECIPES = {
    "simclr": _SIMCLR,
    "simclr_cifar": _SIMCLR_CIFAR,
    "plain": _PLAIN,
    "moco_v2": _MOCO_V2,
    "byol": _BYOL,
    "caco": _CACO,
}
