"""What the launchers share: device guard, programs of a persistent grid, tilings."""

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

# programs run one after another then, and none may wait for another
INTERPRETED = bool(triton.knobs.runtime.interpret)
# of a GPU that is not there, for compilation ahead of time
_PROGRAMS = 132


def on_device_of(tensor: Tensor) -> torch.cuda.device_of:
    """Context in which Triton launches on the tensor's GPU; nothing changes for a CPU tensor."""
    return torch.cuda.device_of(tensor)


@functools.cache
def resident_programs(device: torch.device) -> int:
    """How many programs surely run at once: one on each multiprocessor."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 3 if INTERPRETED else _PROGRAMS


class Tiling(NamedTuple):
    """How a kernel cuts the matrix of similarities.

    Attributes:
        rows: Rows of a tile: those that a block owns or keeps while it walks along the columns.
        columns: Columns of a tile: rows of the operand that it walks over.
        depth: Part of the padded D that one product sums over.
        num_warps: Warps of a block.
        num_stages: Stages of the software pipeline.
        descriptors: Whether tiles are loaded through tensor descriptors (TMA).
        resident: Blocks that a multiprocessor runs at once, at least.
    """

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int
    descriptors: bool = False
    resident: int = 1

    @property
    def registers(self) -> int:
        """Registers of a thread where as many blocks as wanted share a multiprocessor's."""
        return min(255, 65536 // (32 * self.num_warps * self.resident))


def padded(D: int) -> int:
    """Columns of a matrix of unit rows: a power of two, and what tensor cores take."""
    return max(16, triton.next_power_of_2(D))


def blocks(tiles: Tiling, D: int) -> dict[str, int]:
    """A tiling of rows of D elements as the kernels take it."""
    return {
        "BLOCK_M": tiles.rows,
        "BLOCK_N": tiles.columns,
        "BLOCK_K": tiles.depth,
        "BLOCK_D": padded(D),
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }
