"""`augment` and its reference against torchvision's transforms, made to draw what a table says."""

import dataclasses
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

import clae_fast
from clae_fast import _native
from clae_fast.data import RECIPES
from clae_fast.testing import implementations, running

# behind everything else, so that clae_fast stays the installed one
sys.path.append(str(Path(__file__).parents[2]))

from augment_cases import check_native, photos, ragged
from op_cases import Case, Grid

from benchmarks.torchvision_views import augmentation

pytestmark = pytest.mark.usefixtures("nan_empty")

needs_native = pytest.mark.skipif(not _native.has_cpu(), reason="built with CLAE_FAST_BUILD=none")
IMPLS = ["reference", pytest.param("native", marks=needs_native)]
LEVEL = 1 / 255
NOTHING = [0, 0, 0, 0, 0, 0, 1, 2, 3, 1, 1, 1, 0, 0, 0, 0]
COLUMNS = {
    "flip": 4,
    "brightness": 9,
    "contrast": 10,
    "saturation": 11,
    "hue": 12,
    "gray": 13,
    "sigma": 14,
    "solarize": 15,
}


def photos_and_table(mixed, whole_batch, N, side, *, seed=0, noise=None, dtype=None):
    """8-bit images, of one size or of any, and the table of some of them."""
    rows = torch.arange(N) * 7 % 5
    picked = {} if whole_batch else {"rows": rows}
    sides = [(18, 25), (7, 60), (31, 12), (16, 16), (1, 1)] if mixed else [(18, 25)] * 5
    whole = [photos(1, *s, seed=seed + i)[0] for i, s in enumerate(sides)]
    height, width = torch.tensor(sides)[rows].unbind(1)
    fields = dataclasses.asdict(RECIPES["byol"])
    fields.pop("interpolation")
    params = clae_fast.augment_params(
        torch.arange(N), seed=seed, epoch=0, height=height, width=width, **fields
    )
    data = ragged(whole, gap=5) if mixed else torch.stack(whole)
    return {"images": data[rows] if whole_batch else data, "params": params, **picked}


def as_augment(tensors, results, options):
    """To the rounding of fp32, which three factors amplify up to 2.5 times each, or of fp16."""
    tolerance = 2**-10 if options.get("dtype") == torch.float16 else 2e-5
    for result, expected in zip(
        results, clae_fast.augment(**tensors, **options, impl="reference"), strict=True
    ):
        assert result.numel() == 0 or (result - expected).abs().max() < tolerance


def _augment(mixed, *, whole_batch=False, **options):
    return Case(
        "augment",
        partial(photos_and_table, mixed, whole_batch),
        grids=(Grid(((1, 1), (7, 9))),),
        large=(5, 9),
        options=options,
        images=() if mixed else ("images",),
        empty=True,
        judge=as_augment,
    )


CASES = {
    "augment": _augment(False, size=16, interpolation="bicubic"),
    "augment-half": _augment(
        False,
        whole_batch=True,
        size=8,
        dtype=torch.float16,
        memory_format=torch.channels_last,
    ),
    "augment-ragged": _augment(True, size=9, mean=(0.5, 0.4, 0.3), std=[0.2, 0.25, 0.3]),
}


@pytest.fixture(params=IMPLS)
def augment(request):
    return partial(clae_fast.augment, impl=request.param)


def faint(images):
    """With room for the overshoots of bicubic weights, where 8-bit transforms cut them off."""
    return images // 2 + 64


def table(*rows):
    """A table whose second view is the first."""
    return torch.tensor(rows, dtype=torch.float32).expand(2, -1, -1)


def row(height, width, *, box=None, order=(0, 1, 2, 3), **settings):
    numbers = list(NOTHING)
    numbers[:4] = box or (0, 0, height, width)
    numbers[5:9] = order
    for name, value in settings.items():
        numbers[COLUMNS[name]] = value
    return numbers


def force(step, **drawn):
    step.make_params = lambda _: drawn


def forced(transform, numbers):
    """`transform` of a recipe, which draws what a row of the table says."""
    top, left, height, width, flip, *order = (int(number) for number in numbers[:9])
    brightness, contrast, saturation, hue, gray, sigma, solarize = numbers[9:]
    for step in transform.transforms:
        if isinstance(step, v2.RandomResizedCrop):
            force(step, top=top, left=left, height=height, width=width)
        elif isinstance(step, v2.RandomHorizontalFlip):
            step.p = float(flip)
        elif isinstance(step, v2.RandomGrayscale):
            step.p = gray
        elif isinstance(step, v2.RandomSolarize):
            step.p = solarize
        elif isinstance(step, v2.RandomApply) and isinstance(step.transforms[0], v2.GaussianBlur):
            step.p = float(sigma > 0)
            force(step.transforms[0], sigma=[sigma, sigma])
        elif isinstance(step, v2.RandomApply):
            step.p = float([brightness, contrast, saturation, hue] != [1, 1, 1, 0])
            force(
                step.transforms[0],
                fn_idx=torch.tensor(order),
                brightness_factor=brightness,
                contrast_factor=contrast,
                saturation_factor=saturation,
                hue_factor=hue,
            )
    return transform


