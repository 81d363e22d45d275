"""The stage that times other tilings beside the default."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import CASES
from benchmarks.gpu.stage import Suite, Task
from benchmarks.harness import Candidate


def sweep(suite: Suite) -> Iterator[Task]:
    """Tilings of the Triton kernels beside the default; whoever reads them edits the default."""
    for D, n in itertools.product((128, 64, 256, 512), (16384, 2048)):
        # the second size finds most of it compiled
        seconds = 120 if n == 16384 else 40
        yield Task("sweep", f"nt_xent, n={n}, D={D}", seconds, partial(_sweep, suite, n, D))
        if suite.rehearsal:
            break  # the interpreter takes its time


def _sweep(suite: Suite, n: int, D: int) -> None:
    """Time tilings of the sums, and then of the gradient with the best tiling of the sums."""
    from clae_fast.kernels._launch import tilings
    from clae_fast.kernels.nt_xent import nt_xent

    n, D = suite.size(n), suite.size(D, 16)
    default = tilings(D, exact=False)
    inputs = [_halves(suite, n, D, seed) for seed in range(2)]
    best = default
    for part, grad in (("sums", False), ("gradient", True)):
        options = [getattr(default, part), *_tilings(suite, part, D)]
        configs = {t: best._replace(**{part: t}) for t in options}
        _compile_ahead(suite, grad, n, D, list(configs.values()))
        candidates = {
            t: Candidate([partial(nt_xent, *z, 0.5, grad, False, c) for z in inputs], True)
            for t, c in configs.items()
        }
        # some need more than the card has
        measured = suite.measure(candidates, rounds=5, tell=False)
        usual = measured[options[0]]
        for tiling, timed in measured.items():
            row = {"stage": "sweep", "part": part, "n": n, "D": D, "dtype": "fp16"}
            row |= timed.row("us")
            row |= {"tiling": tiling._asdict(), "default_over_this": usual.over(timed)}
            suite.results.add(row)
        fastest = min(measured, key=lambda tiling: measured[tiling].ms)
        best = best._replace(**{part: fastest})
        gain = usual.ms / measured[fastest].ms
        print(f"  {part}: {gain:.2f}x by {fastest}", flush=True)


def _halves(suite: Suite, n: int, D: int, seed: int = 0) -> list[Tensor]:
    """Two views of half precision, without a gradient."""
    operands = CASES["nt_xent"](n, D).inputs(torch.float16, suite.device, seed)
    return [z.detach() for z in operands]


def _tilings(suite: Suite, part: str, D: int) -> list[Any]:
    from clae_fast.kernels._launch import Tiling, padded

    if suite.rehearsal:
        return [Tiling(16, 16, 16, 4, 2)]
    depth = padded(D) if D <= 256 else 128
    shapes = itertools.product((32, 64, 128), (32, 64, 128))
    return [
        Tiling(rows, columns, depth, num_warps, num_stages, descriptors, resident)
        for rows, columns in shapes
        for num_warps, resident in ((4, 1), (4, 2), (8, 1))
        for num_stages in (2, 3)
        for descriptors in (False, True)
        # less does not fill the warps, and more leaves them too few registers for the rest
        if 16 <= rows * columns // (32 * num_warps) <= 128
        # the sums' tiles are those of a triangle
        and (part == "gradient" or rows % columns == 0)
    ]


def _compile_ahead(suite: Suite, grad: bool, n: int, D: int, configs: Sequence[Any]) -> None:
    """Fill Triton's cache with what the configurations need, on all cores."""
    if suite.rehearsal:
        return
    workers = max(1, len(os.sched_getaffinity(0)) - 2)
    shares = [configs[i::workers] for i in range(workers)]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for _ in pool.map(partial(_compile_some, grad, n, D), shares):
            pass


def _compile_some(grad: bool, n: int, D: int, configs: Sequence[Any]) -> None:
    from clae_fast.kernels.nt_xent import nt_xent

    z = torch.randn(n // 2, D, device="cuda", dtype=torch.float16)
    for config in configs:
        try:
            nt_xent(z, z, 0.5, grad, False, config)
        except Exception:
            continue  # reported where it is timed
