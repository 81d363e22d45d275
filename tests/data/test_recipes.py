"""Recipes against what their papers print, and the tables that are drawn by them."""

import dataclasses

import pytest
import torch

import clae_fast
from clae_fast.config import hints
from clae_fast.data import RECIPES, Recipe

# the crop's area and resizing, jitter and its probability, gray, blur and solarization of each view
PUBLISHED = {
    # Chen et al., ICML 2020, appendix A: strength 1; data_util.py of the released code: bicubic
    "simclr": (0.08, "bicubic", (0.8, 0.8, 0.8, 0.2), 0.8, 0.2, (0.5, 0.5), (0, 0)),
    # appendix B.9: strength 0.5, no blur
    "simclr_cifar": (0.08, "bicubic", (0.4, 0.4, 0.4, 0.1), 0.8, 0.2, (0, 0), (0, 0)),
    # Ye et al., CVPR 2019, the released CIFAR-10 script, and CLAE's Plain and UEL scripts
    "plain": (0.2, "bilinear", (0.4, 0.4, 0.4, 0.4), 1, 0.2, (0, 0), (0, 0)),
    # Chen et al., arXiv 2003.04297, and --aug-plus of its code
    "moco_v2": (0.2, "bilinear", (0.4, 0.4, 0.4, 0.1), 0.8, 0.2, (0.5, 0.5), (0, 0)),
    # Grill et al., NeurIPS 2020, table 6
    "byol": (0.08, "bicubic", (0.4, 0.4, 0.2, 0.1), 0.8, 0.2, (1, 0.1), (0, 0.2)),
    # Wang et al., TPAMI 2023, the released code
    "caco": (0.2, "bilinear", (0.4, 0.4, 0.2, 0.1), 0.8, 0.2, (1, 0.1), (0, 0.2)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_are_the_published_ones(name):
    crop, interpolation, *rest = PUBLISHED[name]
    assert dataclasses.astuple(RECIPES[name]) == (crop, interpolation, True, *rest)


def test_there_are_no_others():
    assert list(RECIPES) == list(PUBLISHED)


def test_every_field_is_a_setting():
    for field in dataclasses.fields(Recipe):
        assert hints()[field.name] == field.type


N = 4000


def drawn(recipe):
    """The table of a recipe for images of 300 x 300: [2, N, 16]."""
    settings = dataclasses.asdict(recipe)
    del settings["interpolation"]
    ids = torch.arange(N)
    return clae_fast.augment_params(ids, seed=1, epoch=0, height=300, width=300, **settings)


def assert_share(chosen, probability):
    """`chosen` is true with that probability, to within four standard deviations."""
    deviation = (probability * (1 - probability) / chosen.numel()) ** 0.5
    assert abs(chosen.double().mean().item() - probability) <= 4 * deviation


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("view", [0, 1])
def test_tables_have_the_published_laws(name, view):
    crop, _, strengths, jitter_prob, gray, blur, solarize = PUBLISHED[name]
    table = drawn(RECIPES[name])[view].double()
    top, left, height, width, flip = table[:, :5].T
    area = height * width / 300**2
    # sides are rounded to pixels
    assert crop - 0.01 < area.min() < crop + 0.05
    assert 0.9 < area.max() <= 1
    assert 0.72 < (width / height).min() < 0.8
    assert 1.25 < (width / height).max() < 1.37
    assert (top + height).max() <= 300
    assert (left + width).max() <= 300
    assert_share(flip, 0.5)
    jittered = (table[:, 9:13] != torch.tensor([1.0, 1, 1, 0])).any(dim=1)
    assert_share(jittered, jitter_prob)
    for factor, none, strength in zip(table[:, 9:13].T, (1, 1, 1, 0), strengths, strict=True):
        spread = (factor[jittered] - none).abs()
        assert 0.95 * strength < spread.max() <= strength * (1 + 1e-6)
    assert_share(table[:, 13], gray)
    sigma = table[:, 14]
    assert_share(sigma > 0, blur[view])
    if blur[view]:
        assert sigma[sigma > 0].min() >= 0.1 - 1e-6
        assert sigma.max() <= 2
    assert_share(table[:, 15], solarize[view])


def test_what_is_switched_off_does_nothing():
    table = drawn(CROP_ONLY)
    assert not table[..., 4].any()
    assert torch.equal(table[..., 9:], torch.tensor([1.0, 1, 1, 0, 0, 0, 0]).expand(2, N, 7))


CROP_ONLY = Recipe(
    crop_min_scale=1.0,
    interpolation="bilinear",
    flip=False,
    color_jitter=(0.0, 0.0, 0.0, 0.0),
    color_jitter_prob=0.8,
    grey_prob=0.0,
    blur_prob=(0.0, 0.0),
    solarize_prob=(0.0, 0.0),
)