@pytest.mark.parametrize(
    ("height", "width", "size"), [(32, 32, 32), (23, 41, 17), (50, 37, 45)], ids=str
)
@pytest.mark.parametrize("name", RECIPES)
def test_is_what_the_recipe_makes(name, height, width, size, augment):
    images = faint(photos(7, height, width))
    fields = dataclasses.asdict(RECIPES[name])
    interpolation = fields.pop("interpolation")
    ids = torch.arange(100, 107)
    params = clae_fast.augment_params(ids, seed=1, epoch=2, height=height, width=width, **fields)
    views = augment(images, params, size=size, interpolation=interpolation)
    for view in (0, 1):
        for i, image in enumerate(images):
            transform = augmentation(size, RECIPES[name], view)
            expected = forced(transform, params[view, i].tolist())(image.float() / 255)
            assert views[view][i].shape == expected.shape
            assert (views[view][i] - expected).abs().max() < LEVEL / 16


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    "box",
    [(0, 0, 40, 57), (3, 5, 11, 7), (10, 20, 30, 37), (39, 56, 1, 1), (0, 30, 40, 2)],
    ids=str,
)
@pytest.mark.parametrize("flip", [0, 1])
def test_crop(box, flip, interpolation, augment):
    image = faint(photos(1, 40, 57))
    params = table(row(40, 57, box=box, flip=flip))
    view, _ = augment(image, params, size=19, interpolation=interpolation)
    mode = v2.InterpolationMode(interpolation)
    # 8 bits round between rows and columns, which bicubic weights amplify by 1.25, and at the end
    for x, unit, tolerance in ((image.float() / 255, 1, LEVEL / 16), (image, 255, 1.25)):
        expected = F.resized_crop(x, *box, [19, 19], interpolation=mode)
        expected = F.horizontal_flip(expected) if flip else expected
        assert (view * unit - expected).abs().max() < tolerance


