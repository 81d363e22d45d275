"""Stages of the images: the sign step, and the first convolution with it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

import clae_fast
from benchmarks.gpu.results import Bar
from benchmarks.gpu.stage import OURS, Candidate, Case, Suite, dtype_name

EPS = 8 / 255
LAYOUTS = {
    "contiguous": (torch.contiguous_format, torch.contiguous_format),
    "channels_last": (torch.channels_last, torch.channels_last),
    "x channels_last, gradient contiguous": (torch.channels_last, torch.contiguous_format),
    "x contiguous, gradient channels_last": (torch.contiguous_format, torch.channels_last),
}
PER_CHANNEL = (0.02, 0.03, 0.04)


def linf_step(suite: Suite) -> Iterator[Case]:
    """The sign step in every layout against torch's own operations, and the rate of a copy."""
    shapes = ((256, 3, 32, 32), (256, 3, 224, 224))
    for dtype, shape, layout in itertools.product((torch.float32, torch.float16), shapes, LAYOUTS):
        for eps in (EPS, PER_CHANNEL):
            name = f"{shape[0]}x3x{shape[2]}x{shape[3]}, {dtype_name(dtype)}, {layout}"
            name += ", per channel" if isinstance(eps, tuple) else ""
            run = partial(_linf_step, suite, shape, dtype, layout, eps)
            yield Case("linf_step", name, 3, run)


def _linf_step(
    suite: Suite,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    layout: str,
    eps: float | tuple[float, ...],
) -> None:
    shape = tuple(suite.size(size, 8) for size in shape)
    of_x, of_grad = LAYOUTS[layout]
    x = torch.rand(shape, device=suite.device, dtype=dtype).to(memory_format=of_x)
    sets = suite.sets(3 * x.nbytes)
    inputs = [
        (torch.rand_like(x), torch.randn(shape, device=suite.device, dtype=dtype))
        for _ in range(sets)
    ]
    inputs = [(x, grad.to(memory_format=of_grad)) for x, grad in inputs]
    number = isinstance(eps, float)
    radius = eps if number else torch.tensor(eps, device=suite.device, dtype=dtype).view(3, 1, 1)

    def eager(x: Tensor, grad: Tensor) -> Tensor:
        return (x + radius * grad.sign()).clamp(0, 1)

    expected = eager(*inputs[0])
    candidates = {}
    for impl in suite.implementations("linf_step", x):
        step = partial(clae_fast.linf_step, alpha=eps, eps=eps, lo=0.0, hi=1.0, impl=impl)
        torch.testing.assert_close(step(*inputs[0]), expected, rtol=0, atol=2e-3)
        candidates[OURS, impl] = Candidate([partial(step, *pair) for pair in inputs], True)
    candidates["torch", "eager"] = Candidate([partial(eager, *pair) for pair in inputs], True)
    floor_us = 1e6 * 3 * x.nbytes / suite.ceilings()[0]
    for (name, impl), row in suite.measure(candidates).items():
        over = row.pop("over")
        row = {"stage": "linf_step", "shape": list(shape), "dtype": dtype_name(dtype)} | row
        row |= {"layout": layout, "per_channel": not number, "input_sets": sets}
        row |= {"candidate": name, "impl": impl, "share_of_copy": floor_us / row["us"]}
        row["torch_over_this"] = 1 / over["torch", "eager"]
        suite.results.add(row)


# batch, image size, kernel size, stride, padding and the bar on the speed-up
STEMS = ((256, 32, 3, 1, 1, 4.0), (256, 224, 7, 2, 3, 5.0))
AGREEMENT = 0.999


def stem(suite: Suite) -> Iterator[Case]:
    """The stem's input gradient with the sign step against cuDNN's and torch's."""
    for (N, side, size, stride, padding, speedup), dtype in itertools.product(
        STEMS, (torch.float16, torch.bfloat16)
    ):
        what = f"{N}x3x{side}x{side}, {size}x{size}, {dtype_name(dtype)}"
        bars = (
            Bar("stem", f"cuDNN dgrad + sign step over {OURS}, {what}", at_least=speedup),
            Bar("stem", f"agreement weighted by |g|, {what}", at_least=AGREEMENT),
        )
        run = partial(_stem, suite, N, side, size, stride, padding, dtype, bars)
        yield Case("stem", what, 8, run, bars)


def _stem(
    suite: Suite,
    N: int,
    side: int,
    size: int,
    stride: int,
    padding: int,
    dtype: torch.dtype,
    bars: tuple[Bar, Bar],
) -> None:
    N, side = suite.size(N, 2), suite.size(side, 16)
    out_side = (side + 2 * padding - size) // stride + 1
    weight = torch.randn(64, 3, size, size, device=suite.device, dtype=dtype) / size
    layouts = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
    weights = {name: weight.contiguous(memory_format=kind) for name, kind in layouts.items()}

    def draw(*shape: int, like: torch.dtype) -> Tensor:
        t = torch.randn(shape, device=suite.device).to(like)
        return t.to(memory_format=torch.channels_last)

    # views are never bf16
    inputs = [
        (draw(N, 64, out_side, out_side, like=dtype), draw(N, 3, side, side, like=torch.float16))
        for _ in range(2 if suite.rehearsal else suite.sets(N * 64 * out_side * out_side * 2))
    ]
    inputs = [(dy, x.sigmoid()) for dy, x in inputs]

    def dgrad(dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        geometry = ([stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1)
        wanted = [True, False, False]
        return torch.ops.aten.convolution_backward(dy, x, weight, None, *geometry, wanted)[0]

    def unfused(layout: str, dy: Tensor, x: Tensor) -> Tensor:
        # of the input, only the shape matters
        g = dgrad(dy, x.view(dtype), weights[layout])
        return (x + EPS * g.sign().to(x.dtype)).clamp(0, 1)

    def ours(dy: Tensor, x: Tensor) -> Tensor:
        return clae_fast.stem_step(
            dy, weight, x, stride=stride, padding=padding, alpha=EPS, eps=EPS, lo=0.0, hi=1.0
        )

    dy, x = inputs[0]
    g = dgrad(dy.float(), x.float(), weight.float()).abs().double()
    signs = [(step(dy, x) - x).sign() for step in (partial(unfused, "channels_last"), ours)]
    agreement = ((signs[0] == signs[1]) * g).sum() / g.sum()

    candidates = {OURS: Candidate([partial(ours, *pair) for pair in inputs], True)}
    for name, kind in layouts.items():
        pairs = [
            (dy.contiguous(memory_format=kind), x.contiguous(memory_format=kind))
            for dy, x in inputs
        ]
        calls = [partial(unfused, name, *pair) for pair in pairs]
        candidates[f"cuDNN, {name}"] = Candidate(calls, True)
    with torch.backends.cudnn.flags(enabled=True, benchmark=True):
        measured = suite.measure(candidates)
    best = min((name for name in measured if name != OURS), key=lambda name: measured[name]["us"])
    moved = dy.nbytes + 2 * x.nbytes
    for name, row in measured.items():
        over = row.pop("over")
        row = {"stage": "stem", "candidate": name, "shape": list(x.shape), "kernel": size} | row
        row |= {"dtype": dtype_name(dtype), "input_sets": len(inputs)}
        row["share_of_copy"] = 1e6 * moved / suite.ceilings()[0] / row["us"]
        if name != best:
            suite.results.add(row)
            continue
        suite.results.judge(bars[0], over[OURS], row | {"ratio": over[OURS]})
    row = {"stage": "stem", "what": "agreement", "shape": list(x.shape), "dtype": dtype_name(dtype)}
    suite.results.judge(bars[1], agreement.item(), row)
