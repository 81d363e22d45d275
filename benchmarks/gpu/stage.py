"""What the stages of the GPU suite are made of: tasks, and the suite that they are measured by."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.case import OURS, Case, Operands, UnavailableError
from benchmarks.gpu.results import DayResults
from benchmarks.harness import Candidate
from benchmarks.results import Bar
from benchmarks.timing import Key, Timing
from clae_fast import _impl, _native

ROOT = Path(__file__).parents[2]
# what ours and what a peer may be off float64, as a relative error in the 2-norm
ERROR_BAR, PEER_ERROR = 5e-4, 1e-2


@dataclass(frozen=True)
class Task:
    """Something to measure.

    Attributes:
        stage: The stage that it belongs to.
        name: What is measured, as printed.
        seconds: About how long it takes on a GPU, kernels compiled on the way included.
        run: Measures and adds rows.
        bars: The bars that `run` judges.
    """

    stage: str
    name: str
    seconds: float
    run: Callable[[], None]
    bars: tuple[Bar, ...] = ()


def bar(
    stage: str, what: str, *, at_least: float | None = None, at_most: float | None = None
) -> Bar:
    """The bar of a stage on `what`."""
    sign, bound = (">=", at_least) if at_most is None else ("<=", at_most)
    return Bar(f"{stage}: {what} {sign} {bound:g}", at_least, at_most)


def judged(
    stage: str, what: str, seconds: float, run: Callable[..., None], *args: Any, **bound: float
) -> Task:
    """A task that measures `what`: `run` takes `args` and the bar, which `bound` gives."""
    held = bar(stage, what, **bound)
    return Task(stage, what, seconds, partial(run, *args, held), (held,))


@dataclass
class Suite:
    """Where rows go, what they are measured on, and how much time there is."""

    results: DayResults
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

    def inputs(self, case: Case, dtype: torch.dtype = torch.float32) -> list[Operands]:
        """Sets of operands that rotate: twice the L2 cache where eight sets are enough for that."""
        first = case.inputs(dtype, self.device, 0)
        count = 2
        if not self.rehearsal:
            cache = torch.cuda.get_device_properties(self.device).L2_cache_size
            count = max(2, min(8, -(-2 * cache // sum(t.nbytes for t in first))))
        return [first, *(case.inputs(dtype, self.device, seed) for seed in range(1, count))]

    def check(self, case: Case, name: str) -> None:
        """Hold an implementation against float64. Raises `UnavailableError` where it is wrong."""
        operands = case.inputs(torch.float32, self.device, 0)
        truth = case.exact(operands)
        bound = ERROR_BAR if name == OURS else PEER_ERROR
        harness.prepare(case, name, operands, truth, device=self.device, tolerance=bound)

    def against_peers(
        self, case: Case, small: Case, names: Iterable[str], ours: Case, eager: bool = False
    ) -> tuple[dict[tuple[str, str], Timing], int]:
        """Check and time ours and peers; name what is missing or wrong.

        Args:
            case: What is timed.
            small: The case at the size at which peers are checked.
            names: The peers.
            ours: The case at which ours is checked.
            eager: Whether ours is timed without a graph, too.

        Returns:
            The timings by name and by "replayed" or "eager", and how many sets of inputs rotated.
        """
        inputs = self.inputs(case)
        try:
            self.check(ours, OURS)
        except UnavailableError as failure:
            raise ArithmeticError(f"{OURS} is {failure}") from failure
        candidates = {(OURS, "replayed"): self.candidate(case, case.op, inputs)}
        if eager:
            candidates[OURS, "eager"] = self.candidate(case, case.op, inputs, captured=False)
        for name in names:
            peer = case.peers[name]
            try:
                self.check(case if peer.compiled else small, name)
                (function,) = harness.forms_of(case, name, self.device).values()
            except UnavailableError as failure:
                self.results.lacks(name, str(failure))
                continue
            how = "replayed" if peer.captured else "eager"
            candidates[name, how] = self.candidate(case, function, inputs, peer.captured)
        return self.measure(candidates), len(inputs)

    def candidate(
        self, case: Case, function: Callable[..., Any], sets: list[Operands], captured: bool = True
    ) -> Candidate:
        """A candidate that calls a function on one set of operands after another."""
        return Candidate([partial(case.call, function, operands) for operands in sets], captured)

    def measure(
        self, candidates: Mapping[Key, Candidate], *, rounds: int = 15, tell: bool = True
    ) -> dict[Key, Timing]:
        """Time candidates interleaved; what fails is left out, unless it is ours."""
        lacks = self.results.lacks if tell else None
        options = {"device": self.device, "rehearsal": self.rehearsal, "lacks": lacks}
        return harness.measure(candidates, rounds=rounds, **options)

    def share_of_copy(self, moved: float, timed: Timing) -> float:
        """The time of a copy of as many bytes, read or written, over this time."""
        return moved / self.ceilings()[0] / (1e-3 * timed.ms)

    def ceilings(self, measure: bool = False) -> tuple[float, float]:
        """Bytes a second of a copy, reads and writes, and fp16 FLOPs a second of this card.

        They are measured where the day's file does not have them, or where that is asked for.
        """
        row = None if measure else self.results.latest(what="ceilings")
        if row is None:
            numbers, m = self.size(1 << 30, 1 << 16), self.size(8192, 64)
            source = torch.randn(numbers, device=self.device)
            dtype = torch.float32 if self.rehearsal else torch.float16
            a, b = torch.randn(2, m, m, device=self.device, dtype=dtype)
            copy = partial(torch.empty_like(source).copy_, source)
            matmul = partial(torch.mm, a, b, out=torch.empty_like(a))
            timings = self.measure({"copy": Candidate([copy]), "matmul": Candidate([matmul])})
            row = {"stage": "build", "what": "ceilings"}
            row["copy_bytes_per_s"] = 8 * numbers / (1e-3 * timings["copy"].ms)
            row["fp16_flops_per_s"] = 2 * m**3 / (1e-3 * timings["matmul"].ms)
            self.results.add(row)
        return row["copy_bytes_per_s"], row["fp16_flops_per_s"]


def _takes(op: str, impl: str, tensors: tuple[Tensor, ...]) -> bool:
    try:
        _impl.resolve(op, impl, *tensors)
    except ValueError:
        return False
    return True
