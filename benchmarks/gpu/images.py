"""The stages of the images: the sign step, and the first convolution with it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.case import OURS, dtype_name
from benchmarks.cases import CASES
from benchmarks.cases.images import EPS, input_gradient
from benchmarks.gpu.stage import Suite, Task, bar
from benchmarks.results import Bar

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# of the images and of the gradient
LAYOUTS = {
    "contiguous": ("contiguous", "contiguous"),
    "channels_last": ("channels_last", "channels_last"),
    "x channels_last, gradient contiguous": ("channels_last", "contiguous"),
    "x contiguous, gradient channels_last": ("contiguous", "channels_last"),
}
PER_CHANNEL = (0.02, 0.03, 0.04)


def linf_step(suite: Suite) -> Iterator[Task]:
    """The sign step in every layout against torch's own operations, and the rate of a copy."""
    shapes = ((256, 3, 32, 32), (256, 3, 224, 224))
    for dtype, shape, layout in itertools.product((torch.float32, torch.float16), shapes, LAYOUTS):
        for eps in (EPS, PER_CHANNEL):
            name = f"{shape[0]}x3x{shape[2]}x{shape[3]}, {dtype_name(dtype)}, {layout}"
            name += ", per channel" if isinstance(eps, tuple) else ""
            run = partial(_linf_step, suite, shape, dtype, layout, eps)
            yield Task("linf_step", name, 3, run)


def _linf_step(
    suite: Suite,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    layout: str,
    eps: float | tuple[float, ...],
) -> None:
    shape = tuple(suite.size(size, 8) for size in shape)
    case = CASES["linf_step"](shape, dtype, eps, tuple(FORMATS[f] for f in LAYOUTS[layout]))
    inputs = suite.inputs(case)
    x, grad = inputs[0]
    candidates = {}
    for impl in suite.implementations("linf_step", x):
        step = partial(case.op, impl=impl)
        torch.testing.assert_close(step(x, grad), case.truth(x, grad), rtol=0, atol=2e-3)
        candidates[OURS, impl] = suite.candidate(case, step, inputs)
    eager = case.peers["eager"].forms(suite.device)[""]
    candidates["torch", "eager"] = suite.candidate(case, eager, inputs)
    measured = suite.measure(candidates)
    facts = {"stage": "linf_step", "shape": list(shape), "dtype": dtype_name(dtype)}
    facts |= {"layout": layout, "per_channel": eps == PER_CHANNEL, "input_sets": len(inputs)}
    for (name, impl), timed in measured.items():
        row = {**facts, **timed.row("us"), "candidate": name, "impl": impl}
        row["share_of_copy"] = suite.share_of_copy(3 * x.nbytes, timed)
        row["torch_over_this"] = 1 / timed.over(measured["torch", "eager"])
        suite.results.add(row)


# batch, image size, kernel size, stride, padding and the bar on the speed-up
STEMS = ((256, 32, 3, 1, 1, 4.0), (256, 224, 7, 2, 3, 5.0))
AGREEMENT = 0.999


def stem(suite: Suite) -> Iterator[Task]:
    """The stem's input gradient with the sign step against cuDNN's and torch's."""
    for (N, side, size, stride, padding, speedup), dtype in itertools.product(
        STEMS, (torch.float16, torch.bfloat16)
    ):
        what = f"{N}x3x{side}x{side}, {size}x{size}, {dtype_name(dtype)}"
        bars = (
            bar("stem", f"cuDNN dgrad + sign step over {OURS}, {what}", at_least=speedup),
            bar("stem", f"agreement weighted by |g|, {what}", at_least=AGREEMENT),
        )
        sizes = (suite.size(N, 2), suite.size(side, 16), size, stride, padding, dtype)
        yield Task("stem", what, 8, partial(_stem, suite, sizes, *bars), bars)


def _stem(
    suite: Suite, sizes: tuple[int, int, int, int, int, torch.dtype], speed: Bar, agreement: Bar
) -> None:
    case = CASES["stem"](*sizes)
    inputs = suite.inputs(case)
    dy, weight, x = inputs[0]
    exact = input_gradient(dy.float(), weight.float(), x.float(), *sizes[3:5])
    moves = [(step(dy, weight, x) - x).sign() for step in (case.truth, case.op)]
    g = exact.abs().double()
    agreed = ((moves[0] == moves[1]) * g).sum() / g.sum()

    candidates = {OURS: suite.candidate(case, case.op, inputs)}
    for name, layout in FORMATS.items():
        other = CASES["stem"](*sizes, layout)
        cudnn = other.peers["cuDNN"].forms(suite.device)[""]
        candidates[f"cuDNN, {name}"] = suite.candidate(other, cudnn, suite.inputs(other))
    with torch.backends.cudnn.flags(enabled=True, benchmark=True):
        measured = suite.measure(candidates)
    best = min(set(measured) - {OURS}, key=lambda name: measured[name].ms)
    facts = {"stage": "stem", "shape": list(x.shape), "dtype": dtype_name(sizes[-1])}
    for name, timed in measured.items():
        row = {**facts, "candidate": name, "kernel": sizes[2], **timed.row("us")}
        row |= {"input_sets": len(inputs), "ratio": timed.over(measured[OURS])}
        row["share_of_copy"] = suite.share_of_copy(dy.nbytes + 2 * x.nbytes, timed)
        suite.results.judge(speed if name == best else None, row["ratio"], row)
    suite.results.judge(agreement, agreed.item(), {**facts, "what": "agreement"})
