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

import sys
from collections.abc import Callable
from typing import Any

from benchmarks import _cli, harness, timing
from benchmarks.case import OURS
from benchmarks.cases.views import Views, photos
from benchmarks.results import Bar, Row, table, verdicts

PEER = "torchvision"


# height and width of the images, side of the views, recipe, images in a batch, batches in a call
IMAGES = {
    "32": (32, 32, 32, "simclr_cifar", 256, 8),
    # as many pixels as an image of ImageNet has
    "224": (375, 500, 224, "simclr", 32, 4),
}
BARS = {name: Bar(f"{name}: >= 2 x torchvision's workers", 2.0, form="{:.1f}x") for name in IMAGES}


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    setting = {"workers": args.workers, "rounds": args.rounds}
    return _cli.run_cases(args, {name: name for name in args.case}, _measure, _judge, setting)


def _parse(argv: list[str] | None) -> Any:
    parser = _cli.Parser(prog="python -m benchmarks.augment", description=__doc__.splitlines()[0])
    _cli.add_cases(parser, IMAGES)
    add = parser.add_argument
    add("--scale", type=_cli.positive_int, default=1, help="divide the numbers of images by this")
    add("--workers", type=_cli.positive_int, default=2, help="of torchvision's loader")
    _cli.add_timing(parser, rounds=9, threads="of clae_fast")
    return parser.parse_args(argv)


def _measure(name: str, args: Any) -> list[Row]:
    """Check and time a case, print the table, return the rows."""
    height, width, size, recipe, batch, batches = IMAGES[name]
    batch = -(-batch // args.scale)
    images = photos(batch * batches, height, width)
    views = Views(images, recipe, size, batch)
    print(f"\n{name}: views of {height} x {width}, {recipe}, batches of {batch}")
    error = views.error()
    loaders = views.torchvision_loaders(args.workers)
    for call in loaders.values():
        call()
    form = timing.fastest(loaders)
    calls: dict[str, Callable[[], None]] = {OURS: views.make, PEER: loaders[form]}
    calls[OURS]()
    timings = timing.interleave(calls, rounds=args.rounds)
    rows = [
        harness.row(OURS, timings, "", error),
        harness.row(PEER, timings, form, None),
    ]
    for row in rows:
        row |= {"case": name, "views_per_s": 2 * len(images) / (1e-3 * row["ms"])}
    print(table(rows, "impl", "views_per_s ms over_clae_fast form"))
    return rows


def _judge(rows: list[Row], args: Any) -> dict[str, str]:
    """The verdict on every bar."""
    ratios = {row["case"]: row["over_clae_fast"] for row in rows if row["impl"] == PEER}
    return verdicts({bar: ratios.get(name) for name, bar in BARS.items()})


if __name__ == "__main__":
    sys.exit(main())
