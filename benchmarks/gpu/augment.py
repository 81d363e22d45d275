"""Stage of the views: one launch for both views of a batch, against Kornia and torchvision."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

import clae_fast
from benchmarks.gpu.results import Bar
from benchmarks.gpu.stage import OURS, Candidate, Case, Suite, dtype_name
from benchmarks.torchvision_views import augmentation
from clae_fast import reference
from clae_fast.data import RECIPES, Recipe

SAMPLES = 256
# whose parameters are drawn together, as the trainer does
BATCHES = 8
TOLERANCE = 1 / 255


@dataclass(frozen=True)
class Views:
    """What views are made of which images.

    Attributes:
        side: Of the images.
        size: Side of the views.
        recipe: Name of the recipe.
        at_least: The bar on Kornia's time over ours.
    """

    side: int
    size: int
    recipe: str
    at_least: float


VIEWS = (Views(32, 32, "simclr_cifar", 30), Views(256, 224, "simclr", 8))


def augment(suite: Suite) -> Iterator[Case]:
    """512 views at 32 and at 224, parameters included."""
    for views in VIEWS:
        text = f"Kornia over {OURS}, {2 * SAMPLES} views at {views.size}"
        bar = Bar("augment", text, at_least=views.at_least)
        yield Case("augment", bar.text, 40, partial(_augment, suite, views, bar), (bar,))


def _augment(suite: Suite, views: Views, bar: Bar) -> None:
    N, side, size = suite.size(SAMPLES, 4), suite.size(views.side, 40), suite.size(views.size)
    recipe = RECIPES[views.recipe]
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(N * BATCHES, 3, 5, 5, generator=generator).to(suite.device)
    smooth = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic")
    images = (smooth.clamp(0, 1) * 255).byte().contiguous(memory_format=torch.channels_last)
    _check(images[:4], recipe, size)

    candidates = {
        f"{OURS}, {dtype_name(dtype)}": Candidate(_ours(images, N, recipe, size, dtype), True)
        for dtype in (torch.float32, torch.float16)
    }
    batch = images[:N]
    loop = [augmentation(size, recipe, view) for view in (0, 1)]
    for kind, pixels in (("uint8", batch), ("fp32", batch.float() / 255)):
        call = partial(_one_by_one, loop, pixels)
        candidates[f"torchvision, one by one, {kind}"] = Candidate([call], False)
    versions = {"torchvision": version("torchvision"), OURS: clae_fast.__version__}
    try:
        versions["Kornia"] = version("kornia")
    except PackageNotFoundError:
        suite.results.lacks("Kornia", "kornia is not installed")
    else:
        for mode in ("slice", "resample"):
            call = partial(_batched, _kornia(size, recipe, mode), batch)
            candidates[f"Kornia, {mode}"] = Candidate([call], False)

    measured = suite.measure(candidates)
    ours = f"{OURS}, fp32"
    best = min(
        (name for name in measured if name.startswith("Kornia")),
        key=lambda name: measured[name]["us"],
        default=None,
    )
    for name, row in measured.items():
        row.pop("over")
        row |= {"stage": "augment", "candidate": name, "views": 2 * N, "size": size, "side": side}
        row |= {"recipe": views.recipe, "version": versions[name.split(",")[0]]}
        row["ratio"] = row["us"] / measured[ours]["us"]
        if name.startswith(OURS):
            # each view's image is read and the view written
            width = 2 if name.endswith("fp16") else 4
            moved = 2 * N * 3 * (side * side + size * size * width)
            row["share_of_copy"] = 1e6 * moved / suite.ceilings()[0] / row["us"]
        if name == best:
            suite.results.judge(bar, row["ratio"], row | {"against": ours})
        else:
            suite.results.add(row)


def _ours(
    images: Tensor, N: int, recipe: Recipe, size: int, dtype: torch.dtype
) -> list[Callable[[], object]]:
    """A call for each batch of N, the first of which draws the parameters of all."""
    settings = dataclasses.asdict(recipe)
    interpolation = settings.pop("interpolation")
    ids = torch.arange(len(images), device=images.device)
    height, width = images.shape[2:]
    draw = partial(
        clae_fast.augment_params, ids, seed=0, epoch=0, height=height, width=width, **settings
    )
    table = draw()
    calls: list[Callable[[], object]] = [
        partial(
            clae_fast.augment,
            images,
            params,
            rows=rows,
            size=size,
            interpolation=interpolation,
            dtype=dtype,
            memory_format=torch.channels_last,
        )
        for params, rows in zip(table.split(N, dim=1), ids.split(N), strict=True)
    ]

    def draw_and_begin() -> None:
        table.copy_(draw())
        calls[0]()

    return [draw_and_begin, *calls[1:]]


def _check(images: Tensor, recipe: Recipe, size: int) -> None:
    """Raises where ours is not the reference's to a level of 8 bits."""
    settings = dataclasses.asdict(recipe)
    options = {"size": size, "interpolation": settings.pop("interpolation")}
    height, width = images.shape[2:]
    ids = torch.arange(len(images), device=images.device)
    params = clae_fast.augment_params(ids, seed=0, epoch=0, height=height, width=width, **settings)
    ours = torch.cat(clae_fast.augment(images, params, **options)).cpu()
    exact = reference.augment(images.cpu(), params.cpu(), **options)
    torch.testing.assert_close(ours, exact, rtol=0, atol=TOLERANCE)


def _one_by_one(transforms: list[Callable[[Tensor], Tensor]], images: Tensor) -> Tensor:
    return torch.stack([transform(image) for transform in transforms for image in images])


def _batched(transform: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Both views in one batch."""
    return transform(torch.cat([images, images]).float() / 255)


def _kornia(size: int, recipe: Recipe, cropping_mode: str) -> Callable[[Tensor], Tensor]:
    """A recipe whose views are drawn alike, in Kornia's transforms of a batch."""
    from kornia import augmentation as K

    transforms: list[torch.nn.Module] = [
        K.RandomResizedCrop(
            (size, size),
            scale=(recipe.crop_min_scale, 1.0),
            resample=recipe.interpolation,
            align_corners=False,
            cropping_mode=cropping_mode,
        ),
        K.RandomHorizontalFlip(p=0.5 * recipe.flip),
        K.ColorJitter(*recipe.color_jitter, p=recipe.color_jitter_prob),
        K.RandomGrayscale(p=recipe.grey_prob),
    ]
    blur, _ = recipe.blur_prob
    if blur:
        taps = max(2 * (size // 20) + 1, 3)
        transforms.append(K.RandomGaussianBlur((taps, taps), (0.1, 2.0), p=blur))
    return torch.nn.Sequential(*transforms)
