"""Estimates how much memory a decoded data set takes, and measures how much is free."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from clae_fast.data.split import Split
from clae_fast.errors import DataError

# an estimate reads this many runs of this many headers, since neighbors share a shard
_RUNS, _RUN = 8, 32
# for versions 2 and 1 of Linux' control groups: the root, and the files of limit, use and cache
_GROUPS_OF_PROCESS = Path("/proc/self/cgroup")
_CGROUPS = {
    "": ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    "memory": (
        "/sys/fs/cgroup/memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
}


def decoded_bytes(split: Split) -> int:
    """Estimates how many bytes the decoded images take, from the headers of at most 256 of them."""
    starts = np.linspace(0, max(len(split) - _RUN, 0), _RUNS).astype(int)
    rows = np.unique(starts[:, None] + np.arange(min(_RUN, len(split))))
    sizes = []
    for row in rows.tolist():
        try:
            height, width = split.size(row)
        except DataError:
            # the image is named when it is decoded
            continue
        sizes.append(3 * height * width)
    return int(np.mean(sizes) * len(split)) if sizes else 0


def free_bytes(device: torch.device) -> int:
    """How much memory this process can still take: a GPU's, or main memory without swapping."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    fields = dict(line.split()[:2] for line in Path("/proc/meminfo").read_text().splitlines())
    return min([1024 * int(fields["MemAvailable:"]), *_cgroups()])


def _cgroups() -> Iterator[int]:
    """What each control group's limit leaves for this process."""
    for line in _GROUPS_OF_PROCESS.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers in _CGROUPS:
            root, limit, use, cache = _CGROUPS[controllers]
            group = Path(root, path.lstrip("/"))
            # in a container the path may begin at another root, so parents are tried up to ours
            for folder in (group, *group.parents[: len(group.parts) - len(Path(root).parts)]):
                yield from _left(folder / limit, folder / use, folder / "memory.stat", cache)


def _left(limit: Path, use: Path, statistics: Path, cache: str) -> Iterator[int]:
    try:
        most, used = limit.read_text().strip(), int(use.read_text())
        reclaimable = dict(line.split() for line in statistics.read_text().splitlines())[cache]
    except (OSError, KeyError):
        # this group has no limits
        return
    if most != "max":
        yield int(most) - used + int(reclaimable)


def readable(size: int) -> str:
    """A number of bytes as text, such as "153 MB"."""
    return f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"
