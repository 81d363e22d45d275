"""What the launchers share: device guard, block sizes, warps."""

from typing import NamedTuple

import torch
import triton
from torch import Tensor


def on_device_of(tensor: Tensor) -> torch.cuda.device_of:
    """Context in which Triton launches on the tensor's GPU; nothing changes for a CPU tensor."""
    return torch.cuda.device_of(tensor)


class RowTiles(NamedTuple):
    """Tiling of a kernel in which a block owns rows of [n, D] and walks over all others."""

    rows: int  # rows that a block owns, and rows that it loads at each step of its walk
    width: int  # D, padded to a power of two
    depth: int  # part of the width that one product of tiles sums over
    num_warps: int
    num_stages: int


def row_tiles(D: int, *, parts: int) -> RowTiles:
    """Tiles for rows of D <= 1024 elements, each the sum of `parts` fp16 numbers.

    Eight warps hold a [rows, width] fp32 accumulator of 8192 elements in 32 registers a thread, and
    so leave room for the weights [rows, rows] and the fp32 rows of the epilogue. Each part takes
    registers of its own. 16 rows are the least that tensor cores take, and more than 64 save little
    traffic.
    """
    width = max(16, triton.next_power_of_2(D))
    return RowTiles(
        rows=min(64 // parts, max(16, 8192 // parts // width)),
        width=width,
        depth=min(128 // parts, width),
        num_warps=4 if width <= 64 else 8,
        num_stages=2,
    )
