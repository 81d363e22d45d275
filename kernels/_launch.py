"""What every launcher needs: a device to launch on, memory, and how to cut the work into tiles."""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

# the interpreter runs programs one after another, so that none of them may wait for another
INTERPRETED = bool(triton.knobs.runtime.interpret)
# multiprocessors of a GPU that is not there, for compilation ahead of time
_PROGRAMS = 132
# fp32 numbers: a multiple of the widest load
_ALIGNMENT = 32

Constants = TypeVar("Constants", bound=tuple[Any, ...])
# calls of a launcher on meta tensors, each with a name, that together take its kernels through all
# default tilings: an op's `compilations` yields them to `benchmarks/compile_kernels.py`
Compilations = Iterator[tuple[str, Callable[[], object]]]


def on_device_of(tensor: Tensor) -> torch.cuda.device_of:
    """A context in which Triton launches on the tensor's GPU; on the CPU it changes nothing."""
    return torch.cuda.device_of(tensor)


@functools.cache
def resident_programs(device: torch.device) -> int:
    """The number of programs that certainly run at once: one on each multiprocessor."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 3 if INTERPRETED else _PROGRAMS


def cdiv(a: int, b: int) -> int:
    """The quotient, rounded up; `triton.cdiv` takes microseconds on the host."""
    return -(-a // b)


def workspace(device: torch.device, *sizes: int) -> list[Tensor]:
    """Uninitialized fp32 memory of these sizes, cut from one allocation and aligned for loads."""
    first, ends = 0, []
    for size in sizes:
        ends.append(first + size)
        first += cdiv(size, _ALIGNMENT) * _ALIGNMENT
    memory = torch.empty(first, dtype=torch.float32, device=device)
    return [memory[end - size : end] for end, size in zip(ends, sizes, strict=True)]


@functools.lru_cache(typed=True)
def constants(values: Constants) -> Constants:
    """A NamedTuple whose elements the compiler knows, as a kernel's argument.

    Triton compares arguments at every launch, which takes no time if they are the same objects.
    """
    return type(values)(*map(tl.constexpr, values))


def meta_rows(D: int, *, exact: bool, N: int = 2048) -> Tensor:
    """Rows without memory, for compilation ahead of time."""
    dtype = torch.float32 if exact else torch.float16
    return torch.empty(N, D, dtype=dtype, device="meta")


class Blocks(NamedTuple):
    """The sizes of a kernel's tiles, known to the compiler; `Tiling` explains them."""

    BLOCK_M: int  # rows
    BLOCK_N: int  # columns
    BLOCK_K: int  # depth
    BLOCK_D: int  # the padded D
    DESCRIPTORS: bool


class Tiling(NamedTuple):
    """How a kernel cuts the matrix of similarities into tiles.

    Attributes:
        rows: Rows of a tile: those that a program keeps while it walks along the columns.
        columns: Columns of a tile: rows of the operand that the program walks over.
        depth: The part of the padded D that one product sums over.
        num_warps: Warps of a program.
        num_stages: Stages of the software pipeline.
        descriptors: Whether the sums and the gradient of the softmax losses load their tiles
            through tensor descriptors (TMA).
        resident: How many programs a multiprocessor should run at once, at least.
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
        """The most registers a thread may have if as many programs as wanted are to be resident."""
        return min(255, 65536 // (32 * self.num_warps * self.resident))


class Tilings(NamedTuple):
    """The tilings of the two kernels that do the work.

    Where rows and columns are the same, the rows of a tile of `sums` must be a multiple of its
    columns.
    """

    sums: Tiling
    gradient: Tiling

    @property
    def padding(self) -> int:
        """Rows below the last that a tile may reach."""
        return max(*self.sums[:2], *self.gradient[:2])


def padded(D: int) -> int:
    """The width of a matrix of scaled rows: a power of two that tensor cores take."""
    return max(16, 1 << (D - 1).bit_length())


@functools.cache
def blocks(tiles: Tiling, D: int) -> dict[str, Any]:
    """The arguments by which a kernel gets a tiling for rows of D elements."""
    sizes = Blocks(tiles.rows, tiles.columns, tiles.depth, padded(D), tiles.descriptors)
    return {
        "blocks": constants(sizes),
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }


@functools.cache
def tilings(D: int, *, exact: bool, online: bool = False) -> Tilings:
    """Tilings of the softmax losses for rows of D elements.

    These are the largest of those tried that neither spill nor take more shared memory than every
    card since compute capability 8.0 grants, as `benchmarks/compile_kernels.py` shows.

    Args:
        D: Elements of a row.
        exact: Whether rows are kept in two parts.
        online: Whether the temperature is so low that the sums need a running maximum.
    """
    width = padded(D)
    if exact:
        depth = min(64, width)
        if width > 128:
            wide = Tiling(32, 32, width, 8, 2) if width == 256 else Tiling(16, 16, depth, 8, 2)
            return Tilings(Tiling(16, 16, depth, 8, 2), wide)
        return Tilings(Tiling(32, 32, width, 4, 2), Tiling(64, 32, width, 8, 2))
    if width > 256:
        return Tilings(Tiling(64, 32, 128, 8, 2), Tiling(16, 16384 // width, 64, 8, 2))
    if width == 256:
        return Tilings(Tiling(64, 64, width, 8, 2), Tiling(64, 32, width, 8, 2))
    if width == 128:
        gradient = Tiling(64, 32 if online else 64, width, 4, 3, resident=2)
    else:
        gradient = Tiling(128, 64, width, 8, 3)
    return Tilings(Tiling(128, 64, width, 8, 4), gradient)


def splits_of(blocks: int, columns: int, tiles: Tiling, device: torch.device) -> int:
    """How many programs share a block of rows, so that they fill the GPU evenly."""
    programs = resident_programs(device) * tiles.resident
    # every program has four tiles at least
    most = min(cdiv(columns, 4 * tiles.columns), cdiv(4 * programs, blocks))

    def busy(splits: int) -> float:
        waves = blocks * splits / programs
        return waves / math.ceil(waves)

    options = range(1, most + 1)
    return next((splits for splits in options if busy(splits) > 0.9), max(options, key=busy))
