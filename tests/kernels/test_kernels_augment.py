"""The Triton kernel of augment against the reference, interpreted where there is no GPU."""

import dataclasses
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from clae_fast import RaggedImages, augment, augment_params, reference
from clae_fast.data import RECIPES
from clae_fast.kernels import augment as kernels

pytestmark = pytest.mark.usefixtures("nan_empty")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEIGHT, WIDTH, SIZE = 14, 19, 9
# roundings of fp32, and of fp16 where the kernel keeps a view in it: far below a level of 8 bits
TOLERANCE = {torch.float32: 2e-5, torch.float16: 1 / 255 / 2}
NORM = {"mean": (0.5, 0.4, 0.3), "std": (0.5, 0.5, 1.0)}


def images(count=3, height=HEIGHT, width=WIDTH):
    """Noise with saturated, black, white and gray pixels, on which hues are undefined."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(count, 3, height, width, generator=generator) * 1.6 - 0.3
    noise[..., :2] = noise[:, :1, :, :2]
    return (noise.clamp(0, 1) * 255).round().byte()


def row(
    box=(0, 0, HEIGHT, WIDTH),
    *,
    flip=0,
    order=(0, 1, 2, 3),
    factors=(1, 1, 1, 0),
    gray=0,
    sigma=0,
    solarize=0,
):
    return [*box, flip, *order, *factors, gray, sigma, solarize]


def table(*rows):
    """The rows as views of half as many samples."""
    return torch.tensor(rows, dtype=torch.float32).view(2, -1, 16)


def ragged(images):
    """Images, [3, H, W] each, as the op takes them, with a byte in front of each."""
    pieces, offsets, at = [], [], 0
    for image in images:
        pieces += [torch.zeros(1).byte(), image.permute(1, 2, 0).flatten()]
        offsets.append(at + 1)
        at += 1 + image.numel()
    sizes = [list(image.shape[1:]) for image in images]
    return RaggedImages(torch.cat(pieces), torch.tensor(offsets), torch.tensor(sizes))


def check(data, params, *, size=SIZE, dtype=torch.float32, rows=None, **options):
    on_device = [None if tensor is None else tensor.to(DEVICE) for tensor in (data, params, rows)]
    views = augment(
        *on_device[:2], rows=on_device[2], size=size, dtype=dtype, impl="triton", **options
    )
    options.pop("memory_format", None)
    expected = reference.augment(data, params, rows=rows, size=size, **options)
    actual = torch.cat(views).cpu()
    assert actual.dtype == dtype
    assert (actual.float() - expected).abs().max() < TOLERANCE[dtype] / min(
        options.get("std", (1,))
    )
    return views


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((0, 0, HEIGHT, WIDTH), (2, 3, SIZE, SIZE)),
        ((HEIGHT - 1, WIDTH - 1, 1, 1), (0, 8, HEIGHT, 2)),
        ((3, 5, 7, 4), (HEIGHT - 5, 0, 5, WIDTH)),
    ],
    ids=str,
)
def test_crop_and_flip(first, second, interpolation):
    check(images(1), table(row(first), row(second, flip=1)), interpolation=interpolation)


@pytest.mark.parametrize(
    "settings",
    [
        ({"factors": (1.6, 1, 1, 0)}, {"factors": (0.2, 1, 1, 0)}),
        ({"factors": (1, 1.8, 1, 0)}, {"factors": (1, 0, 1, 0)}),
        ({"factors": (1, 1, 1.8, 0)}, {"factors": (1, 1, 0.1, 0)}),
        ({"factors": (1, 1, 1, 0.31)}, {"factors": (1, 1, 1, -0.5)}),
        ({"gray": 1}, {"solarize": 1}),
        ({"sigma": 0.1}, {"sigma": 2.0}),
    ],
    ids=str,
)
def test_each_step(settings):
    first, second = settings
    check(images(1), table(row(**first), row(**second)))


@pytest.mark.parametrize(
    "orders",
    [((1, 0, 2, 3), (3, 1, 2, 0)), ((2, 3, 1, 0), (0, 3, 2, 1))],
    ids=str,
)
def test_contrast_anywhere_in_the_order(orders):
    factors = (1.3, 1.7, 1.5, -0.2)
    check(images(1), table(*[row(order=order, factors=factors) for order in orders]))


EVERYTHING = table(
    row((1, 2, 10, 12), flip=1, order=(3, 1, 0, 2), factors=(1.2, 1.4, 0.6, 0.1), sigma=1.1),
    row((0, 0, 7, 9), order=(2, 0, 3, 1), factors=(0.7, 0.6, 1.3, -0.1), solarize=1),
    row((5, 1, 8, 6), factors=(1, 1.2, 1, 0), gray=1, sigma=0.4, solarize=1),
    row((0, 9, 14, 10), flip=1),
)


@pytest.mark.parametrize(
    ("dtype", "memory_format"),
    [(torch.float32, torch.contiguous_format), (torch.float16, torch.channels_last)],
    ids=str,
)
def test_rows_dtypes_and_formats(dtype, memory_format):
    views = check(
        images(),
        EVERYTHING,
        rows=torch.tensor([2, 0]),
        dtype=dtype,
        memory_format=memory_format,
        interpolation="bicubic",
        **NORM,
    )
    for view in views:
        assert view.is_contiguous(memory_format=memory_format)


def test_several_tiles(monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK", 32)
    check(images(1), EVERYTHING[:, :1])


def test_a_wider_blur():
    check(images(1), EVERYTHING[:, :1], size=41)


@pytest.mark.parametrize("last", ["channels", "samples"])
def test_strides(last):
    data, order = images(2), {"channels": (0, 2, 3, 1), "samples": (3, 1, 2, 0)}[last]
    data = data.permute(order).contiguous().permute([order.index(dim) for dim in range(4)])
    params = EVERYTHING[:, 1:].transpose(0, 2).contiguous().transpose(0, 2)
    check(data, params, rows=torch.tensor([1]))


def test_ragged_images():
    data = ragged([images(1)[0], images(1, 5, 30)[0], images(1, 1, 1)[0]])
    dot = row((0, 0, 1, 1))
    params = table(row(factors=(1, 1.3, 1, 0.1)), dot, row((2, 3, 9, 8)), dot)
    check(data, params, rows=torch.tensor([0, 9, 2, 9])[::2])
    wide = table(row((0, 11, 5, 19), flip=1), row((1, 0, 4, 30), sigma=1))
    check(data, wide, rows=torch.tensor([1]))
    whole = ragged(images())
    options = {"size": SIZE, "impl": "triton"}
    three = torch.cat([EVERYTHING, EVERYTHING[:, :1]], 1).to(DEVICE)
    views = augment(whole.to(DEVICE), three, **options)
    assert all(map(torch.equal, views, augment(images().to(DEVICE), three, **options)))


def test_a_recipes_table():
    fields = dataclasses.asdict(RECIPES["byol"])
    interpolation = fields.pop("interpolation")
    params = augment_params(torch.arange(2), seed=0, epoch=0, height=HEIGHT, width=WIDTH, **fields)
    check(images(2), params, interpolation=interpolation)


def test_a_view_is_a_function_of_its_sample():
    data, rows = images().to(DEVICE), torch.tensor([2, 0], device=DEVICE)
    params = EVERYTHING.to(DEVICE)
    whole = augment(data, params, rows=rows, size=SIZE, impl="triton")
    part = augment(data, params[:, 1:], rows=rows[1:], size=SIZE, impl="triton")
    assert all(torch.equal(view[1:], other) for view, other in zip(whole, part, strict=True))


def test_no_samples():
    p, q = augment(
        images(0).to(DEVICE), torch.empty(2, 0, 16, device=DEVICE), size=SIZE, impl="triton"
    )
    assert p.shape == q.shape == (0, 3, SIZE, SIZE)


def test_opcheck():
    params = table(row((0, 0, 2, 2)), row((5, 5, 2, 2))).to(DEVICE)
    arguments = (images(1).to(DEVICE), None, None, params, None, 2, False)
    options = (torch.float16, True, [0.5] * 6, "triton")
    torch.library.opcheck(torch.ops.clae_fast.augment.default, (*arguments, *options))
