"""Peak memory of one call, in a process that has done nothing else."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch


def peak_of(
    build: Callable[..., Callable[[], object]],
    *args: object,
    device: torch.device | None = None,
    calls: int = 0,
) -> float | None:
    """`peak_mib` of the call that `build(*args)` makes, in a process of its own.

    The call runs `calls` times before it is measured. The result is None where memory is too short.
    """
    peak: float | None = in_fresh_process(_peak_here, build, args, device, calls)
    return peak


def in_fresh_process(function: Callable[..., Any], *args: object) -> Any:
    """Run a function of a module in a new interpreter and return what it returns.

    The result is None when the process was killed, as the kernel does to one that wants too much
    memory.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(function, *args).result()
        except BrokenProcessPool:
            return None


def peak_mib(call: Callable[[], object], device: torch.device | None = None) -> float:
    """MiB that `call` needs at its peak above what is held before it.

    On the CPU this is the resident set's high-water mark (VmHWM, reset just before the call) above
    the resident set. What the heap still holds of freed memory is given back first, so that the
    call pays for what it uses. On a CUDA device it is the caching allocator's peak.
    """
    if device is not None and device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # 5 resets VmHWM
    before = _kib("/proc/self/status", "VmRSS")
    call()
    return (_kib("/proc/self/status", "VmHWM") - before) / 2**10


def available_bytes() -> int:
    """Main memory that can be had without swapping."""
    return 1024 * _kib("/proc/meminfo", "MemAvailable")


def _peak_here(
    build: Callable[..., Callable[[], object]],
    args: tuple[object, ...],
    device: torch.device | None,
    calls: int,
) -> float | None:
    try:
        call = build(*args)
        for _ in range(calls):
            call()
        return peak_mib(call, device)
    except (RuntimeError, MemoryError):
        return None


def _kib(file: str, name: str) -> int:
    for line in Path(file).read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1])
    raise RuntimeError(f"{file} has no line {name}")
