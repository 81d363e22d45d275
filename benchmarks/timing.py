"""How times are taken: interleaved rounds in one process, medians, disturbed samples set aside.

A *round* calls every candidate in turn, so that a change of the machine's speed meets all of them
alike; a *sample* is one candidate's time per call within a round. On the CPU a sample is *quiet*
when the threads of this process waited for a core for less than 3 % of its time, as the scheduler
counts it. Medians are taken over the quiet samples where there are enough of them, and
`Timing.quiet` tells how many there were.
"""

from __future__ import annotations

import gc
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import torch

import clae_fast
from clae_fast import _impl

QUIET_DELAY = 0.03
ENOUGH = 3


@dataclass
class Timing:
    """The samples of one candidate: seconds a call, by round."""

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

    def _kept(self) -> list[float]:
        rounds = _enough(self.seconds.keys() - self.disturbed, self.seconds.keys())
        return [self.seconds[r] for r in rounds]


def interleave(
    candidates: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    device: torch.device | None = None,
    min_seconds: float = 0.05,
    max_seconds: float = 20.0,
) -> dict[str, Timing]:
    """Time every candidate in each round, in an order that rotates.

    Args:
        candidates: Calls to time, each called before and so compiled and warm.
        rounds: Number of rounds.
        device: Where the calls run; a CUDA device is timed by events.
        min_seconds: A short call is repeated within a sample until about this time is filled.
        max_seconds: A call so long that `rounds` of it take more is left out of rounds, evenly, but
            takes part in three at least.
    """
    device = device or torch.device("cpu")
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
    """One call that makes all of `calls`, as over inputs that rotate."""

    def all_of_them() -> None:
        for call in calls:
            call()

    return all_of_them


def replayed(calls: Sequence[Callable[[], object]]) -> Callable[[], None]:
    """One CUDA graph of all `calls`: the GPU's time, without Python's."""
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


def fastest(candidates: Mapping[str, Callable[[], object]], *, rounds: int = 3) -> str:
    """The name of the candidate with the shortest median time."""
    if len(candidates) == 1:
        return next(iter(candidates))
    timings = interleave(candidates, rounds=rounds, min_seconds=0.02, max_seconds=2.0)
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


def machine(device: torch.device | None = None) -> dict[str, str | int]:
    """What a result depends on: processor, threads, versions, allocator state, commit."""
    device = device or torch.device("cpu")
    facts: dict[str, str | int] = {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "clae_fast": clae_fast.__version__,
        "ops": _impl.describe(device),
        "allocator": allocator(),
        "commit": _commit(),
        "date": date.today().isoformat(),
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["cuda"] = str(torch.version.cuda)
    return facts


def header(facts: dict[str, str | int]) -> str:
    """The machine as the lines that stand above a table."""
    return "\n".join(f"{name:>9}: {value}" for name, value in facts.items())


def warm_heap() -> bool:
    """Whether glibc's malloc was told to map nothing and to keep what is freed."""
    keeps = float(os.environ.get("MALLOC_TRIM_THRESHOLD_", "0") or 0) >= 1 << 30
    return os.environ.get("MALLOC_MMAP_MAX_") == "0" and keeps


def allocator() -> str:
    """The C library's malloc, the settings in force and the kernel's huge-page mode.

    Fresh pages cost five to ten times what warm ones do, so a CPU ratio holds for one such state.
    """
    library = " ".join(platform.libc_ver()).strip() or "unknown C library"
    prefixes = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD", "THP_MEM_ALLOC", "PYTORCH_CUDA_ALLOC")
    settings = [f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith(prefixes)]
    try:
        pages = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
        huge = pages.split("[")[1].split("]")[0]
    except (OSError, IndexError):
        huge = "unknown"
    return f"{library}, {' '.join(settings) or 'default settings'}, huge pages {huge}"


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


def _enough(quiet: Iterable[int], every: Iterable[int]) -> Iterable[int]:
    """The quiet rounds, or all of them where fewer than three were quiet."""
    quiet = set(quiet)
    return quiet if len(quiet) >= ENOUGH else every


def _cpu_model() -> str:
    try:
        info = Path("/proc/cpuinfo").read_text()
        name = next(line for line in info.splitlines() if line.startswith("model name"))
        return f"{name.split(':')[1].strip()} ({torch.backends.cpu.get_cpu_capability()})"
    except (OSError, StopIteration):
        return f"{platform.processor() or platform.machine()}"


def _commit() -> str:
    here = Path(__file__).parent
    try:
        git = ["git", "-C", str(here)]
        commit = subprocess.check_output([*git, "rev-parse", "--short", "HEAD"], text=True).strip()
        changed = subprocess.check_output([*git, "status", "--porcelain", "-uno"], text=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit} with changes" if changed else commit
