"""The stage of the views: both views of a batch, against Kornia and torchvision."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from importlib.metadata import version

import torch

import clae_fast
from benchmarks.case import OURS, dtype_name
from benchmarks.cases.views import Views, photos
from benchmarks.gpu.stage import Suite, Task, judged
from benchmarks.harness import Candidate
from benchmarks.results import Bar

SAMPLES = 256
# whose parameters are drawn together
BATCHES = 8
# side of the images and of the views, recipe, and the bar on Kornia's time over ours
VIEWS = ((32, 32, "simclr_cifar", 30.0), (256, 224, "simclr", 8.0))


def augment(suite: Suite) -> Iterator[Task]:
    """512 views at 32 and at 224, parameters included."""
    for side, size, recipe, at_least in VIEWS:
        text = f"Kornia over {OURS}, {2 * SAMPLES} views at {size}"
        yield judged("augment", text, 40, _augment, suite, side, size, recipe, at_least=at_least)


def _augment(suite: Suite, side: int, size: int, recipe: str, bar: Bar) -> None:
    N, side, size = suite.size(SAMPLES, 4), suite.size(side, 40), suite.size(size)
    views = Views(photos(N * BATCHES, side, side, suite.device), recipe, size, N)
    views.error()
    candidates = {
        f"{OURS}, {dtype_name(dtype)}": Candidate(
            [partial(views.make, dtype=dtype, memory_format=torch.channels_last)], True, BATCHES
        )
        for dtype in (torch.float32, torch.float16)
    }
    for kind, call in views.torchvision_one_by_one().items():
        candidates[f"torchvision, one by one, {kind}"] = Candidate([call])
    versions = {"torchvision": version("torchvision"), OURS: clae_fast.__version__}
    try:
        for mode, call in views.kornia().items():
            candidates[f"Kornia, {mode}"] = Candidate([call])
        versions["Kornia"] = version("kornia")
    except ModuleNotFoundError:
        suite.results.lacks("Kornia", "kornia is not installed")

    measured = suite.measure(candidates)
    ours = f"{OURS}, fp32"
    kornia = (name for name in measured if name.startswith("Kornia"))
    best = min(kornia, key=lambda name: measured[name].ms, default=None)
    for name, timed in measured.items():
        row = {**timed.row("us"), "stage": "augment", "candidate": name, "views": 2 * N}
        row |= {"size": size, "side": side, "recipe": recipe}
        row |= {"version": versions[name.split(",")[0]], "ratio": timed.over(measured[ours])}
        if name.startswith(OURS):
            # each view's image is read and the view written
            width = 2 if name.endswith("fp16") else 4
            moved = 2 * N * 3 * (side * side + size * size * width)
            row["share_of_copy"] = suite.share_of_copy(moved, timed)
        if name == best:
            row["against"] = ours
        suite.results.judge(bar if name == best else None, row["ratio"], row)
