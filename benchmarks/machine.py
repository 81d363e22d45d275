"""What a result depends on besides the code: the machine, its allocator, versions, the commit."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import date
from pathlib import Path

import torch

import clae_fast
from clae_fast import _impl

WARM_HEAP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}


def facts(device: torch.device | None = None) -> dict[str, str | int]:
    """Processor, threads, versions, allocator and commit, as every result file has them."""
    device = device or torch.device("cpu")
    found: dict[str, str | int] = {
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
        found["gpu"] = torch.cuda.get_device_name(device)
        found["cuda"] = str(torch.version.cuda)
    return found


def shown(device: torch.device | None = None) -> dict[str, str | int]:
    """The facts, after they were printed."""
    found = facts(device)
    print(header(found), flush=True)
    return found


def header(found: dict[str, str | int]) -> str:
    """The facts as the lines that stand above a table."""
    return "\n".join(f"{name:>9}: {value}" for name, value in found.items())


def warm_heap() -> bool:
    """Whether glibc's malloc was told to map nothing and to keep what is freed."""
    keeps = float(os.environ.get("MALLOC_TRIM_THRESHOLD_", "0") or 0) >= 1 << 30
    return os.environ.get("MALLOC_MMAP_MAX_") == "0" and keeps


def allocator() -> str:
    """The C library, the malloc settings in force and the kernel's mode for huge pages.

    Fresh pages cost five to ten times what warm pages do, so a ratio on the CPU holds for one such
    state alone.
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


def _cpu_model() -> str:
    try:
        info = Path("/proc/cpuinfo").read_text()
        name = next(line for line in info.splitlines() if line.startswith("model name"))
        return f"{name.split(':')[1].strip()} ({torch.backends.cpu.get_cpu_capability()})"
    except (OSError, StopIteration):
        return f"{platform.processor() or platform.machine()}"


def _commit() -> str:
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.check_output([*git, "rev-parse", "--short", "HEAD"], text=True).strip()
        changed = subprocess.check_output([*git, "status", "--porcelain", "-uno"], text=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit} with changes" if changed else commit
