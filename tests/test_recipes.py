"""Recipes against what their papers print, and the views that they draw."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from clae_fast import data
from clae_fast.config import Config
from clae_fast.data import RECIPES, Recipe
from clae_fast.data.split import Arrays

# the crop's area and resizing, jitter and its probability, grey, blur and solarization of each view
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
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_are_the_published_ones(name):
    crop, interpolation, *rest = PUBLISHED[name]
    assert dataclasses.astuple(RECIPES[name]) == (crop, interpolation, True, *rest)


def test_there_are_no_others():
    assert list(RECIPES) == list(PUBLISHED)


def test_every_field_is_a_setting():
    settings = {field.name: field.type for field in dataclasses.fields(Config)}
    for field in dataclasses.fields(Recipe):
        assert settings[field.name] == field.type


def steps(name, image_size=224, view=0):
    """The steps of a view by kind; those of RandomApply by what they apply."""
    found = {}
    for step in data.augmentation(image_size, RECIPES[name], view).transforms:
        kind = type(step.transforms[0]) if isinstance(step, v2.RandomApply) else type(step)
        found[kind] = step
    return found


class TestAugmentation:
    @pytest.mark.parametrize("name", PUBLISHED)
    @pytest.mark.parametrize("view", [0, 1])
    def test_parameters_reach_torchvision(self, name, view):
        crop, interpolation, strengths, jitter_prob, grey, blur, solarize = PUBLISHED[name]
        found = steps(name, view=view)
        assert found[v2.RandomResizedCrop].size == (224, 224)
        assert tuple(found[v2.RandomResizedCrop].scale) == (crop, 1)
        assert tuple(found[v2.RandomResizedCrop].ratio) == (3 / 4, 4 / 3)
        assert found[v2.RandomResizedCrop].interpolation.value == interpolation
        assert found[v2.RandomHorizontalFlip].p == 0.5
        (jitter,) = found[v2.ColorJitter].transforms
        assert found[v2.ColorJitter].p == jitter_prob
        for value, range_ in zip(
            strengths, (jitter.brightness, jitter.contrast, jitter.saturation), strict=False
        ):
            assert range_ == pytest.approx((1 - value, 1 + value))
        assert jitter.hue == pytest.approx((-strengths[3], strengths[3]))
        assert found[v2.RandomGrayscale].p == grey
        for prob, kind in ((blur[view], v2.GaussianBlur), (solarize[view], v2.RandomSolarize)):
            assert (kind in found) == (prob > 0)
            assert prob in (0, found[kind].p if kind in found else 0)

    @pytest.mark.parametrize(
        ("image_size", "kernel"), [(16, 3), (32, 3), (64, 7), (96, 9), (224, 23)]
    )
    def test_blur_spans_a_tenth_of_the_view(self, image_size, kernel):
        blur = steps("byol", image_size)[v2.GaussianBlur].transforms[0]
        assert tuple(blur.kernel_size) == (kernel, kernel)
        assert tuple(blur.sigma) == (0.1, 2.0)

    @pytest.mark.parametrize("name", PUBLISHED)
    @pytest.mark.parametrize("view", [0, 1])
    def test_views_of_floats_stay_in_range(self, name, view):
        transform = data.augmentation(24, RECIPES[name], view)
        checks = (torch.arange(12).reshape(-1, 1) + torch.arange(12)) % 2
        for image in (torch.ones(3, 12, 12), checks.float().expand(3, -1, -1)):
            for _ in range(10):
                found = transform(image)
                assert found.min() >= 0
                assert found.max() <= 1

    def test_solarization_inverts_the_bright_half(self):
        recipe = dataclasses.replace(CROP_ONLY, solarize_prob=(0.0, 1.0))
        pixels = np.array([0, 100, 127, 128, 200, 255], dtype=np.uint8)
        image = Image.fromarray(np.tile(pixels[:, None, None], (1, 6, 3)))
        views = [data.augmentation(6, recipe, view) for view in (0, 1)]
        found = [view(image)[0, :, 0] * 255 for view in views]
        torch.testing.assert_close(found[0], torch.tensor([0.0, 100, 127, 128, 200, 255]))
        torch.testing.assert_close(found[1], torch.tensor([0.0, 100, 127, 127, 55, 0]))

    def test_what_is_switched_off_is_left_out(self):
        kinds = [type(t) for t in data.augmentation(16, CROP_ONLY, 0).transforms]
        assert kinds == [v2.RandomResizedCrop, v2.ToImage, v2.ToDtype, v2.ToPureTensor]

    def test_evaluation_sees_the_middle(self):
        image = torch.zeros(3, 8, 16)
        image[:, :, 4:12] = 1
        assert torch.equal(data.eval_transform(8)(image), torch.ones(3, 8, 8))


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


@pytest.fixture(scope="module")
def photographs():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 20, 24, 3), dtype=np.uint8)
    return data.Split.whole(Arrays(pixels), range(8))


class TestTwoViews:
    @pytest.mark.parametrize("name", PUBLISHED)
    def test_views_are_plain_float_pixels(self, photographs, name):
        p, q, errors = data.TwoViews(photographs, 16, RECIPES[name], seed=0)[0, 3]
        assert errors == []
        for view in (p, q):
            assert type(view) is torch.Tensor
            assert (view.shape, view.dtype) == ((3, 16, 16), torch.float32)
            assert 0 <= view.min() < view.max() <= 1

    @pytest.mark.parametrize("name", ["simclr_cifar", "byol"])
    def test_a_view_depends_on_seed_epoch_index_and_view_alone(self, photographs, name):
        def views(seed=5):
            return data.TwoViews(photographs, 16, RECIPES[name], seed=seed)

        p, q, _ = views()[2, 3]
        torch.manual_seed(123)
        _ = views()[0, 1]
        again = views()[2, 3]
        assert torch.equal(p, again[0])
        assert torch.equal(q, again[1])
        others = [q, views()[3, 3][0], views()[2, 4][0], views(seed=6)[2, 3][0]]
        assert not any(torch.equal(p, other) for other in others)

    def test_the_global_generator_is_left_alone(self, photographs):
        views = data.TwoViews(photographs, 16, RECIPES["byol"], seed=0)
        state = torch.get_rng_state()
        _ = views[0, 0]
        assert torch.equal(torch.get_rng_state(), state)

    def test_digits_see_the_views_that_they_always_saw(self):
        train = data.load("digits", limit=4).train
        recipe = dataclasses.replace(CROP_ONLY, crop_min_scale=0.4)
        p, q, _ = data.TwoViews(train, 16, recipe, seed=0)[1, 2]
        crop = v2.RandomResizedCrop(16, scale=(0.4, 1.0))
        for number, view in enumerate((p, q)):
            seed = np.random.SeedSequence((0, 1, 2, number)).generate_state(1)[0]
            torch.manual_seed(int(seed))
            assert torch.equal(view, crop(train[2]))
