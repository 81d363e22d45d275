"""Both views of images on the CPU: clae_fast against torchvision's transforms v2 in a DataLoader.

    python -m benchmarks.augment                     # 32x32 and 224, two threads, two workers
    python -m benchmarks.augment --case 224 --bars

Images are decoded before on both sides. A call makes both views of as many images, in batches whose
parameters are drawn together, as the trainer does. torchvision's workers run the transforms that
`augment` is tested against, on PIL images and on uint8 tensors in both layouts; the fastest stands
for it. All are timed in interleaved rounds; benchmarks/README.md has the protocol. Exit status: 0;
1 when clae_fast disagrees with its reference, or with `--bars` when a bar is missed; 2 for bad
arguments.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as F

import clae_fast
from benchmarks import _cli, timing
from benchmarks.torchvision_views import augmentation
from clae_fast.data import RECIPES, Recipe

OURS = "clae_fast"
PEER = "torchvision"
BAR = 2.0  # times the speed of the peer
TOLERANCE = 1 / 255


@dataclass(frozen=True)
class Case:
    """A kind of images and what is made of them.

    Attributes:
        height: Of the images.
        width: Of the images.
        size: Side of the views.
        recipe: Name of the recipe.
        batch: Images in a batch.
        batches: Batches in a call.
    """

    height: int
    width: int
    size: int
    recipe: str
    batch: int
    batches: int


CASES = {
    "32": Case(32, 32, 32, "simclr_cifar", 256, 8),
    # as many pixels as an image of ImageNet has
    "224": Case(375, 500, 224, "simclr", 32, 4),
}


class Views(Dataset):
    """Item i is both views of image i, which the transforms draw as they like."""

    def __init__(self, images: Sequence[Any], recipe: Recipe, size: int) -> None:
        self.images = images
        self.transforms = [augmentation(size, recipe, view) for view in (0, 1)]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        p, q = (transform(self.images[index]) for transform in self.transforms)
        return p, q


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    setting = {"workers": args.workers, "rounds": args.rounds}
    return _cli.run_cases(args, _measure, _judge, setting)


def photos(count: int, height: int, width: int) -> Tensor:  # [count, 3, height, width]
    """Smooth images with some noise, [count, height, width, 3] in memory."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 5, 5, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")
    noise = 0.05 * torch.randn(smooth.shape, generator=generator)
    pixels = ((smooth + noise).clamp(0, 1) * 255).round().byte()
    return pixels.contiguous(memory_format=torch.channels_last)


def _parse(argv: list[str] | None) -> Any:
    parser = _cli.Parser(prog="python -m benchmarks.augment", description=__doc__.splitlines()[0])
    names = tuple(CASES)
    add = parser.add_argument
    add("--case", type=_cli.name_list(names), default=list(names), help=", ".join(names))
    add("--scale", type=_cli.positive_int, default=1, help="divide the numbers of images by this")
    add("--threads", type=_cli.positive_int, default=2, help="of clae_fast")
    add("--workers", type=_cli.positive_int, default=2, help="of torchvision's loader")
    add("--rounds", type=_cli.positive_int, default=9)
    add("--json", type=_cli.json_path, metavar="FILE", help="write the results there too")
    add("--bars", action="store_true", help="exit with status 1 when a bar is missed")
    return parser.parse_args(argv)


def _measure(name: str, args: Any) -> list[dict[str, Any]]:
    """Check and time a case; no rows where ours is wrong."""
    case = CASES[name]
    batch = -(-case.batch // args.scale)
    images = photos(batch * case.batches, case.height, case.width)
    recipe = RECIPES[case.recipe]
    print(f"\n{name}: views of {case.height} x {case.width}, {case.recipe}, batches of {batch}")
    error = _error(images[:4], recipe, case.size)
    if not error <= TOLERANCE:
        print(f"error: clae_fast is {error:.1e} off its reference at {name}", file=sys.stderr)
        return []
    loaders = {
        form: DataLoader(
            Views(decoded, recipe, case.size),
            batch_size=batch,
            num_workers=args.workers,
            persistent_workers=True,
        )
        for form, decoded in {
            "PIL": [F.to_pil_image(image) for image in images],
            "uint8 [3, H, W]": images.contiguous(),
            "uint8 [H, W, 3]": images,
        }.items()
    }
    peers: dict[str, Callable[[], object]] = {
        form: partial(_drain, loader) for form, loader in loaders.items()
    }
    for call in peers.values():
        call()
    form = timing.fastest(peers)
    ours = partial(_views, images, recipe, case.size, batch)
    calls = {OURS: lambda: _drain(ours()), PEER: peers[form]}
    calls[OURS]()
    timings = timing.interleave(calls, rounds=args.rounds)
    rows = []
    for impl, t in timings.items():
        low, high = t.p20_p80_ms
        row = {
            "case": name,
            "impl": impl,
            "form": form if impl == PEER else "",
            "views_per_s": 2 * len(images) / (1e-3 * t.ms),
            "ms": t.ms,
            "p20_ms": low,
            "p80_ms": high,
            "over_clae_fast": t.over(timings[OURS]),
            "samples": len(t.seconds),
            "quiet": t.quiet,
            "error": error if impl == OURS else None,
        }
        rows.append(row)
    print(f"  {'':<16}{'views/s':>10}{'ms':>10}{'x ours':>8}{'quiet':>8}  form")
    for row in rows:
        print(
            f"  {row['impl']:<16}{row['views_per_s']:>10.0f}{row['ms']:>10.2f}"
            f"{row['over_clae_fast']:>8.2f}{row['quiet']:>5}/{row['samples']:<2}  {row['form']}"
        )
    return rows


def _views(
    images: Tensor, recipe: Recipe, size: int, batch: int, impl: str = "auto"
) -> Iterator[tuple[Tensor, Tensor]]:
    """Both views of all images, a batch after another."""
    height, width = images.shape[2:]
    settings = dataclasses.asdict(recipe)
    interpolation = settings.pop("interpolation")
    ids = torch.arange(len(images))
    params = clae_fast.augment_params(ids, seed=0, epoch=0, height=height, width=width, **settings)
    for rows, drawn in zip(ids.split(batch), params.split(batch, dim=1), strict=True):
        yield clae_fast.augment(
            images, drawn, rows=rows, size=size, interpolation=interpolation, impl=impl
        )


def _error(images: Tensor, recipe: Recipe, size: int) -> float:
    """The largest difference of a pixel from the reference's."""
    ours, exact = (
        torch.cat(*_views(images, recipe, size, len(images), impl))
        for impl in ("auto", "reference")
    )
    return float((ours - exact).abs().max())


def _drain(batches: Iterable[Any]) -> None:
    for _ in batches:
        pass


def _judge(rows: list[dict[str, Any]]) -> dict[str, tuple[str, bool]]:
    """Every bar with its verdict and whether it was missed."""
    verdicts = {}
    for name in CASES:
        ratios = [
            row["over_clae_fast"] for row in rows if (row["case"], row["impl"]) == (name, PEER)
        ]
        bar = f"{name}: >= {BAR:g} x torchvision's workers"
        if not ratios:
            verdicts[bar] = "not measured", False
            continue
        met = ratios[0] >= BAR
        verdicts[bar] = f"{'met' if met else 'missed'} ({ratios[0]:.1f}x)", not met
    return verdicts


if __name__ == "__main__":
    sys.exit(main())