@pytest.mark.parametrize(
    ("function", "setting"),
    [
        (lambda x: F.adjust_brightness(x, 1.6), {"brightness": 1.6}),
        (lambda x: F.adjust_brightness(x, 0.3), {"brightness": 0.3}),
        (lambda x: F.adjust_contrast(x, 1.8), {"contrast": 1.8}),
        (lambda x: F.adjust_contrast(x, 0.0), {"contrast": 0.0}),
        (lambda x: F.adjust_saturation(x, 1.8), {"saturation": 1.8}),
        (lambda x: F.adjust_saturation(x, 0.1), {"saturation": 0.1}),
        (lambda x: F.adjust_hue(x, 0.31), {"hue": 0.31}),
        (lambda x: F.adjust_hue(x, -0.5), {"hue": -0.5}),
        (lambda x: F.rgb_to_grayscale(x, 3), {"gray": 1}),
        (lambda x: F.gaussian_blur(x, [3, 3], [0.1, 0.1]), {"sigma": 0.1}),
        (lambda x: F.gaussian_blur(x, [3, 3], [2.0, 2.0]), {"sigma": 2.0}),
        (lambda x: F.solarize(x, 0.5 if x.is_floating_point() else 128), {"solarize": 1}),
        (F.horizontal_flip, {"flip": 1}),
        (lambda x: x, {}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_each_step(function, setting, augment):
    images = photos(3, 21, 21)
    images[0], images[1, :, :7] = images[0, :1], 0
    params = table(*[row(21, 21, **setting)] * 3)
    view, _ = augment(images, params, size=21)
    # 8 bits lose up to a level of the gray image, and another of the result
    for x, unit, tolerance in ((images.float() / 255, 1, LEVEL / 16), (images, 255, 2)):
        assert (view * unit - function(x)).abs().max() < tolerance


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (1, 0, 3, 2), (2, 3, 0, 1)])
def test_order_of_the_colors(order, augment):
    images = photos(2, 12, 15)
    factors = {"brightness": 1.5, "contrast": 0.6, "saturation": 1.7, "hue": -0.2}
    view, _ = augment(images, table(*[row(12, 15, order=order, **factors)] * 2), size=13)
    expected = F.resize(images.float() / 255, [13, 13])
    for which in order:
        name = list(factors)[which]
        expected = getattr(F, f"adjust_{name}")(expected, factors[name])
    assert (view - expected).abs().max() < LEVEL / 16


def batch(N=6, height=18, width=25):
    ids = torch.tensor([4, 0, 9, 9, 2, 7])[:N]
    fields = dataclasses.asdict(RECIPES["byol"])
    fields.pop("interpolation")
    params = clae_fast.augment_params(ids, seed=0, epoch=0, height=height, width=width, **fields)
    return photos(10, height, width), params, ids


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_rows_dtypes_and_formats(dtype, memory_format, augment):
    images, params, rows = batch()
    norm = {"mean": (0.5, 0.4, 0.3), "std": [0.2, 0.25, 0.3]}
    options = {"size": 16, "interpolation": "bicubic"}
    views = augment(
        images, params, rows=rows, dtype=dtype, memory_format=memory_format, **norm, **options
    )
    plain = augment(images[rows], params, **options)
    for view, pixels in zip(views, plain, strict=True):
        assert view.dtype == dtype
        assert view.is_contiguous(memory_format=memory_format)
        expected = F.normalize(pixels, **norm)
        assert torch.equal(view, expected.to(dtype))
    assert views[0].untyped_storage().data_ptr() == views[1].untyped_storage().data_ptr()


def test_a_view_is_a_function_of_its_sample(augment):
    images, params, rows = batch()
    whole = augment(images, params, rows=rows, size=14)
    for i in (0, 3, 5):
        part = augment(images, params[:, i : i + 1], rows=rows[i : i + 1], size=14)
        for view in (0, 1):
            assert torch.equal(part[view][0], whole[view][i])


def mixed_batch(N=6):
    """Ragged images, the table of some of them, and which they are."""
    images = [
        photos(1, height, width, seed=i)[0]
        for i, (height, width) in enumerate([(18, 25), (7, 60), (31, 12), (16, 16), (1, 1)])
    ]
    rows = torch.tensor([4, 0, 3, 3, 2, 1])[:N]
    data = ragged(images, gap=5)
    fields = dataclasses.asdict(RECIPES["byol"])
    fields.pop("interpolation")
    height, width = data.sizes[rows].unbind(1)
    ids = torch.arange(N)
    params = clae_fast.augment_params(ids, seed=0, epoch=0, height=height, width=width, **fields)
    return images, data, params, rows


def test_ragged_images_of_one_size(augment):
    images, params, rows = batch()
    options = {"size": 16, "interpolation": "bicubic"}
    whole = augment(images, params, rows=rows, **options)
    for gap in (0, 3):
        views = augment(ragged(images, gap=gap), params, rows=rows, **options)
        assert all(map(torch.equal, views, whole))
    views = augment(ragged(images[rows]), params, **options)
    assert all(map(torch.equal, views, whole))


def test_ragged_images_of_any_size(augment):
    images, data, params, rows = mixed_batch()
    views = augment(data, params, rows=rows, size=16)
    for i, row in enumerate(rows.tolist()):
        alone = augment(images[row][None], params[:, i : i + 1], size=16)
        for view in (0, 1):
            assert torch.equal(views[view][i], alone[view][0])


def test_ragged_images_keep_their_pixels():
    images, data, _, _ = mixed_batch()
    there = data.to("cpu")
    assert all(map(torch.equal, map(there.image, range(5)), images))
    assert there.pixels is data.pixels
    assert data.to(torch.device("meta")).sizes.is_meta


@needs_native
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(32, 32, 32), (1, 1, 2), (8, 8, 16), (2, 90, 3), (61, 7, 41), (150, 201, 13), (24, 20, 101)],
    ids=str,
)
def test_native_against_the_reference(height, width, size, interpolation):
    check_native(height, width, size, interpolation=interpolation)


@needs_native
def test_halves_are_rounded_to_the_nearest():
    # normal, subnormal and infinite ones, and ties
    numbers = torch.tensor([1e-8, 2.0**-25, 3e-8, 1e-6, 6e-5, 1.0, 65519.0, 65520.0, 1e6, -3e-7])
    bits = torch.arange(0x477FE000, 0x47800000, 256, dtype=torch.int32)
    for mean in (*(-numbers).tolist(), *(-bits.view(torch.float32)[::7]).tolist()):
        norm = {"mean": [mean] * 3, "std": [1.0] * 3}
        image = torch.zeros(1, 3, 2, 2).byte()
        options = {"size": 2, "impl": "native", **norm}
        view, _ = clae_fast.augment(image, table(row(2, 2)), dtype=torch.float16, **options)
        exact, _ = clae_fast.augment(image, table(row(2, 2)), **options)
        assert torch.equal(view, exact.half())


