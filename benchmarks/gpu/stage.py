"""What the stages of the GPU suite are made of: cases, candidates, and what they run on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.gpu.results import Bar, Results, Row, timed
from clae_fast import _impl, _native

ROOT = Path(__file__).parents[2]
OURS = "clae_fast"
# what a gradient may be off float64, as a relative Frobenius error
ERROR_BAR = 5e-4


@dataclass(frozen=True)
class Case:
    """Something to measure.

    Attributes:
        stage: The stage that it belongs to.
        name: What is measured, as printed.
        seconds: What it takes on a GPU, about, kernels compiled on the way included.
        run: Measures and adds rows.
        bars: The bars that `run` judges.
    """

    stage: str
    name: str
    seconds: float
    run: Callable[[], None]
    bars: tuple[Bar, ...] = ()


@dataclass(frozen=True)
class Candidate:
    """Something to time: calls on inputs that rotate, in a CUDA graph or from Python."""

    calls: Sequence[Callable[[], object]]
    captured: bool


@dataclass
class Suite:
    """Where rows go, what they are measured on, and how much time there is."""

    results: Results
    device: torch.device
    deadline: float = float("inf")

    @property
    def rehearsal(self) -> bool:
        """Whether sizes are tiny, because there is no GPU."""
        return self.device.type != "cuda"

    def size(self, n: int, at_most: int = 32) -> int:
        """`n`, or what a rehearsal takes for it."""
        return min(n, at_most) if self.rehearsal else n

    def implementations(self, op: str, *tensors: Tensor) -> list[str]:
        """What takes these tensors; a rehearsal leaves out Triton, whose interpreter is slow."""
        if self.rehearsal:
            return ["reference"] + ["native"] * _native.has_cpu()
        return [impl for impl in _impl.available(op, "cuda") if _takes(op, impl, tensors)]

    def remaining(self) -> float:
        """Seconds until the budget is spent."""
        return self.deadline - time.monotonic()

    def sets(self, input_bytes: int) -> int:
        """How many sets of inputs rotate: twice the L2 cache where eight are enough for that."""
        if self.rehearsal:
            return 2
        cache = torch.cuda.get_device_properties(self.device).L2_cache_size
        return max(2, min(8, -(-2 * cache // input_bytes)))

    def measure(
        self, candidates: Mapping[Any, Candidate], *, rounds: int = 15, tell: bool = True
    ) -> dict[Any, Row]:
        """Time candidates interleaved; a row each, with the ratios over the others.

        What fails is left out, but for what is named as ours, and where asked it is told.
        """
        calls = {}
        for key, candidate in candidates.items():
            try:
                capture = candidate.captured and not self.rehearsal
                calls[key] = (timing.replayed if capture else timing.in_turn)(candidate.calls)
                for _ in range(2):
                    calls[key]()
            except Exception as failure:  # whatever a peer raises, the others go on
                if OURS in key:
                    raise
                calls.pop(key, None)
                if tell:
                    name = key if isinstance(key, str) else ", ".join(key)
                    self.results.lacks(name, first_line(failure))
        each = {key: len(candidates[key].calls) for key in calls}
        timings = timing.interleave(
            calls,
            rounds=2 if self.rehearsal else rounds,
            device=self.device,
            min_seconds=0.0 if self.rehearsal else 0.02,
            max_seconds=3.0,
        )
        return {
            key: timed(timings[key], each[key])
            | {"over": {other: timings[key].over(timings[other]) for other in calls}}
            for key in calls
        }

    def ceilings(self) -> tuple[float, float]:
        """Bytes a second of a copy, reads and writes, and fp16 FLOPs a second of this card."""
        row = self.results.latest(what="ceilings")
        if row is None:
            row = self.measure_ceilings()
            self.results.add(row)
        return row["copy_bytes_per_s"], row["fp16_flops_per_s"]

    def measure_ceilings(self) -> Row:
        """The row of both, measured now."""
        numbers, m = self.size(1 << 30, 1 << 16), self.size(8192, 64)
        source = torch.randn(numbers, device=self.device)
        target = torch.empty_like(source)
        dtype = torch.float32 if self.rehearsal else torch.float16
        a, b = torch.randn(2, m, m, device=self.device, dtype=dtype)
        product = torch.empty_like(a)
        rows = self.measure(
            {
                "copy": Candidate([partial(target.copy_, source)], False),
                "matmul": Candidate([partial(torch.mm, a, b, out=product)], False),
            }
        )
        return {
            "stage": "build",
            "what": "ceilings",
            "copy_bytes_per_s": 8 * numbers / (1e-6 * rows["copy"]["us"]),
            "fp16_flops_per_s": 2 * m**3 / (1e-6 * rows["matmul"]["us"]),
        }


def _takes(op: str, impl: str, tensors: tuple[Tensor, ...]) -> bool:
    try:
        _impl.resolve(op, impl, *tensors)
    except ValueError:
        return False
    return True


def first_line(failure: BaseException) -> str:
    """The first line of an exception's message."""
    return (str(failure) or type(failure).__name__).strip().splitlines()[0]


def dtype_name(dtype: torch.dtype) -> str:
    """As in the rows, fp16 say."""
    return {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
