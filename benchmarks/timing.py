"""How times are taken: in interleaved rounds of one process, as medians of undisturbed samples.

A *round* calls every candidate in turn, so that a change of the machine's speed meets all of them
alike. A *sample* is the time of one candidate within a round. On the CPU a sample is *quiet* when
the threads of this process waited for a core during less than 3 % of it, as the scheduler counts
the waiting. Medians are taken over the quiet samples where there are enough of them, and
`Timing.quiet` tells how many there were.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks.case import CPU

QUIET_DELAY = 0.03
ENOUGH = 3

Key = TypeVar("Key")


@dataclass
class Timing:
    """The samples of one candidate.

    Attributes:
        calls: How often a sample repeats the call.
        seconds: The time of one call, by round.
        disturbed: The rounds in which the sample was not quiet.
    """

    calls: int
    seconds: dict[int, float] = field(default_factory=dict)
    disturbed: set[int] = field(default_factory=set)

    @property
    def quiet(self) -> int:
        """How many samples were not disturbed."""
        return len(self.seconds) - len(self.disturbed)

    @property
    def ms(self) -> float:
        """The median, in milliseconds."""
        return 1e3 * statistics.median(self._kept())

    @property
    def p20_p80_ms(self) -> tuple[float, float]:
        """The 20th and the 80th percentile, in milliseconds."""
        kept = self._kept()
        if len(kept) == 1:
            return 1e3 * kept[0], 1e3 * kept[0]
        cuts = statistics.quantiles(kept, n=5, method="inclusive")
        return 1e3 * cuts[0], 1e3 * cuts[-1]

    def over(self, other: Timing) -> float:
        """This time over the other's: the median of the ratios within rounds."""
        common = self.seconds.keys() & other.seconds.keys()
        rounds = _enough(common - self.disturbed - other.disturbed, common)
        return statistics.median(self.seconds[r] / other.seconds[r] for r in rounds)

    def row(self, unit: str = "ms") -> dict[str, Any]:
        """The entries of a result's row, in milliseconds or, for "us", in microseconds."""
        scale, (low, high) = {"ms": 1, "us": 1000}[unit], self.p20_p80_ms
        times = {unit: self.ms, f"p20_{unit}": low, f"p80_{unit}": high}
        times = {name: scale * time for name, time in times.items()}
        return {**times, "samples": len(self.seconds), "quiet": self.quiet}

    def _kept(self) -> list[float]:
        rounds = _enough(self.seconds.keys() - self.disturbed, self.seconds.keys())
        return [self.seconds[r] for r in rounds]


def interleave(
    candidates: Mapping[Key, Callable[[], object]],
    *,
    rounds: int,
    device: torch.device = CPU,
    min_seconds: float = 0.05,
    max_seconds: float = 20.0,
) -> dict[Key, Timing]:
    """Time every candidate in each round, in an order that rotates.

    Args:
        candidates: The calls to time. Each was called before, and so is compiled and warm.
        rounds: The number of rounds.
        device: Where the calls run. A CUDA device is timed by its events.
        min_seconds: A short call is repeated within a sample until about this time is filled.
        max_seconds: A call so long that `rounds` of it take more time than this sits out some
            rounds, evenly, but takes part in at least three.
    """
    cost = {name: _sample(call, 1, device)[0] for name, call in candidates.items()}
    timings = {
        name: Timing(calls=min(1000, max(1, math.ceil(min_seconds / cost[name])))) for name in cost
    }
    stride = {
        name: max(1, min(math.ceil(rounds * seconds / max_seconds), rounds // ENOUGH))
        for name, seconds in cost.items()
    }
    names = list(candidates)
    gc.collect()
    gc.disable()
    try:
        for r in range(rounds):
            first = r % len(names)
            for name in names[first:] + names[:first]:
                if r % stride[name]:
                    continue
                timing = timings[name]
                timing.seconds[r], quiet = _sample(candidates[name], timing.calls, device)
                if not quiet:
                    timing.disturbed.add(r)
    finally:
        gc.enable()
    return timings


def in_turn(calls: Sequence[Callable[[], object]]) -> Callable[[], None]:
    """One call that makes all of `calls`, for instance on inputs that rotate."""

    def all_of_them() -> None:
        for call in calls:
            call()

    return all_of_them


def replayed(calls: Sequence[Callable[[], object]]) -> Callable[[], None]:
    """One CUDA graph of all `calls`. Replaying it takes the GPU's time without Python's."""
    every = in_turn(calls)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            every()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        every()
    return graph.replay


def fastest(candidates: Mapping[str, Callable[[], object]], device: torch.device = CPU) -> str:
    """The name of the candidate with the shortest median time."""
    if len(candidates) == 1:
        return next(iter(candidates))
    timings = interleave(candidates, rounds=3, device=device, min_seconds=0.02, max_seconds=2.0)
    return min(timings, key=lambda name: timings[name].ms)


def run_queue_delay() -> float:
    """Seconds this process's threads have waited for a core so far; 0 where that is unknown."""
    nanoseconds = 0
    for task in Path("/proc/self/task").glob("*/schedstat"):
        try:
            nanoseconds += int(task.read_text().split()[1])
        except (OSError, IndexError):
            continue  # the thread has just ended
    return nanoseconds * 1e-9


def _sample(call: Callable[[], object], calls: int, device: torch.device) -> tuple[float, bool]:
    """Seconds a call, and whether the sample was quiet."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(calls):
            call()
        end.record()
        torch.cuda.synchronize(device)
        return 1e-3 * start.elapsed_time(end) / calls, True
    waited = run_queue_delay()
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    seconds = time.perf_counter() - begin
    return seconds / calls, run_queue_delay() - waited < QUIET_DELAY * seconds


def _enough(quiet: Collection[int], every: Collection[int]) -> Collection[int]:
    """The quiet rounds, or all of them where fewer than three were quiet."""
    return quiet if len(quiet) >= ENOUGH else every