def test_no_samples(augment):
    images, params, rows = batch(0)
    for data in (images, ragged(images), ragged(images[:0])):
        p, q = augment(data, params, rows=rows, size=8)
        assert p.shape == q.shape == (0, 3, 8, 8)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"images": [1]}, TypeError, "images must be a torch.Tensor, got list"),
        ({"images": torch.zeros(10, 3, 18, 25)}, TypeError, "images must be of dtype uint8"),
        (
            {"images": torch.zeros(10, 18, 25, 3).byte()},
            ValueError,
            r"images must have shape \[S, 3, H, W\], got \[10, 18, 25, 3\]",
        ),
        ({"params": torch.zeros(2, 6, 15)}, ValueError, r"params must have shape \[2, N, 16\]"),
        ({"params": torch.zeros(2, 6, 16).double()}, TypeError, "params must be of dtype"),
        ({"rows": torch.zeros(5).long()}, ValueError, r"rows must have shape \[6\], got \[5\]"),
        ({"rows": torch.zeros(6)}, TypeError, "rows must be of dtype int64"),
        ({"rows": None}, ValueError, "without rows, images must be the 6 of params, got 10"),
        ({"rows": torch.full((6,), 10)}, IndexError, "rows must be from 0 to 9, got"),
        (
            {"params": table(*[row(18, 25, box=(0, 1, 18, 25))] * 6)},
            ValueError,
            "params must be of the images' heights and widths",
        ),
        (
            {"params": table(*[row(18, 25, box=(0, 0, 0, 25))] * 6)},
            ValueError,
            "got a crop outside",
        ),
        ({"rows": torch.tensor([0, 1, -1, 2, 3, 4])}, IndexError, "rows must be from 0 to 9, got"),
        ({"size": 1}, ValueError, "size must be from 2 to 16384, got 1"),
        ({"size": 8.0}, TypeError, "size must be an integer, got float"),
        ({"dtype": torch.bfloat16}, ValueError, "dtype must be torch.float32 or torch.float16"),
        ({"interpolation": "nearest"}, ValueError, "interpolation must be bilinear or bicubic"),
        (
            {"memory_format": torch.preserve_format},
            ValueError,
            "memory_format must be torch.contiguous_format or torch.channels_last",
        ),
        ({"mean": (0.5,) * 3}, ValueError, "mean and std must be given together"),
        ({"mean": 0.5, "std": 0.5}, TypeError, "mean must be a list or tuple, got float"),
        ({"mean": (0,) * 3, "std": (1, 1)}, ValueError, "std must be 3 finite numbers"),
        ({"mean": (0,) * 3, "std": (1, 0, 1)}, ValueError, "std must be positive"),
        ({"impl": "cuda"}, RuntimeError, "augment has no implementation 'cuda'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_refuses(changes, error, message):
    images, params, rows = batch()
    arguments = {"images": images, "params": params, "rows": rows, "size": 8, **changes}
    with pytest.raises(error, match=message):
        clae_fast.augment(**arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"pixels": [0]}, TypeError, "images.pixels must be a torch.Tensor, got list"),
        (
            {"pixels": torch.zeros(9, 2).byte()[:, 0]},
            ValueError,
            "images.pixels must be one-dimensional and contiguous, got shape",
        ),
        ({"offsets": torch.zeros(5).int()}, TypeError, "images.offsets must be of dtype"),
        ({"offsets": torch.zeros(5, 1).long()}, ValueError, r"offsets must have shape \[S\]"),
        ({"sizes": torch.zeros(4, 2).long()}, ValueError, r"sizes must have shape \[5, 2\]"),
        ({"sizes": torch.zeros(5, 2, device="meta").long()}, ValueError, "on the device of images"),
        ({"pixels": torch.zeros(99).byte()}, ValueError, "must lie inside of images.pixels"),
        ({"offsets": torch.full((5,), -1)}, ValueError, "must lie inside of images.pixels"),
        ({"sizes": torch.ones(5, 2).long()}, ValueError, "got a crop outside"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_refuses_ragged_images(changes, error, message):
    _, data, params, rows = mixed_batch()
    with pytest.raises(error, match=message):
        clae_fast.augment(data._replace(**changes), params, rows=rows, size=8)


@pytest.mark.parametrize(
    ("offset", "sides"),
    [
        (0, (2**31, 2**31)),
        (0, (2**32, 2**31)),
        (0, (2**62, 2**62)),
        (2**63 - 1, (8, 8)),
        (2**63 - 200, (8, 8)),
    ],
)
def test_refuses_ragged_images_whose_ends_overflow(offset, sides):
    images = clae_fast.RaggedImages(
        torch.zeros(192, dtype=torch.uint8), torch.tensor([offset]), torch.tensor([sides])
    )
    params = torch.zeros(2, 1, 16)
    params[..., 2:4] = 1
    params[..., 5:9] = torch.arange(4.0)
    for impl in implementations("augment"):
        with (
            pytest.raises(ValueError, match=r"must lie inside of images\.pixels"),
            running(impl) as on,
        ):
            clae_fast.augment(images, params, size=8, impl=on)
