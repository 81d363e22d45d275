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


def in_fresh_process(function: Callable[..., Any], *args: object) -> Any:
    """Run a module-level function in a new interpreter and return what it returns.

    Returns None when the process was killed, as the kernel does to one that wants too much memory.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(function, *args).result()
        except BrokenProcessPool:
            return None


def peak_mib(call: Callable[[], object], device: torch.device | None = None) -> float:
    """MiB that `call` needs at its peak above what is held before it.

    On the CPU this is the resident set's high-water mark (VmHWM, reset just before the call) above
    the resident set; freed memory the heap still holds is given back first, so that the call pays
    for what it uses. On a CUDA device it is the caching allocator's peak.
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
    before = _status_kib("VmRSS")
    call()
    return (_status_kib("VmHWM") - before) / 2**10


def available_bytes() -> int:
    """Main memory that can be had without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("/proc/meminfo has no line MemAvailable")


def _status_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no line {field}")
